"""The order of the jobs at hand: by deadline within a tenant, by weight between tenants, and nobody waits for ever."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.ids import HandoffToken, RequestId, RouterId, WorkerId
from hocket.bus.messages import PrefillJob
from hocket.workers.prefill_order import PRIORITY_MAX, JobOrder, weight_of


def job(
    tenant: str = "", *, tokens: int = 10, priority: int = 0, share: float = 1.0, deadline: float = 0.0
) -> PrefillJob:
    return PrefillJob(
        RequestId("r"), 0, RouterId("router"), bytes(4 * tokens), "m", HandoffToken(b"t" * 16), WorkerId("d"), 1, (), "f",
        deadline, tenant=tenant, share=share, priority=priority,
    )  # fmt: skip


def order_of(jobs: list[PrefillJob]) -> list[PrefillJob]:
    order: JobOrder[PrefillJob] = JobOrder()
    for one in jobs:
        order.add(one, one, one.deadline_unix_s)
    out: list[PrefillJob] = []
    while (one := order.pop()) is not None:
        out.append(one)
    assert len(order) == 0
    return out


jobs = st.builds(
    job,
    st.sampled_from("abc"),
    tokens=st.integers(1, 5000),
    priority=st.integers(-20, 20),
    share=st.floats(0, 1e6),
    deadline=st.floats(0, 1e6),
)


@given(st.lists(jobs, max_size=40))
def test_every_job_goes_once_and_within_a_flow_by_deadline(given_jobs: list[PrefillJob]):
    out = order_of(given_jobs)
    assert sorted(map(id, out)) == sorted(map(id, given_jobs))
    for flow in {(one.tenant, one.priority) for one in out}:
        deadlines = [one.deadline_unix_s for one in out if (one.tenant, one.priority) == flow]
        assert deadlines == sorted(deadlines)


@given(st.lists(jobs, max_size=40))
def test_equal_jobs_give_an_equal_order(given_jobs: list[PrefillJob]):
    assert list(map(id, order_of(given_jobs))) == list(map(id, order_of(given_jobs)))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=4), st.lists(st.integers(1, 500), min_size=30, max_size=60))
@settings(max_examples=50)
def test_tenants_that_always_wait_get_tokens_by_their_weight(shares: list[int], sizes: list[int]):
    order: JobOrder[PrefillJob] = JobOrder()
    served = [0] * len(shares)
    for number, size in enumerate(sizes):
        for tenant, share in enumerate(shares):
            one = job(str(tenant), tokens=size, share=share, deadline=number)
            order.add(one, one, one.deadline_unix_s)
    while all(any(item.tenant == str(tenant) for item in order.items()) for tenant in range(len(shares))):
        one = order.pop()
        assert one is not None
        served[int(one.tenant)] += len(one.token_ids) // 4
        for tenant, share in enumerate(shares):
            for other, other_share in enumerate(shares):
                # Goyal et al., theorem 1: between two flows that both wait, at most one job of each.
                bound = max(sizes) / share + max(sizes) / other_share
                assert abs(served[tenant] / share - served[other] / other_share) <= bound + 1e-6


@given(st.integers(1, 200), st.integers(-PRIORITY_MAX, PRIORITY_MAX))
def test_a_flood_does_not_keep_another_tenant_waiting(flood: int, priority: int):
    order: JobOrder[PrefillJob] = JobOrder()
    late = job("late", tokens=100)
    for _ in range(flood):
        one = job("flood", tokens=100, priority=priority)
        order.add(one, one, one.deadline_unix_s)
    order.pop()
    order.add(late, late, late.deadline_unix_s)
    before = 0
    while order.pop() is not late:
        before += 1
        more = job("flood", tokens=100, priority=priority)
        order.add(more, more, more.deadline_unix_s)
    assert before <= max(1.0, 2.0**priority) + 1


def test_who_was_away_has_saved_nothing_up():
    order: JobOrder[PrefillJob] = JobOrder()
    for _ in range(50):
        one = job("busy")
        order.add(one, one, one.deadline_unix_s)
    for _ in range(20):
        order.pop()
    for _ in range(5):
        one = job("back")
        order.add(one, one, one.deadline_unix_s)
    first = [order.pop() for _ in range(10)]
    assert sum(one is not None and one.tenant == "back" for one in first) in (5, 4)


def test_what_is_taken_out_costs_its_tenant_nothing():
    order: JobOrder[PrefillJob] = JobOrder()
    a, b = job("a", tokens=1000), job("b")
    order.add(a, a, a.deadline_unix_s)
    order.add(b, b, b.deadline_unix_s)
    assert order.take_out(lambda one: one is a) == [a]
    assert len(order) == 1
    order.add(a, a, a.deadline_unix_s)
    assert {order.pop() is a, order.pop() is a} == {True, False}
    assert order.pop() is None


def test_weights_are_bounded():
    assert weight_of(job(priority=1)) == 2 * weight_of(job())
    assert weight_of(job(priority=10**6)) == weight_of(job(priority=PRIORITY_MAX))
    assert weight_of(job(share=-1.0)) > 0
