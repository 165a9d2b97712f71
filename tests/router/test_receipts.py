"""Receipts: what they say, what they never say, and that their memory is bounded."""

from __future__ import annotations

import random
import tracemalloc

import msgspec
import pytest

from hocket.bus.ids import RequestId, RouterId, WorkerId
from hocket.bus.messages import Heartbeat, SamplingParams, WorkerCard, pack_tokens
from hocket.router.chooser import Ask, Chooser
from hocket.router.control_messages import PolicyConfig
from hocket.router.generation import Generation
from hocket.router.index import PrefixIndex
from hocket.router.policies import Choice
from hocket.router.policies.kv import KvPolicy
from hocket.router.policy_set import PolicySet
from hocket.router.receipts import RECORDS_PER_S_MAX, Receipts
from hocket.router.view import ClusterView

SECRET = [123_456_789, 987_654_321] * 40


class Costly:
    """Puts a price on every worker."""

    def pick(self, request, workers, now, rng):
        costs = {worker.worker_id: {"queue": 0.1 * i, "prefill": 0.2} for i, worker in enumerate(workers)}
        return Choice(workers[0].worker_id, why="cheapest", costs=costs, ttft_s=0.25)


def card(name: str, model: str = "m", role: str = "decode") -> WorkerCard:
    return WorkerCard(WorkerId(name), role, 1, model, "f", 16, 100, 4, 2048, ("tcp://127.0.0.1:1",))


def generation(name: str, *, explains: bool = False) -> Generation:
    return Generation(
        RequestId(name), "m", pack_tokens(SECRET), len(SECRET), SamplingParams(max_tokens=8), 60.0, explains=explains
    )


class Rig:
    """A chooser over a view of our own, and the receipts of what it chooses."""

    def __init__(self, workers: int = 3, *, bytes_max: int = 8 << 20, shadow: bool = True) -> None:
        self.view = ClusterView(suspect_s=1.5, dead_s=3.0)
        for number in range(workers):
            self.join(card(f"w{number:03d}"))
        config = PolicyConfig("costly", shadows=("kv",) if shadow else ())
        policies = PolicySet(
            config,
            [Costly(), KvPolicy()][: len(config.seats)],
            version=3,
            timer=lambda: 0.0,
            scratch_rng=random.Random(),
        )
        self.chooser = Chooser(
            self.view, PrefixIndex(), policies, local_prefill_tokens_max=16, rng=random.Random(1)
        )  # fmt: skip
        self.receipts = Receipts(RouterId("r1"), bytes_max=bytes_max)

    def join(self, joining: WorkerCard, **heartbeat: object) -> None:
        self.view.join(joining, Heartbeat(joining.worker_id, 1, joining.role, kv_blocks_free=90, **heartbeat), 10.0)  # type: ignore[arg-type]

    def run(self, name: str, now: float = 11.0, *, exclude: frozenset[WorkerId] = frozenset(), explains: bool = False):
        record = self.receipts.begin(generation(name, explains=explains), now, 1e9)
        hashes = list(range(1 << 60, (1 << 60) + 200))
        chosen = self.chooser.choose(Ask(RequestId(name), "m", len(SECRET), 8, lambda _: hashes), exclude, now)
        if record is not None:
            self.receipts.picked(record, chosen, now, members=self.view.members("decode"), exclude=exclude)
        return record, chosen


