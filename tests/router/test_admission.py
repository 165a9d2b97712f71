"""Admission: limits hold, what was taken is given back once, and no tenant waits for ever."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hocket.router.admission import RETRY_MAX_S, RETRY_MIN_S, Admission, AdmissionLimits, DrainRate, TenantLimits

FAR_S = math.inf
LIMITS = AdmissionLimits(
    waiting_tokens_max=1000,
    kv_blocks_max=100,
    each_tenant=TenantLimits(waiting_tokens_max=700, kv_blocks_max=80),
    tenants={"big": TenantLimits(weight=3.0), "small": TenantLimits(weight=0.5, kv_blocks_max=20)},
)
TENANTS = st.sampled_from(["big", "small", "a", "b"])


class Books(RuleBasedStateMachine):
    """What `Admission` says it holds, against a ledger kept beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(LIMITS)
        self.ledger: dict[int, list[object]] = {}
        self.now = 0.0
        self.others: dict[str, tuple[int, int]] = {}

    @rule(key=st.integers(0, 30), tenant=TENANTS, tokens=st.integers(0, 1200), blocks=st.integers(1, 120))
    def offer(self, key: int, tenant: str, tokens: int, blocks: int) -> None:
        refusal = self.admission.offer(key, tenant, (tokens, blocks), FAR_S, self.now)
        if refusal is None:
            self.ledger.setdefault(key, [tenant, tokens, blocks])
        else:
            assert key not in self.ledger
            assert refusal.reason == "too_large" or RETRY_MIN_S <= refusal.retry_after_s <= RETRY_MAX_S

    @rule(key=st.integers(0, 30))
    def computed(self, key: int) -> None:
        self.admission.waits(key, 0, self.now)
        if key in self.ledger:
            self.ledger[key][1] = 0

    @rule(key=st.integers(0, 30))
    def release(self, key: int) -> None:
        assert self.admission.release(key, self.now) == (self.ledger.pop(key, None) is not None)
        assert not self.admission.release(key, self.now)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def it_holds_what_was_let_in_and_no_more_than_the_limits(self) -> None:
        sums: dict[str, tuple[int, int]] = {}
        for tenant, tokens, blocks in self.ledger.values():
            assert isinstance(tenant, str) and isinstance(tokens, int) and isinstance(blocks, int)  # noqa: PT018  # For mypy.
            before = sums.get(tenant, (0, 0))
            sums[tenant] = before[0] + tokens, before[1] + blocks
        assert self.admission.tenants() == {tenant: pair for tenant, pair in sums.items() if pair != (0, 0)}
        total = self.admission.total()
        assert total[0] <= LIMITS.waiting_tokens_max
        assert total[1] <= LIMITS.kv_blocks_max
        for tenant, pair in sums.items():
            mine = LIMITS.of(tenant)
            assert pair[0] <= (mine.waiting_tokens_max or pair[0])
            assert pair[1] <= (mine.kv_blocks_max or pair[1])


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_a_tenant_that_is_refused_gets_its_turn_however_hard_another_pushes(flood_blocks: int, need: int, seed: int):
    """The flood offers at every step and its requests end at random; the other one comes back as it was told to."""
    rng = random.Random(seed)
    admission = Admission(AdmissionLimits(kv_blocks_max=100))
    now, key, running = 0.0, 0, list[int]()
    next_try_s, offers = 5.0, 0
    while True:
        now += 0.1
        for done in [one for one in running if rng.random() < 0.05]:
            running.remove(done)
            admission.release(done, now)
        if now >= next_try_s:
            refusal = admission.offer(-1, "quiet", (0, need), FAR_S, now)
            if refusal is None:
                break
            offers += 1
            next_try_s = now + refusal.retry_after_s
        while admission.offer(key, "flood", (0, flood_blocks), FAR_S, now) is None:
            running.append(key)
            key += 1
        assert now < 120, f"refused {offers} times"


def held_under_pressure(limits: AdmissionLimits, tenants: list[str]) -> dict[str, float]:
    """Mean blocks of each tenant while all of them always want more."""
    rng = random.Random(1)
    admission = Admission(limits)
    now, key, running = 0.0, 0, list[int]()
    sums = dict.fromkeys(tenants, 0.0)
    for step in range(3000):
        now += 0.1
        for done in [one for one in running if rng.random() < 0.05]:
            running.remove(done)
            admission.release(done, now)
        for tenant in rng.sample(tenants, len(tenants)):
            while admission.offer(key, tenant, (0, 2), FAR_S, now) is None:
                running.append(key)
                key += 1
        if step > 500:
            for tenant in tenants:
                sums[tenant] += admission.held(tenant)[1] / 2499
    return sums


