"""What `hocket top` makes of what it heard: one state in, records and lines out."""

from __future__ import annotations

import msgspec

from hocket.bus.ids import RouterId, WorkerId
from hocket.bus.messages import Goodbye, Heartbeat, LaneLoad, WorkerCard
from hocket.cluster.top_view import GONE_S, PoolState, WorkerRow, top_lines
from hocket.router.control_messages import ArmStatus, Canary, PolicyConfig, PolicyStatus, RouterLoad, WorkerLoad

P, D = WorkerId("prefill-1"), WorkerId("decode-1")
R1, R2 = RouterId("router-1"), RouterId("router-2")
SHARED = WorkerId("")


def card(worker: WorkerId, role: str, epoch: int = 1) -> WorkerCard:
    return WorkerCard(worker, role, epoch, "m", "f", block_tokens=16, kv_blocks=100, slots=8, max_model_len=1600)


def told(router: RouterId, *, kv_bytes: int = 0, index: str = "exact", drift: float | None = 0.1) -> RouterLoad:
    workers = {
        P: WorkerLoad("prefill", "exact", 0.1, prompt_tokens=400, cached_tokens=100, kv_bytes=kv_bytes),
        D: WorkerLoad("decode", index, 0.1, streams=2, drift=drift, prompt_tokens=200, cached_tokens=150),
    }
    return RouterLoad(router, 3, {SHARED: LaneLoad(1, 500), P: LaneLoad(2, 700, 1)}, workers)


def policies(router: RouterId) -> PolicyStatus:
    config = PolicyConfig("kv", Canary("cost", 0.25), ("round_robin",))
    arm = ArmStatus("primary", "kv", replaced="raised 5 times", cached_tokens=30, cached_of_tokens=40)
    return PolicyStatus(router, 4, config, [arm], [], problem="no file")


def watched() -> PoolState:
    state = PoolState("main")
    state.heard(Heartbeat(P, 1, "prefill", 1, 2, 90, prefill_tokens_per_s=5000.0), 9.0)
    state.heard(Heartbeat(D, 1, "decode", 4, 0, 70), 9.9)
    assert state.without_card() == [D, P]
    state.card(card(P, "prefill"))
    state.card(card(D, "decode"))
    assert state.without_card() == []
    state.routers_told([told(R1), told(R2)], [policies(R1), policies(R2)], 8.0)
    state.routers_told(
        [told(R1, kv_bytes=6_000_000_000), told(R2, index="catching_up", drift=0.4)], [policies(R1), policies(R2)], 10.0
    )
    return state


def row(state: PoolState, worker: WorkerId, now: float = 10.0) -> WorkerRow:
    return next(row for row in state.view(now).workers if row.worker_id == worker)


def test_a_worker_is_what_it_says_and_what_the_routers_know():
    decode, prefill = row(watched(), D), row(watched(), P)
    assert (decode.state, decode.running, decode.waiting, decode.slots, decode.streams) == ("ready", 4, 0, 8, 4)
    assert (decode.kv_blocks_used, decode.kv_blocks, decode.hit_rate) == (30, 100, 0.75)
    assert (decode.index, decode.drift) == ("catching_up", 0.4)  # The least trusting router's word.
    assert decode.index_by_router == {R1: "exact", R2: "catching_up"}
    assert decode.kv_gb_per_s is None
    assert (prefill.prefill_tokens_per_s, prefill.kv_gb_per_s, prefill.hit_rate) == (5000.0, 3.0, 0.25)


def test_a_router_shows_its_policies_its_queue_and_its_trouble():
    [one, _] = watched().view(10.0).routers
    assert (one.router_id, one.in_flight, one.waiting_jobs, one.waiting_tokens) == (R1, 3, 3, 1200)
    assert (one.version, one.policy, one.canary, one.canary_share, one.shadows) == (
        4,
        "kv",
        "cost",
        0.25,
        ("round_robin",),
    )
    assert one.hit_rate == 0.75
    assert one.problem == "no file; kv is replaced: it raised 5 times"


def test_lanes_are_added_up_over_the_routers():
    lanes = [(lane.lane, lane.jobs, lane.tokens, lane.overdue) for lane in watched().view(10.0).lanes]
    assert lanes == [("", 2, 1000, 0), (P, 4, 1400, 2)]


def test_silence_a_goodbye_and_draining_show_and_who_is_long_gone_does_not():
    state = watched()
    state.routers_told([], [], 10.0)
    assert row(state, P, 10.4).state == "ready"
    assert row(state, P, 10.6).state == "silent"
    state.heard(Heartbeat(D, 1, "decode", is_draining=True), 10.0)
    assert row(state, D).state == "draining"
    state.heard(Goodbye(D, 2), 10.0)
    assert row(state, D).state == "draining"  # Of another incarnation.
    state.heard(Goodbye(D, 1), 10.0)
    assert row(state, D).state == "left"
    assert [shown.worker_id for shown in state.view(9.5 + GONE_S).workers] == [D]
    assert state.view(10.0 + GONE_S).workers == []


def test_a_worker_that_only_a_router_knows_is_shown_and_a_new_incarnation_needs_its_card():
    state = PoolState("main")
    state.routers_told([told(R1)], [], 5.0)
    assert state.without_card() == [D, P]
    decode = row(state, D, 6.0)
    assert (decode.state, decode.heard_s, decode.running, decode.kv_blocks_used) == ("ready", 1.1, None, None)
    state.card(card(D, "decode"))
    state.heard(Heartbeat(D, 2, "decode"), 6.0)
    assert state.without_card() == [D, P]
    assert state.view(6.0).routers[0].policy is None


def test_the_lines_say_it_all_and_the_json_comes_back():
    view = watched().view(10.0)
    text = "\n".join(top_lines(view))
    assert "pool main: 2 routers, 6 in flight, 2 of 2 workers ready" in text
    for part in (
        "cost 25%",
        "round_robin",
        "any worker",
        "30/100",
        "catching_up 1/2",
        "40%",
        "3.00",
        "! router-1: no file",
    ):
        assert part in text, text
    assert len({line.index("role") for line in text.splitlines() if line.startswith("worker")}) == 1
    assert msgspec.json.decode(msgspec.json.encode(view), type=type(view)) == view


def test_an_empty_pool_has_one_line():
    assert top_lines(PoolState("main").view(0.0)) == ["pool main: 0 routers, 0 in flight, 0 of 0 workers ready"]
