"""Primary, canary and shadows: who decides for whom, what is measured, and what happens to a policy that fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from msgspec.structs import replace

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.control_messages import Canary, Distribution, PolicyConfig
from hocket.router.policies import Choice, Outcome, Policy, RequestView, WorkerView
from hocket.router.policies.basic import LeastLoaded, RoundRobin
from hocket.router.policies.kv import KvPolicy
from hocket.router.policy_set import SHADOW_TIME_SHARE, PolicySet, note_end

WORKERS = [
    WorkerView(
        WorkerId(f"w{i}"), 16, slots=8, kv_blocks=100, can_prefill_locally=True, hit_blocks=0, in_flight=0,
        in_flight_blocks=0, running=i, waiting=0, kv_blocks_free=100,
    )
    for i in range(4)
]  # fmt: skip


class Timer:
    """A clock that only policies move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scripted:
    """Goes to one worker; takes as long, fails as often and predicts what it is told."""

    def __init__(self, worker: str = "w3", timer: Timer | None = None, *, takes_s: float = 0.0) -> None:
        self.worker = worker
        self.timer = timer or Timer()
        self.takes_s = takes_s
        self.error: Exception | None = None
        self.ttft_s: float | None = None
        self.costs: dict[WorkerId, dict[str, float]] = {}
        self.observed: list[Outcome] = []

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        self.timer.now_s += self.takes_s
        if self.error is not None:
            raise self.error
        return Choice(WorkerId(self.worker), costs=self.costs, ttft_s=self.ttft_s)

    def observe(self, outcome: Outcome, now: float) -> None:
        self.observed.append(outcome)
        if self.error is not None:
            raise self.error


def request(name: str = "r", session_id: str = "") -> RequestView:
    return RequestView(RequestId(name), "m", 64, 16, 1, local_prefill_tokens_max=16, session_id=session_id)


def made(
    primary: Policy,
    *,
    canary: Policy | None = None,
    share: float = 0.5,
    shadows: Sequence[Policy] = (),
    timer: Callable[[], float] | None = None,
    failures_max: int = 5,
) -> tuple[PolicySet, list[tuple[str, str]]]:
    replaced: list[tuple[str, str]] = []
    config = PolicyConfig(
        "one", Canary("two", share) if canary else None, tuple(f"shadow{i}" for i in range(len(shadows))),
        failures_max=failures_max,
    )  # fmt: skip
    seats = [primary, *([canary] if canary else ()), *shadows]
    policies = PolicySet(
        config, seats, version=7, timer=timer or Timer(), scratch_rng=random.Random(),
        on_replaced=lambda place, policy, why: replaced.append((place, why)),
    )  # fmt: skip
    return policies, replaced


def outcome(worker: str, *, ttft_s: float | None = 0.5, cached_tokens: int | None = 32) -> Outcome:
    return Outcome(
        RequestId("r"),
        WorkerId(worker),
        "remote",
        None,
        64,
        2,
        cached_tokens,
        ttft_s,
        0.01,
        16,
        0,
        predicted_ttft_s=0.4,
    )


# ---- canary


def test_a_canary_gets_its_share_and_a_session_always_the_same_policy():
    policies, _ = made(Scripted("w0"), canary=Scripted("w1"), share=0.2)
    rng = random.Random(1)
    to_canary = 0
    for number in range(5000):
        choice, trace = policies.decide(request(f"r{number}"), WORKERS, 0.0, rng)
        assert (choice.worker_id == "w1") == (trace.arm is policies.canary)
        to_canary += choice.worker_id == "w1"
    assert 850 < to_canary < 1150
    for session in map(str, range(50)):
        arms = {policies.arm_of(request(f"r{number}", session)) for number in range(20)}
        assert len(arms) == 1


def test_a_session_stays_with_the_canary_while_its_share_grows():
    sessions = [request("r", str(number)) for number in range(500)]
    before: set[str] = set()
    for share in (0.05, 0.2, 0.6, 1.0):
        policies, _ = made(Scripted("w0"), canary=Scripted("w1"), share=share)
        now = {one.session_id for one in sessions if policies.arm_of(one) is policies.canary}
        assert before <= now
        before = now
    assert len(before) == 500


# ---- failures