def test_under_pressure_tenants_hold_blocks_by_their_weight():
    limits = AdmissionLimits(kv_blocks_max=200, tenants={"a": TenantLimits(weight=3.0)})
    held = held_under_pressure(limits, ["a", "b", "c"])
    assert sum(held.values()) > 180
    assert held["a"] == pytest.approx(120, rel=0.1)
    assert held["b"] == pytest.approx(40, rel=0.15)
    assert held["c"] == pytest.approx(40, rel=0.15)


def test_one_tenant_may_use_all_of_an_idle_cluster():
    admission = Admission(AdmissionLimits(kv_blocks_max=100))
    assert all(admission.offer(key, "a", (0, 10), FAR_S, 0.0) is None for key in range(10))
    refusal = admission.offer(10, "a", (0, 10), FAR_S, 0.0)
    assert refusal is not None
    assert refusal.reason == "overloaded"


def test_what_other_routers_hold_counts():
    admission = Admission(AdmissionLimits(kv_blocks_max=100))
    admission.others = {"b": (0, 95)}
    refusal = admission.offer(1, "a", (0, 10), FAR_S, 0.0)
    assert refusal is not None
    admission.others = {}
    assert admission.offer(1, "a", (0, 10), FAR_S, 0.0) is None


def test_a_request_that_cannot_start_before_its_deadline_is_refused_at_once():
    admission = Admission(prefill_tokens_per_s=1000.0)
    assert admission.offer(1, "a", (5000, 1), 2.0, 0.0) is None  # Nobody is before it.
    assert admission.offer(2, "a", (10, 1), 5.5, 0.0) is None
    refusal = admission.offer(3, "a", (10, 1), 4.0, 0.0)
    assert refusal is not None
    assert refusal.reason == "deadline"
    admission.waits(1, 1000, 1.0)  # The rest is cached where it went.
    assert admission.total()[0] == 1010
    assert admission.offer(3, "a", (10, 1), 4.0, 1.0) is None


def test_a_pool_that_is_seen_to_be_faster_than_its_prefill_workers_say_refuses_less():
    admission = Admission(prefill_tokens_per_s=1.0)  # Their hand-offs failed, and decode workers compute the prompts.
    for second in range(20):
        assert admission.offer(second, "a", (1000, 1), FAR_S, float(second)) is None
        admission.waits(second, 0, second + 0.5)
    assert admission.offer(20, "a", (2000, 1), FAR_S, 20.0) is None
    assert admission.offer(21, "a", (10, 1), 25.0, 20.0) is None
    assert admission.offer(22, "a", (10, 1), 21.0, 20.0) is not None


def test_what_would_wait_too_long_is_refused_though_there_is_time():
    admission = Admission(AdmissionLimits(wait_max_s=2.0), prefill_tokens_per_s=1000.0)
    assert admission.offer(1, "a", (5000, 1), FAR_S, 0.0) is None
    refusal = admission.offer(2, "a", (10, 1), FAR_S, 0.0)
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == ("overloaded", pytest.approx(3.0))


def test_retry_after_is_what_the_drain_rate_says():
    admission = Admission(AdmissionLimits(kv_blocks_max=1000))
    for key in range(100):
        admission.offer(key, "a", (0, 10), FAR_S, 0.0)
    for second in range(1, 41):  # 10 blocks a second
        admission.release(second, float(second))
        admission.offer(1000 + second, "a", (0, 10), FAR_S, float(second))
    refusal = admission.offer(5000, "a", (0, 100), FAR_S, 40.0)
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(10.0, rel=0.1)


@given(st.floats(0.01, 1e4), st.integers(20, 200))
def test_the_drain_rate_of_a_steady_drain_is_its_rate(per_s: float, seconds: int):
    rate = DrainRate()
    assert rate.per_s(5.0) == 0.0
    for second in range(seconds):
        rate.add(per_s, float(second))
    assert rate.per_s(float(seconds)) == pytest.approx(per_s, rel=0.12)


def test_limits_that_change_count_from_the_next_offer():
    admission = Admission()
    for key in range(10):
        assert admission.offer(key, "a", (0, 10), FAR_S, 0.0) is None
    admission.limits = AdmissionLimits(kv_blocks_max=50)
    assert admission.offer(20, "a", (0, 1), FAR_S, 0.0) is not None
    for key in range(6):
        admission.release(key, 1.0)
    assert admission.offer(20, "a", (0, 1), FAR_S, 2.0) is None
