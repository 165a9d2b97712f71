"""Policies: what each prefers, that equal inputs give equal choices, and how a user's own is found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.policies import PolicyError, RequestView, WorkerView, load_policy


def request(prompt_tokens: int = 64, prefill_workers: int = 1) -> RequestView:
    return RequestView(RequestId("r"), "m", prompt_tokens, 16, prefill_workers, local_prefill_tokens_max=16)


def worker(name: str, *, hit_blocks: int = 0, running: int = 0, in_flight: int = 0, used_blocks: int = 0) -> WorkerView:
    return WorkerView(
        WorkerId(name), 16, slots=8, kv_blocks=100, can_prefill_locally=True, hit_blocks=hit_blocks, in_flight=in_flight,
        in_flight_blocks=0, running=running, waiting=0, kv_blocks_free=100 - used_blocks,
    )  # fmt: skip


def picks(name: str, workers: list[WorkerView], times: int = 1) -> list[str]:
    policy, rng = load_policy(name), random.Random(1)
    return [policy.pick(request(), workers, 0.0, rng).worker_id for _ in range(times)]


def test_round_robin_takes_turns():
    assert picks("round_robin", [worker("a"), worker("b"), worker("c")], 5) == ["a", "b", "c", "a", "b"]


def test_least_loaded_counts_what_was_sent_since_the_last_heartbeat():
    assert picks("least_loaded", [worker("a", running=1), worker("b", in_flight=3), worker("c", running=2)]) == ["a"]


def test_kv_prefers_the_prefix_until_the_load_outweighs_it():
    assert picks("kv", [worker("a"), worker("b", hit_blocks=3)]) == ["b"]
    assert picks("kv?hit_weight=1", [worker("a"), worker("b", hit_blocks=3, used_blocks=10)]) == ["a"]


def test_the_default_plan_is_local_without_prefill_workers_or_with_little_to_compute():
    assert request().default_plan(worker("a")) == "remote"
    assert request().default_plan(worker("a", hit_blocks=3)) == "local"
    assert request(prefill_workers=0).default_plan(worker("a")) == "local"


def test_a_policy_comes_from_a_file(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from hocket.router.policies import Choice\n"
        "class Last:\n"
        "    def pick(self, request, workers, now, rng):\n"
        "        return Choice(workers[-1].worker_id, why='last')\n"
    )
    assert picks(f"{path}:Last", [worker("a"), worker("b")]) == ["b"]
    assert picks("hocket.router.policies.basic:RoundRobin", [worker("a")]) == ["a"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("no_such", "installed: cost, kv, least_loaded, lmetric, mix"),
        ("no_such_module:X", "no_such_module"),
        ("missing.py:X", "missing.py"),
        ("hocket.router.policies.basic:Nope", "Nope"),
        ("hocket.router.config:RouterConfig", "pick"),
    ],
)
def test_a_policy_that_cannot_be_loaded_says_why(name: str, word: str):
    with pytest.raises(PolicyError, match=word):
        load_policy(name)
