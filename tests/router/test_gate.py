"""The gate: admission with the pool as it is."""

from __future__ import annotations

import pytest

from hocket.bus.ids import RequestId, RouterId, WorkerId
from hocket.bus.memory_bus import MemoryBroker, MemoryBus
from hocket.bus.messages import Heartbeat, SamplingParams, WorkerCard
from hocket.router.admission import AdmissionLimits
from hocket.router.gate import Gate
from hocket.router.generation import Generation, RouterError
from hocket.router.metrics import RouterMetrics
from hocket.router.sharing import LoadSharing
from hocket.router.view import ClusterView


def gate_of(*prefill_tokens_per_s: float) -> Gate:
    """With a prefill worker of each speed."""
    view = ClusterView(suspect_s=1.5, dead_s=3.0)
    for number, speed in enumerate(prefill_tokens_per_s):
        name = WorkerId(f"p{number}")
        card = WorkerCard(name, "prefill", 1, "m", "f", 16, 100, 4, 2048, ("tcp://127.0.0.1:1",))
        view.join(card, Heartbeat(name, 1, "prefill", prefill_tokens_per_s=speed), 0.0)
    sharing = LoadSharing(MemoryBus(MemoryBroker()), "main", RouterId("r"), view, lane_wait_s=0.1, clock=lambda: 0.0)
    gate = Gate(AdmissionLimits(), view, sharing, RouterMetrics(), clock=lambda: 0.0)
    gate.look()
    return gate


def generation(prompt_tokens: int, deadline_s: float) -> Generation:
    return Generation(
        RequestId("r"), "m", b"", prompt_tokens, SamplingParams(max_tokens=8), deadline_s,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("speeds", "wait_s"),
    [((100.0, 100.0), 5.0), ((100.0, 0.0), 5.0), ((100.0,), 10.0), ((50.0, 150.0, 0.0, 0.0), 2.5)],
    ids=["all known", "a new one is taken to be like the other", "one", "the mean of those that are known"],
)
def test_a_wait_is_reckoned_with_all_prefill_workers(speeds: tuple[float, ...], wait_s: float) -> None:
    gate = gate_of(*speeds)
    gate.enter(generation(1000, 1e9), 1)
    gate.enter(generation(10, wait_s * 1.02), 2)
    with pytest.raises(RouterError, match="deadline"):
        gate.enter(generation(10, wait_s * 0.98), 3)


def test_a_pool_of_which_nothing_is_known_refuses_nobody_for_its_deadline() -> None:
    gate = gate_of(0.0, 0.0)
    gate.enter(generation(1000, 1e9), 1)
    gate.enter(generation(10, 0.1), 2)


def test_what_a_worker_has_cached_waits_no_more() -> None:
    gate = gate_of(100.0)
    gate.enter(generation(1000, 1e9), 1)
    gate.waits(1, 100)
    gate.enter(generation(10, 1.5), 2)