def test_a_receipt_has_every_candidate_its_costs_and_why_others_were_left_out():
    rig = Rig()
    rig.join(card("p1", role="prefill"))
    rig.join(card("x-draining"), is_draining=True)
    rig.join(card("x-other", "another"))
    rig.join(card("x-refused"))
    rig.join(card("x-silent"))
    silent = rig.view.get(WorkerId("x-silent"))
    assert silent is not None
    silent.is_suspect = True
    record, chosen = rig.run("r1", exclude=frozenset({WorkerId("x-refused")}))
    assert record is not None
    assert chosen is not None
    seen = chosen.outcome(prefill_worker=WorkerId("p1"), cached_tokens=16, ttft_s=0.3, itl_s=0.01, output_tokens=8)
    running = rig.receipts.find(RequestId("r1"))
    assert running is not None
    assert running.outcome is None
    rig.receipts.ended(record, "finished", 12.0, outcome=seen)
    rig.receipts.ended(record, "cancelled", 13.0)
    receipt = rig.receipts.find(RequestId("r1"))
    assert receipt is not None
    [attempt] = receipt.attempts
    assert [one.worker for one in attempt.candidates] == ["w000", "w001", "w002"]
    assert attempt.candidates[1].costs == {"queue": 0.1, "prefill": 0.2}
    assert {one.heartbeat_age_s for one in attempt.candidates} == {1.0}
    assert (attempt.policy, attempt.arm, attempt.version, attempt.worker) == ("costly", "primary", 3, "w000")
    assert (attempt.predicted_ttft_s, attempt.why, attempt.plan) == (0.25, "cheapest", "remote")
    assert [(one.policy, bool(one.why)) for one in attempt.shadows] == [("kv", True)]
    assert [one.worker for one in attempt.prefill] == ["p1"]
    assert attempt.filtered == {
        "x-draining": "draining",
        "x-other": "serves another",
        "x-refused": "refused this request or was lost with it",
        "x-silent": "suspect: silent",
    }
    assert receipt.outcome is not None
    assert (receipt.outcome.end, receipt.outcome.ttft_s, receipt.outcome.cached_tokens) == ("finished", 0.3, 16)
    assert receipt.outcome.duration_s == 1.0


def test_a_receipt_never_holds_the_prompt():
    rig = Rig()
    rig.run("r1")
    receipt = rig.receipts.find(RequestId("r1"))
    packed, text = msgspec.msgpack.encode(receipt), msgspec.json.encode(receipt)
    assert pack_tokens(SECRET[:1]) not in packed
    assert str(SECRET[0]).encode() not in text


def test_a_request_that_nobody_could_take_says_why():
    rig = Rig(0)
    rig.join(card("x-draining"), is_draining=True)
    record, chosen = rig.run("r1")
    assert chosen is None
    assert record is not None
    rig.receipts.ended(record, "refused", 12.0, detail="no decode worker")
    receipt = rig.receipts.find(RequestId("r1"))
    assert receipt is not None
    assert receipt.attempts[0].worker is None
    assert receipt.attempts[0].filtered == {"x-draining": "draining"}
    assert receipt.outcome is not None
    assert receipt.outcome.detail == "no decode worker"


@pytest.mark.parametrize("workers", [3, 100])
def test_the_memory_of_receipts_is_bounded(workers: int):
    bytes_max = 1 << 20
    rig = Rig(workers, bytes_max=bytes_max)
    rig.run("warm")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(8000 // workers):
            rig.run(f"r{number}", 11.0 + number)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert rig.receipts.held_bytes <= bytes_max
    assert grown <= bytes_max
    assert len(rig.receipts) < 8000 // workers
    assert rig.receipts.find(RequestId("r0")) is None
    assert rig.receipts.find(RequestId(f"r{8000 // workers - 1}")) is not None
    assert rig.receipts.oldest_s(11.0 + 8000 // workers) > 0


def test_under_load_some_requests_leave_no_receipt_but_those_that_ask_do():
    rig = Rig(1)
    kept = sum(rig.run(f"r{number}")[0] is not None for number in range(RECORDS_PER_S_MAX + 100))
    assert kept == RECORDS_PER_S_MAX
    assert rig.run("asks", explains=True)[0] is not None
    assert rig.run("next second", 12.0)[0] is not None


def test_no_receipts_are_kept_where_none_are_wanted():
    rig = Rig(1, bytes_max=0)
    assert rig.run("r1", explains=True)[0] is None
    assert rig.receipts.find(RequestId("r1")) is None
    assert len(rig.receipts) == 0
