"""The chaos search finds nothing in the code as it is, and each of the mistakes that are planted here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hocket.bus.token_state import OutboxState
from hocket.lab.chaos import draw, run_seed
from hocket.lab.search import shortened, smaller
from hocket.router.api.stream import TokenPath
from hocket.router.blame import Blame
from hocket.router.view import ClusterView
from hocket.transport.receiver import Receiver
from hocket.workers.engines.sim.engine import SimEngine
from hocket.workers.prefill import PrefillIntake, PrefillWorker, Take
from hocket.workers.router_clocks import RouterClocks
from hocket.workers.watchdog import Watchdog

RUNS_MAX = 1000


def skip_the_fence(patch: pytest.MonkeyPatch) -> None:
    """Whoever claims is granted at once, though another may still write."""

    def offer(self, reception, claim, now) -> None:
        if reception.grant is not None:
            del self._transfers[reception.grant.transfer]
        self._grant(reception, claim, now)

    patch.setattr(Receiver, "_offer", offer)


def ack_early(patch: pytest.MonkeyPatch) -> None:
    """The job leaves the queue when it is taken."""
    compute = PrefillWorker._compute

    async def ack_and_compute(self, run):
        for delivery in run.deliveries:
            await delivery.ack()
        return await compute(self, run)

    patch.setattr(PrefillWorker, "_compute", ack_and_compute)


def free_blocks_early(patch: pytest.MonkeyPatch) -> None:
    """A cancelled request's blocks are given back while somebody may still write into them."""
    drop = SimEngine._drop

    def drop_and_free(self, work) -> None:
        drop(self, work)
        self._scheduler.free(work)

    patch.setattr(SimEngine, "_drop", drop_and_free)


def drop_the_dedup_of_tokens(patch: pytest.MonkeyPatch) -> None:
    """What comes again is shown again."""
    on_entry = TokenPath._on_entry

    def taken_as_next(self, frame, entry, detail) -> None:
        stream_id, attempt, first_index, token_ids, finish = entry
        stream = self._streams.get(stream_id)
        if stream is not None and first_index < stream.next_index:
            first_index = stream.next_index
        on_entry(self, frame, (stream_id, attempt, first_index, token_ids, finish), detail)

    patch.setattr(TokenPath, "_on_entry", taken_as_next)


def drop_the_dedup_of_jobs(patch: pytest.MonkeyPatch) -> None:
    """A job that runs here already is taken once more."""
    patch.setattr(PrefillIntake, "offer", lambda self, job, delivery, now: Take())


def trust_a_stale_heartbeat(patch: pytest.MonkeyPatch) -> None:
    """Who was heard once lives for ever."""
    patch.setattr(ClusterView, "silent", lambda self, now: ([], []))


def lose_a_terminal_event(patch: pytest.MonkeyPatch) -> None:
    """An end is said once."""
    begin = OutboxState.__init__

    def begin_forgetful(self, worker_id, epoch, times) -> None:
        begin(self, worker_id, epoch, replace(times, finish_again_s=3600.0))

    patch.setattr(OutboxState, "__init__", begin_forgetful)


def miss_a_hang(patch: pytest.MonkeyPatch) -> None:
    """Whoever sends heartbeats is well."""
    patch.setattr(Watchdog, "look", lambda self, load, now: False)


def trust_another_hosts_clock(patch: pytest.MonkeyPatch) -> None:
    """A deadline is compared with the clock of the host it came to."""
    patch.setattr(RouterClocks, "deadline_s", lambda self, job, now: job.sent_s + job.time_left_s)


def blame_nobody(patch: pytest.MonkeyPatch) -> None:
    """A request is tried again however many workers it has killed."""
    patch.setattr(Blame, "_note", lambda self, one, record: None)


PLANTS = (
    skip_the_fence,
    ack_early,
    free_blocks_early,
    drop_the_dedup_of_tokens,
    drop_the_dedup_of_jobs,
    trust_a_stale_heartbeat,
    lose_a_terminal_event,
    miss_a_hang,
    trust_another_hosts_clock,
    blame_nobody,
)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_a_planted_mistake_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch)
    found = next((outcome for seed in range(RUNS_MAX) if not (outcome := run_seed(seed)).is_good), None)
    assert found is not None
    print(plant.__name__, found.seed, found.violations[0])


def test_the_code_as_it_is_passes():
    outcomes = [run_seed(seed) for seed in range(300)]
    assert [(outcome.seed, outcome.violations) for outcome in outcomes if not outcome.is_good] == []


REPLAY = "import sys; from hocket.lab.chaos import run_seed; print('\\n'.join(run_seed(int(sys.argv[1])).lines))"


def test_a_seed_replays_byte_for_byte_in_another_process():
    logs = [
        subprocess.run([sys.executable, "-c", REPLAY, "7"], capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    ]
    assert len(logs[0]) > 10_000
    assert logs[0] == logs[1] == logs[2]


def test_a_failure_is_made_small(monkeypatch: pytest.MonkeyPatch):
    ack_early(monkeypatch)
    seed = next(seed for seed in range(RUNS_MAX) if draw(seed).faults and not run_seed(seed).is_good)
    plan, outcome = smaller(seed)
    assert not outcome.is_good
    assert (plan.faults, plan.requests) == ([], [])  # The requests after the faults show it.
    lines = shortened(outcome)
    assert any("INVARIANT" in line for line in lines)
    assert not any("hk.load" in line for line in lines)


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hocket.cluster.cli", "lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_command_searches_replays_and_compares(tmp_path: Path):
    searched = lab("chaos", "--seeds", "0..40", "--jobs", "2")
    assert searched.returncode == 0, searched.stdout
    assert searched.stdout.startswith("40 runs, ")
    logs = [tmp_path / f"{number}.txt" for number in range(3)]
    for seed, path in zip((3, 3, 4), logs, strict=True):
        assert lab("chaos", "--seeds", str(seed), "--log", str(path)).returncode == 0
    same, other = lab("diff", str(logs[0]), str(logs[1])), lab("diff", str(logs[0]), str(logs[2]))
    assert (same.returncode, same.stdout) == (0, "equal\n")
    assert other.returncode == 1
    assert other.stdout.startswith("line ")
    assert lab("chaos", "--seeds", "9..3").returncode == 2
