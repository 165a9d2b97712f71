"""Lanes of the prefill queue with real workers: whose a job is, who may take it, and what waits for a slot."""

from __future__ import annotations

import asyncio

from scripted_router import ScriptedRouter, Stream
from workers_rig import Cluster, prompt_of, right_answer

from hocket.bus import subjects
from hocket.bus.ids import WorkerId
from hocket.bus.messages import DecodeJob, PrefillClaimed, PrefillReturned, SamplingParams, WorkerCard

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)
SLOW = {"sim_prefill_ms_per_token": 2.0, "slots": 1}


def claims(router: ScriptedRouter) -> list[PrefillClaimed]:
    return [event for event in router.events if isinstance(event, PrefillClaimed)]


def claimed_by(router: ScriptedRouter, job: DecodeJob) -> list[WorkerId]:
    return [claim.worker_id for claim in claims(router) if claim.request_id == job.request_id]


async def ended(*streams: Stream) -> None:
    async with asyncio.timeout(20):
        for stream in streams:
            await stream.ended.wait()


async def until_claimed(router: ScriptedRouter, count: int) -> None:
    async with asyncio.timeout(10):
        while len(claims(router)) < count:
            await asyncio.sleep(0.005)


def lane(cluster: Cluster, card: WorkerCard) -> str:
    return subjects.prefill_lane(cluster.pool, card.worker_id)


async def test_a_job_in_a_lane_is_its_workers(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=32)
    cards = [(await cluster.worker("prefill"))[1] for _ in range(3)]
    begun = [
        (card, prompt_of(50, seed), await router.begin(decode, prompt_of(50, seed), GREEDY, lane(cluster, card)))
        for seed, card in enumerate(cards * 4)
    ]
    await ended(*(stream for _, _, (_, stream) in begun))
    for card, prompt, (job, stream) in begun:
        assert claimed_by(router, job) == [card.worker_id]
        assert stream.token_ids == right_answer(prompt, GREEDY)


async def test_a_busy_worker_leaves_the_shared_lane_to_idle_ones(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=32)
    cards = [(await cluster.worker("prefill", **SLOW))[1] for _ in range(3)]
    begun = []
    for seed in range(3):
        begun.append(await router.begin(decode, prompt_of(200, seed), GREEDY))
        await until_claimed(router, seed + 1)
    assert {claim.worker_id for claim in claims(router)} == {card.worker_id for card in cards}
    assert {claim.delivery for claim in claims(router)} == {1}
    await ended(*(stream for _, stream in begun))


async def test_a_job_of_a_busy_workers_lane_is_taken_once_it_is_overdue(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=32)
    _, busy = await cluster.worker("prefill", **SLOW)
    _, idle = await cluster.worker("prefill", **SLOW)
    _, long = await router.begin(decode, prompt_of(500, 1), GREEDY, lane(cluster, busy))
    await until_claimed(router, 1)
    waiting = [await router.begin(decode, prompt_of(20, seed), GREEDY, lane(cluster, busy)) for seed in (2, 3)]
    async with asyncio.timeout(10):
        while not (await_taken := [claimed_by(router, job) for job, _ in waiting])[0]:
            assert not long.ended.is_set()
            router.say_overdue(decode, busy.worker_id, 1)
            await asyncio.sleep(0.05)
    assert await_taken[0] == [idle.worker_id]
    await ended(long, *(stream for _, stream in waiting))
    assert all(len(claimed_by(router, job)) == 1 for job, _ in waiting)


async def test_a_lane_is_left_to_its_worker_until_somebody_says_otherwise(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=32)
    _, busy = await cluster.worker("prefill", **SLOW)
    await cluster.worker("prefill", **SLOW)
    _, long = await router.begin(decode, prompt_of(300, 1), GREEDY, lane(cluster, busy))
    await until_claimed(router, 1)
    job, stream = await router.begin(decode, prompt_of(20, 2), GREEDY, lane(cluster, busy))
    await ended(long, stream)
    assert claimed_by(router, job) == [busy.worker_id]


async def test_the_jobs_of_a_lane_whose_worker_is_gone_are_done_by_others(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=32)
    _, other = await cluster.worker("prefill")
    gone = WorkerId("prefill-gone")
    subject = subjects.prefill_lane(cluster.pool, gone)
    begun = [await router.begin(decode, prompt_of(30, seed), GREEDY, subject) for seed in range(20)]
    router.say_overdue(decode, gone, len(begun))
    await ended(*(stream for _, stream in begun))
    assert {claim.worker_id for claim in claims(router)} == {other.worker_id}


async def test_an_urgent_job_overtakes_a_long_queue(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=64, kv_blocks=2000)
    await cluster.worker("prefill", **SLOW)
    _, gate = await router.begin(decode, prompt_of(800, 1), GREEDY)
    await until_claimed(router, 1)
    queue = [await router.begin(decode, prompt_of(50, seed), GREEDY) for seed in range(10)]
    urgent, stream = await router.begin(
        decode, prompt_of(50, 99), GREEDY, subjects.prefill_jobs(cluster.pool, "hi"), priority=3
    )
    assert not gate.ended.is_set()
    await ended(stream)
    assert sum(stream.ended.is_set() for _, stream in queue) <= 4
    await ended(*(stream for _, stream in queue))
    assert len(claimed_by(router, urgent)) == 1


async def test_a_tenant_that_had_less_goes_first_among_those_that_wait(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=64, kv_blocks=2000)
    await cluster.worker("prefill", slots=4, sim_prefill_ms_per_token=2.0)
    gates = [await router.begin(decode, prompt_of(400 + 100 * n, n), GREEDY, tenant="flood") for n in range(4)]
    await until_claimed(router, 4)
    flood = [await router.begin(decode, prompt_of(300, 10 + seed), GREEDY, tenant="flood") for seed in range(4)]
    _, small = await router.begin(decode, prompt_of(300, 99), GREEDY, tenant="small")
    assert not any(stream.ended.is_set() for _, stream in gates)
    await ended(small)
    assert sum(stream.ended.is_set() for _, stream in flood) <= 2  # As they came it would be 3 or 4.
    await ended(*(stream for _, stream in flood))


async def test_jobs_held_for_long_are_given_back_once_and_done_once(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=64, kv_blocks=2000)
    await cluster.worker("prefill", slots=2, sim_prefill_ms_per_token=5.0)
    begun = [await router.begin(decode, prompt_of(300, seed), GREEDY) for seed in range(6)]  # 1.5 s each
    await ended(*(stream for _, stream in begun))
    returned = [event.request_id for event in router.events if isinstance(event, PrefillReturned)]
    assert returned
    assert len(returned) == len(set(returned))
    for seed, (_, stream) in enumerate(begun):
        assert stream.token_ids == right_answer(prompt_of(300, seed), GREEDY)


async def test_a_worker_that_drains_gives_back_what_waits_for_a_slot(cluster: Cluster):
    router = cluster.router
    _, decode = await cluster.worker("decode", slots=64, kv_blocks=2000)
    first, card = await cluster.worker("prefill", **SLOW)
    begun = [await router.begin(decode, prompt_of(500, seed), GREEDY) for seed in range(4)]
    await until_claimed(router, 3)  # One is done, one runs, one waits for its slot.
    first.stop.set()
    await router.wait_for(PrefillReturned)
    await cluster.worker("prefill", **SLOW)
    await ended(*(stream for _, stream in begun))
    last = [claimed_by(router, job)[-1] for job, _ in begun]
    assert last.count(card.worker_id) == 2