def test_a_policy_that_raises_costs_no_request_and_is_replaced_after_some_times():
    bad = Scripted()
    bad.error = KeyError("boom")
    policies, replaced = made(bad)
    for number in range(5):
        assert not replaced, number
        choice, trace = policies.decide(request(), WORKERS, float(number), random.Random(1))
        assert choice.worker_id == "w0"  # the least loaded
        assert "boom" in trace.failure
    assert [place for place, _ in replaced] == ["primary"]
    assert "raised 5 times in 60 s, last KeyError: 'boom'" in replaced[0][1]
    bad.error = None
    choice, trace = policies.decide(request(), WORKERS, 6.0, random.Random(1))
    assert choice.worker_id == "w0"
    assert trace.failure
    assert policies.primary.status.picks == 6


def test_failures_that_are_far_apart_replace_nothing():
    bad = Scripted()
    bad.error = KeyError("boom")
    policies, replaced = made(bad)
    for number in range(50):
        policies.decide(request(), WORKERS, number * 16.0, random.Random(1))
    assert not replaced
    assert policies.primary.status.raised == 50


def test_a_worker_that_was_not_offered_is_a_failure():
    policies, replaced = made(Scripted("nobody"), failures_max=1)
    choice, trace = policies.decide(request(), WORKERS, 0.0, random.Random(1))
    assert choice.worker_id == "w0"
    assert "'nobody' was not offered" in trace.failure
    assert replaced


def test_a_slow_policy_is_obeyed_until_it_is_replaced():
    timer = Timer()
    policies, replaced = made(Scripted("w3", timer, takes_s=0.006), timer=timer)
    for number in range(5):
        choice, trace = policies.decide(request(), WORKERS, float(number), random.Random(1))
        assert choice.worker_id == "w3"
        assert trace.pick_s == pytest.approx(0.006)
    assert replaced == [("primary", "took 6.0 ms, over its 5 ms, 5 of 5 times in 60 s")]
    assert policies.decide(request(), WORKERS, 6.0, random.Random(1))[0].worker_id == "w0"


def test_a_few_stalls_among_many_picks_replace_nothing():
    timer = Timer()
    policy = Scripted("w3", timer)
    policies, replaced = made(policy, timer=timer)
    for number in range(1000):
        policy.takes_s = 0.03 if number % 50 == 49 else 0.0
        policies.decide(request(), WORKERS, number / 100, random.Random(1))
    assert not replaced
    assert policies.primary.status.overruns == 20


def test_a_pick_that_stops_the_router_is_not_waited_for_again():
    timer = Timer()
    policies, replaced = made(Scripted("w3", timer, takes_s=0.6), timer=timer)
    policies.decide(request(), WORKERS, 0.0, random.Random(1))
    assert [place for place, _ in replaced] == ["primary"]


def test_the_requests_of_a_failed_canary_go_to_the_primary():
    bad = Scripted("w1")
    bad.error = RuntimeError("boom")
    policies, replaced = made(Scripted("w2"), canary=bad, share=1.0, failures_max=2)
    first = [policies.decide(request(), WORKERS, 0.0, random.Random(1))[0].worker_id for _ in range(4)]
    assert first == ["w0", "w0", "w2", "w2"]
    assert [place for place, _ in replaced] == ["canary"]
    assert not policies.primary.status.replaced


def test_a_policy_that_raises_when_it_hears_of_an_end_is_replaced_too():
    bad = Scripted()
    policies, replaced = made(bad, failures_max=3)
    bad.error = RuntimeError("boom")
    for _ in range(5):
        policies.observe(outcome("w0"), 0.0)
    assert [place for place, _ in replaced] == ["primary"]
    assert len(bad.observed) == 3


# ---- shadows


@pytest.mark.parametrize("policy", [LeastLoaded, KvPolicy, RoundRobin])
def test_a_shadow_that_is_the_same_policy_always_agrees(policy: Callable[[], Policy]):
    alike = [replace(worker, running=0) for worker in WORKERS]
    policies, _ = made(policy(), shadows=[policy()])
    rng = random.Random(3)
    chosen = {policies.decide(request(f"r{i}"), alike, float(i), rng)[0].worker_id for i in range(200)}
    shadow = policies.shadows[0].status
    assert len(chosen) == 4  # chance decided, or turns
    assert shadow.seen == shadow.scored == shadow.same_worker == shadow.same_plan == 200


