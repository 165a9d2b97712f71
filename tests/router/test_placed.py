"""What waits in the lanes, and what other routers hold: plain sums that forget in time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hocket.bus.ids import RouterId, WorkerId
from hocket.bus.messages import LaneLoad, PlacedLoad
from hocket.router.placed import SHARED, SILENT_S, OtherRouters, PlacedJobs

A, B = WorkerId("prefill-a"), WorkerId("prefill-b")
D, E = WorkerId("decode-d"), WorkerId("decode-e")
R1, R2 = RouterId("r1"), RouterId("r2")


def jobs() -> PlacedJobs:
    placed = PlacedJobs(lane_wait_s=0.5)
    placed.waits(1, A, 100, 10.0, fingerprint="f", ranks=2)
    placed.waits(2, A, 50, 10.4, fingerprint="f", ranks=2)
    placed.waits(3, None, 7, 10.0, fingerprint="f", ranks=2)
    return placed


def test_a_job_is_overdue_after_its_wait_and_never_in_the_shared_lane():
    placed = jobs()
    assert placed.loads(10.45, lambda worker: True) == {
        A: LaneLoad(2, 150, 0, "f", 2),
        SHARED: LaneLoad(1, 7, 0, "f", 2),
    }
    assert placed.loads(10.6, lambda worker: True)[A].overdue == 1
    assert placed.loads(60.0, lambda worker: True)[SHARED].overdue == 0


def test_where_the_lanes_worker_cannot_take_it_a_job_is_overdue_at_once():
    assert jobs().loads(10.4, lambda worker: worker != A)[A].overdue == 2


def test_a_claimed_job_waits_no_more_and_one_that_came_back_has_waited_enough():
    placed = jobs()
    assert placed.sync(1, is_open=True, is_unclaimed=False)
    assert not placed.sync(1, is_open=True, is_unclaimed=False)
    assert placed.loads(10.4, lambda worker: True)[A] == LaneLoad(1, 50, 0, "f", 2)
    assert placed.sync(1, is_open=True, is_unclaimed=True)
    assert placed.loads(10.4, lambda worker: True)[A] == LaneLoad(2, 150, 1, "f", 2)
    assert placed.sync(1, is_open=False, is_unclaimed=False)
    assert not placed.sync(1, is_open=True, is_unclaimed=True)
    assert len(placed) == 2


loads = st.builds(
    PlacedLoad,
    st.sampled_from([R1, R2, RouterId("r3")]),
    st.dictionaries(st.sampled_from([D, E]), st.tuples(st.integers(0, 9), st.integers(0, 99))),
    st.dictionaries(st.sampled_from([A, B, SHARED]), st.builds(LaneLoad, st.integers(0, 9), st.integers(0, 99))),
    st.dictionaries(st.sampled_from(["t", "u"]), st.tuples(st.integers(0, 9), st.integers(0, 99))),
    st.booleans(),
)


@given(st.lists(st.tuples(loads, st.floats(0, 1.5)), max_size=30))
def test_the_sums_are_those_of_each_routers_last_word(said: list[tuple[PlacedLoad, float]]):
    others, last, now = OtherRouters(), dict[RouterId, tuple[PlacedLoad, float]](), 0.0
    known = {D: (0, 0), E: (0, 0)}
    for placed, wait_s in said:
        now += wait_s
        changed = others.expire(now) | others.heard(placed, now)
        last[placed.router_id] = placed, now
        live = [one for one, seen_s in last.values() if now - seen_s <= SILENT_S and not one.has_left]
        assert len(others) == len(live)
        for worker in (D, E):
            pairs = [one.decode.get(worker, (0, 0)) for one in live]
            right = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
            assert others.decode(worker) == right
            if right != known[worker]:
                assert worker in changed  # Or the view would keep an old sum.
            known[worker] = right
        for lane in (A, B, SHARED):
            lanes = [one.lanes[lane] for one in live if lane in one.lanes]
            assert others.waiting().get(lane, 0) == sum(load.tokens for load in lanes)
        for tenant in ("t", "u"):
            pairs = [one.tenants.get(tenant, (0, 0)) for one in live]
            right = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
            assert others.tenants().get(tenant, (0, 0)) == right
