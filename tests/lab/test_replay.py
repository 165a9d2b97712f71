"""Whole runs: every request ends once, every block comes back, the same seed gives the same run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.metadata import entry_points

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.lab.measure import Summary, cached_tokens, summarize, ttft_s
from hocket.lab.replay import Replay, Replayed
from hocket.lab.run import run_all, run_one
from hocket.lab.scenario import Engine, Scenario, Slo
from hocket.lab.synthetic import synthetic
from hocket.lab.traces import Trace, TraceError
from hocket.router.policies import Choice, RequestView, WorkerView

POLICIES = sorted(entry.name for entry in entry_points(group="hocket.policies"))
SMALL = Engine(kv_blocks=400, block_tokens=32, slots=16, max_batched_tokens=512, speedup=10.0)
POISSON = "synthetic:poisson,requests=300,rate=20,prompt=900,output=60,spread=0.8"
TALKS = "synthetic:multiturn,requests=200,rate=3,prompt=300,output=50,turns=4,think=1"
SHARED = "synthetic:shared,requests=200,rate=10,prompt=200,output=30,prefixes=4,prefix=1000"


def replay(trace: Trace, scenario: Scenario) -> Replayed:
    replayed = Replay(trace, scenario).run()
    assert sorted(request.index for request in replayed.requests) == list(range(len(trace.turns)))
    for request in replayed.requests:
        assert request.end_s is not None
        if request.outcome == "ok":
            assert request.first_s is not None
            assert request.arrived_s < request.first_s <= request.end_s
    for worker in replayed.workers:
        assert worker.engine.pool.free_blocks == worker.engine.kv_blocks
        assert worker.held == 0
        assert not worker.engine.running
        assert not worker.engine.expecting
    return replayed


def figures(summary: Summary) -> Summary:
    """What does not depend on this machine."""
    return msgspec.structs.replace(summary, wall_s=0.0, rss_mib=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("prefill", "decode"), [(0, 3), (2, 2)])
def test_every_policy_brings_every_request_to_one_end(policy: str, prefill: int, decode: int):
    replayed = replay(synthetic(POISSON), Scenario(decode=decode, prefill=prefill, policy=policy, engine=SMALL))
    assert {request.outcome for request in replayed.requests} == {"ok"}
    assert replayed.policy_failures == 0


@pytest.mark.parametrize("text", [POISSON, TALKS, SHARED, POISSON.replace("poisson", "bursts")])
def test_the_same_seed_gives_the_same_run(text: str):
    scenario = Scenario(decode=2, prefill=1, policy="least_loaded", engine=SMALL, seed=5)
    first, again = (figures(run_one(synthetic(text), scenario)) for _ in range(2))
    assert first == again
    assert first != figures(run_one(synthetic(text), msgspec.structs.replace(scenario, seed=6)))


def test_runs_in_other_processes_are_the_same_runs():
    trace = synthetic(POISSON)
    scenarios = [Scenario(decode=2, policy=policy, engine=SMALL) for policy in ("kv", "round_robin")]
    told: list[tuple[int, int]] = []
    parallel = run_all(trace, scenarios, jobs=2, progress=lambda ended, total: told.append((ended, total)))
    assert [figures(s) for s in parallel] == [figures(s) for s in run_all(trace, scenarios, jobs=1)]
    assert told


def test_walking_step_by_step_gives_the_same_answers():
    trace = synthetic(TALKS)
    scenario = Scenario(decode=2, prefill=1, policy="round_robin", engine=SMALL)
    runs, walked = (
        replay(trace, msgspec.structs.replace(scenario, engine=msgspec.structs.replace(SMALL, steps_max=steps_max)))
        for steps_max in (1 << 30, 1)
    )
    assert walked.events > 2 * runs.events
    for run, walk in zip(runs.requests, walked.requests, strict=True):
        assert run.first_s == pytest.approx(walk.first_s)
        assert run.end_s == pytest.approx(walk.end_s)
        assert cached_tokens(run) == cached_tokens(walk)


def test_an_overfull_pool_refuses_and_the_clients_come_back():
    engine = msgspec.structs.replace(SMALL, slots=2)
    replayed = replay(synthetic(POISSON), Scenario(decode=1, policy="kv", engine=engine, timeout_s=3.0))
    outcomes = [request.outcome for request in replayed.requests]
    assert outcomes.count("timeout") > 0
    assert outcomes.count("ok") > 0
    assert sum(request.refusals for request in replayed.requests) > 100


def test_a_request_that_fits_no_worker_ends_as_too_long():
    trace = synthetic("synthetic:poisson,requests=3,prompt=50000,output=10")
    replayed = replay(trace, Scenario(decode=2, engine=SMALL))
    assert {request.outcome for request in replayed.requests} == {"too_long"}
    assert summarize(replayed, trace, 0).failed == 3


def test_a_turn_follows_its_answer():
    trace = synthetic(TALKS)
    replayed = replay(trace, Scenario(decode=2, engine=SMALL))
    later = [request for request in replayed.requests if request.turn.after is not None]
    assert len(later) > 100
    for request in later:
        assert request.turn.after is not None
        before = replayed.requests[request.turn.after].end_s
        assert before is not None
        assert request.arrived_s == pytest.approx(before + request.turn.think_s)


def test_a_conversation_finds_what_was_said_in_the_cache():
    """One worker with room for all: every turn but a conversation's first needs only what is new."""
    trace = synthetic(TALKS)
    engine = msgspec.structs.replace(SMALL, kv_blocks=4000, slots=64)
    summary = summarize(replay(trace, Scenario(decode=1, engine=engine)), trace, trace.ideal_hit_tokens(32))
    assert summary.hit_rate == pytest.approx(summary.ideal_hit_rate)