def test_a_shadow_is_never_obeyed_and_its_differences_add_up():
    primary, shadow = Scripted("w1"), Scripted("w2")
    primary.ttft_s, shadow.ttft_s = 0.5, 0.2
    shadow.costs = {WorkerId("w1"): {"queue": 5.0, "prefill": 2.0}, WorkerId("w2"): {"queue": 1.0, "prefill": 3.0}}
    policies, _ = made(primary, shadows=[shadow])
    for number in range(10):
        choice, trace = policies.decide(request(), WORKERS, float(number), random.Random(1))
        assert choice.worker_id == "w1"
        assert [(pick.choice.worker_id, pick.plan) for pick in trace.shadows] == [("w2", "remote")]
    status = policies.shadows[0].status
    assert (status.scored, status.same_worker) == (10, 0)
    assert (status.ttft_pairs, status.cost_pairs) == (10, 10)
    assert status.ttft_gain_s == pytest.approx(3.0)
    assert status.cost_excess == pytest.approx(30.0)


def test_a_shadow_that_raises_is_stopped_and_the_decision_stands():
    bad = Scripted()
    bad.error = RuntimeError("boom")
    policies, replaced = made(Scripted("w1"), shadows=[bad], failures_max=2)
    for number in range(5):
        assert policies.decide(request(), WORKERS, float(number), random.Random(1))[0].worker_id == "w1"
    assert [place for place, _ in replaced] == ["shadow"]
    assert policies.shadows[0].status.scored == 2


def test_shadows_that_take_too_long_are_asked_about_a_sample():
    timer = Timer()
    slow = Scripted("w2", timer, takes_s=0.004)  # within the budget
    policies, replaced = made(Scripted("w1"), shadows=[slow], timer=timer)
    picks, seconds = 4000, 20.0
    for number in range(picks):
        policies.decide(request(), WORKERS, number * seconds / picks, random.Random(1))
    status = policies.shadows[0].status
    assert not replaced
    assert status.seen == picks
    assert status.scored * 0.004 == pytest.approx(seconds * SHADOW_TIME_SHARE, rel=0.1)


def test_without_shadows_the_random_source_is_the_policys_alone():
    alike = [WORKERS[0], WORKERS[0]]
    policies, _ = made(LeastLoaded())
    plain = LeastLoaded()
    one, two = random.Random(5), random.Random(5)
    for _ in range(20):
        assert policies.pick(request(), alike, 0.0, one) == plain.pick(request(), alike, 0.0, two)
    assert one.getstate() == two.getstate()


# ---- what is seen


def test_outcomes_count_for_the_arm_that_placed_them_and_for_shadows_that_agreed():
    canary, agrees, differs = Scripted("w1"), Scripted("w1"), Scripted("w2")
    agrees.ttft_s, differs.ttft_s = 0.6, 0.1
    policies, _ = made(Scripted("w0"), canary=canary, share=1.0, shadows=[agrees, differs])
    _, trace = policies.decide(request(), WORKERS, 0.0, random.Random(1))
    note_end(trace, outcome("w1", ttft_s=0.5), plan="remote", is_error=False)
    note_end(trace, None, plan="remote", is_error=True)
    status = trace.arm.status
    assert (status.arm, status.requests, status.errors) == ("canary", 2, 1)
    assert (status.cached_tokens, status.cached_of_tokens) == (32, 64)
    assert status.ttft_s.quantile(0.5) == pytest.approx(0.5, rel=0.03)
    assert status.prediction_error.mean == pytest.approx(0.2)
    assert policies.shadows[0].status.prediction_error.mean == pytest.approx(0.2)
    assert policies.shadows[1].status.prediction_error.count == 0
    assert policies.primary.status.requests == 0


def test_quantiles_of_added_up_distributions_are_right_to_a_few_percent():
    rng = random.Random(2)
    values = [rng.lognormvariate(-3, 2) for _ in range(5000)]
    parts = [Distribution() for _ in range(3)]
    for number, value in enumerate(values):
        parts[number % 3].add(value)
    total = Distribution()
    for part in parts:
        total.merge(part)
    values.sort()
    for share in (0.01, 0.5, 0.99):
        assert total.quantile(share) == pytest.approx(values[int(share * len(values)) - 1], rel=0.04)
    assert total.mean == pytest.approx(sum(values) / len(values))
    assert Distribution().quantile(0.5) is None