def test_n_clients_never_have_more_than_n_requests():
    replayed = replay(synthetic(POISSON), Scenario(decode=2, engine=SMALL, concurrency=7))
    edges = sorted([(r.arrived_s, 1) for r in replayed.requests] + [(r.end_s or 0.0, -1) for r in replayed.requests])
    held = peak = 0
    for _, change in edges:
        held += change
        peak = max(peak, held)
    assert peak == 7


def test_short_prompts_stay_with_the_decode_worker():
    trace = synthetic(POISSON)
    base = Scenario(decode=2, prefill=2, engine=SMALL)
    shares = [
        summarize(replay(trace, msgspec.structs.replace(base, local_prefill_tokens_max=most)), trace, 0).remote
        for most in (0, 600, 100_000)
    ]
    assert shares[0] == 1.0
    assert 0.2 < shares[1] < 0.8
    assert shares[2] == 0.0


@given(
    seed=st.integers(0, 10**6),
    prefill=st.integers(0, 2),
    decode=st.integers(1, 3),
    kv_blocks=st.integers(60, 200),
    slots=st.integers(1, 6),
)
@settings(max_examples=25, deadline=None)
def test_nothing_is_lost_in_a_pool_of_any_shape(seed: int, prefill: int, decode: int, kv_blocks: int, slots: int):
    """Too few blocks, too few slots, refusals, preemptions: `replay` checks that every request ends and every block is back."""
    trace = synthetic(f"synthetic:shared,requests=60,rate=30,prompt=300,output=40,spread=1,prefix=200,seed={seed}")
    engine = msgspec.structs.replace(SMALL, kv_blocks=kv_blocks, slots=slots)
    scenario = Scenario(
        decode=decode, prefill=prefill, engine=engine, prefill_slots=slots, link_gb_per_s=5.0, timeout_s=30.0, seed=seed
    )
    replay(trace, scenario)


def test_a_slower_link_costs_time_and_no_bytes():
    trace = synthetic(POISSON)
    fast, slow = (
        summarize(replay(trace, Scenario(decode=2, prefill=2, engine=SMALL, link_gb_per_s=rate)), trace, 0)
        for rate in (400.0, 4.0)
    )
    assert slow.ttft_s.p50 > fast.ttft_s.p50 + 0.03
    assert fast.remote == slow.remote == 1.0
    prompt_gb = sum(turn.prompt_tokens for turn in trace.turns) * 327_680 / 1e9
    assert fast.transfer_gb == pytest.approx(prompt_gb, rel=1e-6)


def test_one_prompt_alone_over_the_link_takes_what_the_formula_says():
    """Prefill and copy overlap but for the last layer's share; then the decode worker's first step."""
    trace = synthetic("synthetic:poisson,requests=1,prompt=1000,output=2")
    engine = Engine(max_batched_tokens=8192)
    scenario = Scenario(decode=1, prefill=1, engine=engine, link_gb_per_s=64.0)
    (request,) = replay(trace, scenario).requests
    compute_s = 0.0321058589
    copy_s = 1000 * 327_680 / 64e9
    first_layer_s = compute_s / 80
    copied_s = max(first_layer_s + copy_s, compute_s + copy_s / 80)
    decode_s = (5.74 + 54.01 * (1000 / 16384 / 64) - 25.74 * (1000 / 16384 / 64) ** 2) / 1e3
    hops_s = 3 * scenario.bus_s + scenario.queue_s + scenario.link_latency_s
    assert ttft_s(request) == pytest.approx(copied_s + decode_s + hops_s, rel=1e-9)


def test_goodput_counts_who_kept_both_limits():
    trace = synthetic(POISSON)
    base = Scenario(decode=2, engine=SMALL)
    replayed = replay(trace, base)
    median = summarize(replayed, trace, 0).ttft_s.p50
    half = replay(trace, msgspec.structs.replace(base, slo=Slo(ttft_s=median)))
    assert summarize(half, trace, 0).goodput == pytest.approx(0.5, abs=0.01)
    none = replay(trace, msgspec.structs.replace(base, slo=Slo(itl_s=1e-6)))
    assert summarize(none, trace, 0).goodput == 0.0


def test_several_routers_share_the_requests_and_each_sees_all_workers():
    trace = synthetic(SHARED)
    one, three = (
        summarize(replay(trace, Scenario(decode=3, engine=SMALL, routers=routers)), trace, 0) for routers in (1, 3)
    )
    assert three.label == "kv, 3 workers, 3 routers"
    assert three.failed == 0
    assert three.hit_rate == pytest.approx(one.hit_rate, abs=0.1)
    assert three.index_blocks_max <= 3 * SMALL.kv_blocks


class Lanes:
    """Least loaded, and the prefill worker that has most of the prompt."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        worker = min(workers, key=lambda worker: worker.load)
        lane = max(request.prefill, key=lambda prefill: (prefill.hit_blocks, -prefill.running))
        return Choice(worker.worker_id, plan="remote", lane=lane.worker_id)


def test_lanes_bring_prompts_to_where_their_prefix_is():
    trace = synthetic(SHARED.replace("prefixes=4", "prefixes=30"))
    base = Scenario(decode=2, prefill=3, policy=f"{__file__}:Lanes", engine=SMALL)
    shared = summarize(replay(trace, base), trace, 0)
    lanes = summarize(replay(trace, msgspec.structs.replace(base, lane_wait_s=0.5)), trace, 0)
    assert lanes.hit_rate > shared.hit_rate + 0.05
    assert lanes.failed == shared.failed == 0


class Wrong:
    """A user's policy with a fault."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        raise RuntimeError("oops")


def test_a_policy_that_fails_is_counted_and_costs_nothing():
    replayed = replay(synthetic(POISSON), Scenario(decode=2, engine=SMALL, policy=f"{__file__}:Wrong"))
    assert replayed.policy_failures == 300


def test_a_worker_says_how_it_is_as_often_as_a_real_one():
    """Every half second, and soon after each change."""
    replayed = replay(synthetic(POISSON), Scenario(decode=3, policy="least_loaded", engine=SMALL))
    assert replayed.messages["heartbeat"] > 3 * replayed.duration_s / 0.5 * 0.9
    assert replayed.messages["heartbeat"] < 3 * replayed.duration_s / 0.5 + 2 * 300
    assert replayed.messages["decode_job"] == replayed.messages["admitted"] == 300


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("synthetic:waves", "no kind 'waves'; there are poisson, bursts, multiturn, shared"),
        ("synthetic:poisson,rte=3", "'rte=3' is none of requests, rate"),
        ("synthetic:poisson,rate=fast", "'rate=fast' is none of"),
        ("synthetic:poisson,rate=0", "must be above 0"),
    ],
)
def test_a_synthetic_trace_that_makes_no_sense_is_refused(text: str, why: str):
    with pytest.raises(TraceError, match=why):
        synthetic(text)
