"""Prefill and decode workers on one bus: every answer is right and nothing is left, whatever happens on the way."""

from __future__ import annotations

import asyncio
import os

import pytest
from scripted_router import heartbeats
from workers_rig import Cluster, prompt_of, right_answer

from hocket.bus import subjects
from hocket.bus.ids import RequestId
from hocket.bus.messages import (
    FINISH_ERROR,
    FINISH_LENGTH,
    Admitted,
    BlockStored,
    Cancel,
    FinishAck,
    Goodbye,
    Heartbeat,
    KvSnapshot,
    KvSnapshotRequest,
    Ping,
    PrefillClaimed,
    PrefillDone,
    PrefillFailed,
    Refused,
    ReplayRequest,
    SamplingParams,
    Unknown,
    decode,
    decode_frame,
    encode,
    unpack_tokens,
)

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
LONG = SamplingParams(max_tokens=400, temperature=0.0)
SLOW = {"sim_itl_ms": 3.0, "sim_prefill_ms_per_token": 1.0}


async def test_a_prompt_computed_elsewhere_is_answered_exactly(cluster: Cluster):
    decode_card = await cluster.pair()
    prompt = prompt_of(100, 1)
    job, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    async with asyncio.timeout(5):
        await stream.ended.wait()
    assert stream.token_ids == right_answer(prompt, GREEDY)
    assert stream.finish == FINISH_LENGTH
    assert stream.details[0].computed_tokens == 1
    claimed = await cluster.router.wait_for(PrefillClaimed)
    done = await cluster.router.wait_for(PrefillDone)
    assert (claimed.request_id, claimed.delivery) == (job.request_id, 1)
    assert (done.computed_tokens, done.cached_tokens, done.kv_bytes) == (100, 0, 13 * 3 * 64)


async def test_a_request_that_is_cancelled_before_it_begins_leaves_no_slot(cluster: Cluster):
    """As when a paused worker goes on and finds the job and its cancel together."""
    _, card = await cluster.worker("decode", slots=1)
    router, prompt = cluster.router, prompt_of(20, 1)
    for _ in range(2):  # As many as it holds.
        job = router.job(card, prompt, GREEDY)
        router.bus.publish_nowait(subjects.decode_jobs(cluster.pool, card.worker_id), encode(job))
        router.cancel(job)
    job = router.job(card, prompt, GREEDY)
    async with asyncio.timeout(5):
        while not isinstance(await router.ask(card, job), Admitted):
            pass
        await router.streams[job.stream_id].ended.wait()
    assert router.streams[job.stream_id].token_ids == right_answer(prompt, GREEDY)


@pytest.mark.parametrize("transports", ["inproc", "tcp", "ucx,tcp"])
async def test_two_hundred_requests_at_once_are_all_right(cluster: Cluster, transports: str):
    for role in ("prefill", "prefill", "decode", "decode"):
        await cluster.worker(role, transports=transports, slots=24, kv_blocks=1024, sim_itl_ms=0.5)
    cards = [await member.card() for member in cluster.members if member.engine.endpoint.addresses]
    shared = prompt_of(64, 0)
    prompts = [shared[: 8 * (i % 9)] + prompt_of(1 + i % 90, i) for i in range(200)]
    gates = [asyncio.Semaphore(24) for _ in cards]

    async def one(number: int) -> None:
        async with gates[number % 2]:
            answer = await cluster.router.answer(cards[number % 2], prompts[number], GREEDY)
        assert answer == right_answer(prompts[number], GREEDY)

    async with asyncio.TaskGroup() as tasks:
        for number in range(200):
            tasks.create_task(one(number))


async def test_a_local_prompt_needs_no_prefill_worker(cluster: Cluster):
    _, card = await cluster.worker("decode")
    job = cluster.router.job(card, prompt_of(30, 2), GREEDY)
    assert isinstance(await cluster.router.ask(card, job), Admitted)
    stream = cluster.router.streams[job.stream_id]
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt_of(30, 2), GREEDY)
    assert stream.details[0].computed_tokens == 30


# Cancel.


async def test_a_cancel_that_overtakes_its_jobs_stops_both(cluster: Cluster):
    decode_card = await cluster.pair()
    job = cluster.router.job(decode_card, prompt_of(50, 1), GREEDY, token=os.urandom(16))
    cluster.router.cancel(job)
    answer = await cluster.router.ask(decode_card, job)
    assert isinstance(answer, Refused)
    assert answer.reason == "stale"
    await cluster.router.publish(cluster.router.prefill_job(decode_card, job))
    other = await cluster.router.answer(decode_card, prompt_of(60, 2), GREEDY)
    assert other == right_answer(prompt_of(60, 2), GREEDY)
    claims = [event for event in cluster.router.events if isinstance(event, PrefillClaimed)]
    assert job.request_id not in [claim.request_id for claim in claims]


@pytest.mark.parametrize("at", ["computing", "decoding", "ended"])
async def test_a_cancel_frees_everything_wherever_the_request_is(cluster: Cluster, at: str):
    decode_card = await cluster.pair(**SLOW)
    job, stream = await cluster.router.begin(decode_card, prompt_of(100, 1), LONG if at != "ended" else GREEDY)
    if at == "computing":
        await cluster.router.wait_for(PrefillClaimed)
    elif at == "decoding":
        await asyncio.wait_for(stream.first.wait(), 5)
    else:
        await asyncio.wait_for(stream.ended.wait(), 5)
    cluster.router.cancel(job)
    cluster.router.cancel(job)
    await cluster.settled()
    assert stream.ended.is_set() == (at == "ended")
    assert not [event for event in cluster.router.events if isinstance(event, PrefillFailed)]


async def test_a_newer_attempt_replaces_the_running_one(cluster: Cluster):
    decode_card = await cluster.pair(**SLOW)
    prompt = prompt_of(100, 1)
    job, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    await cluster.router.wait_for(PrefillClaimed)
    again = cluster.router.job(
        decode_card, prompt, GREEDY, request_id=job.request_id, stream_id=job.stream_id, attempt=2
    )
    assert isinstance(await cluster.router.ask(decode_card, again), Admitted)
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    late = await cluster.router.ask(decode_card, job)
    assert isinstance(late, Refused)
    assert late.reason == "stale"


# Refused.


async def test_what_a_decode_worker_refuses(cluster: Cluster):
    _, card = await cluster.worker("decode", max_model_len=64)
    router = cluster.router

    async def reason(**changes: object) -> str:
        answer = await router.ask(card, router.job(card, prompt_of(10, 1), GREEDY, **changes))
        assert isinstance(answer, Refused)
        return answer.reason

    assert await reason(epoch=card.epoch + 1) == "wrong_worker"
    assert await reason(fingerprint="0" * 32) == "wrong_worker"
    assert await reason(model="another") == "wrong_worker"
    assert await reason(token_ids=b"123") == "bad_job"
    assert await reason(token_ids=b"") == "bad_job"
    assert await reason(router_id="no.router") == "bad_job"
    assert await reason(token_ids=bytes(4 * 64)) == "too_long"
    assert await reason(time_left_s=0.0) == "stale"
    garbage = await router.bus.request(subjects.decode_jobs(cluster.pool, card.worker_id), b"\xc1", timeout_s=2.0)
    refused = decode(garbage)
    assert isinstance(refused, Refused)
    assert refused.reason == "bad_job"


async def test_a_full_worker_is_busy_until_a_slot_is_free(cluster: Cluster):
    _, card = await cluster.worker("decode", slots=2, sim_itl_ms=3.0)
    jobs = [cluster.router.job(card, prompt_of(10, i), LONG) for i in range(4)]
    answers = [await cluster.router.ask(card, job) for job in jobs]
    assert [type(answer) for answer in answers] == [Admitted, Admitted, Admitted, Refused]
    assert isinstance(answers[-1], Refused)
    assert (answers[-1].reason, answers[-1].retry_after_s > 0) == ("busy", True)
    for job in jobs:
        cluster.router.cancel(job)
    await cluster.settled()
    assert await cluster.router.ask(card, cluster.router.job(card, prompt_of(10, 9), GREEDY)) is not None


async def test_an_admitted_request_past_its_deadline_ends_with_an_error(cluster: Cluster):
    _, card = await cluster.worker("decode", sim_itl_ms=5.0)
    job = cluster.router.job(card, prompt_of(10, 1), LONG, time_left_s=0.1)
    assert isinstance(await cluster.router.ask(card, job), Admitted)
    stream = cluster.router.streams[job.stream_id]
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.finish == FINISH_ERROR
    assert stream.details[-1].error_code == "timeout"


# Duplicates, redelivery, fencing.


async def test_a_decode_job_that_comes_twice_runs_once(cluster: Cluster):
    _, card = await cluster.worker("decode", sim_itl_ms=2.0)
    job = cluster.router.job(card, prompt_of(10, 1), GREEDY)
    first, second = await cluster.router.ask(card, job), await cluster.router.ask(card, job)
    assert first == second == Admitted(job.request_id, 1)
    assert cluster.members[0].engine.load().running == 1
    stream = cluster.router.streams[job.stream_id]
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt_of(10, 1), GREEDY)
    assert await cluster.router.ask(card, job) == first
    assert cluster.members[0].engine.load().running == 0


async def test_a_prefill_job_delivered_twice_at_once_is_computed_once(cluster: Cluster):
    decode_card = await cluster.pair(**SLOW)
    prompt = prompt_of(80, 1)
    job = cluster.router.job(decode_card, prompt, GREEDY, token=os.urandom(16))
    await cluster.router.ask(decode_card, job)
    prefill = cluster.router.prefill_job(decode_card, job)
    payload = encode(prefill)
    for copy in range(2):
        subject = subjects.prefill_jobs(cluster.pool)
        await cluster.router.bus.jobs.publish(subject, payload, job_id=f"{job.request_id}.{copy}", ttl_s=30.0)
    stream = cluster.router.streams[job.stream_id]
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    await cluster.router.wait_for(PrefillDone)
    assert len([event for event in cluster.router.events if isinstance(event, PrefillClaimed)]) == 1


async def test_a_prefill_worker_that_dies_mid_transfer_is_replaced_and_the_answer_is_right(cluster: Cluster):
    first, _ = await cluster.worker("prefill", **SLOW)
    _, decode_card = await cluster.worker("decode", **SLOW)
    prompt = prompt_of(300, 1)
    _, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    decode_engine = cluster.members[1].engine
    async with asyncio.timeout(5):
        while not decode_engine.endpoint.stats.kv_bytes_received:
            await asyncio.sleep(0.005)
    await cluster.worker("prefill", **SLOW)
    first.task.cancel()
    await asyncio.wait_for(stream.ended.wait(), 10)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    assert stream.details[0].computed_tokens == 1
    claims = [event for event in cluster.router.events if isinstance(event, PrefillClaimed)]
    assert [claim.delivery for claim in claims] == [1, 2]
    assert claims[0].worker_id != claims[1].worker_id


async def test_a_link_that_is_cut_mid_transfer_costs_no_answer(cluster: Cluster):
    decode_card = await cluster.pair(**SLOW)
    prompt = prompt_of(200, 1)
    _, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    async with asyncio.timeout(5):
        while not cluster.members[1].engine.endpoint.stats.kv_bytes_received:
            await asyncio.sleep(0.005)
    cluster.faults.cut()
    await asyncio.wait_for(stream.ended.wait(), 10)
    assert stream.token_ids == right_answer(prompt, GREEDY)


async def test_a_job_whose_decode_worker_refuses_its_token_is_told_and_removed(cluster: Cluster):
    decode_card = await cluster.pair()
    job = cluster.router.job(decode_card, prompt_of(20, 1), GREEDY, token=os.urandom(16))
    sequence = await cluster.router.publish(
        cluster.router.prefill_job(decode_card, job, decode_epoch=decode_card.epoch + 1)
    )
    failed = await cluster.router.wait_for(PrefillFailed)
    assert (failed.request_id, failed.reason, failed.detail) == (job.request_id, "refused", "refused:wrong_epoch")
    assert not await cluster.router.bus.jobs.delete(sequence)


async def test_jobs_that_nobody_can_do_are_removed_and_told(cluster: Cluster):
    decode_card = await cluster.pair(max_model_len=64)
    router = cluster.router
    expired = router.job(decode_card, prompt_of(5, 1), GREEDY, token=os.urandom(16))
    await router.publish(router.prefill_job(decode_card, expired, time_left_s=-1.0))
    too_long = router.job(decode_card, prompt_of(100, 1), GREEDY, token=os.urandom(16))
    await router.publish(router.prefill_job(decode_card, too_long))
    async with asyncio.timeout(5):
        while len(failures := [event for event in router.events if isinstance(event, PrefillFailed)]) < 2:
            await asyncio.sleep(0.01)
    assert {(event.request_id, event.reason) for event in failures} == {
        (expired.request_id, "expired"),
        (too_long.request_id, "bad_job"),
    }


async def test_a_job_of_another_fingerprint_is_left_to_who_can_do_it(cluster: Cluster):
    await cluster.worker("prefill", sim_layers=2, slots=1)
    _, decode_card = await cluster.worker("decode")
    prompt = prompt_of(40, 1)
    _, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    async with asyncio.timeout(5):
        await asyncio.sleep(0.1)  # The wrong worker has had its try.
        _, fitting = await cluster.worker("prefill")
        await stream.ended.wait()
    assert stream.token_ids == right_answer(prompt, GREEDY)
    claim = await cluster.router.wait_for(PrefillClaimed)
    assert claim.worker_id == fitting.worker_id


async def test_a_direct_prefill_job_needs_no_queue(cluster: Cluster):
    _, prefill_card = await cluster.worker("prefill")
    _, decode_card = await cluster.worker("decode")
    prompt = prompt_of(40, 1)
    job = cluster.router.job(decode_card, prompt, GREEDY, token=os.urandom(16))
    await cluster.router.ask(decode_card, job)
    direct = subjects.prefill_direct(cluster.pool, prefill_card.worker_id)
    payload = encode(cluster.router.prefill_job(decode_card, job))
    assert decode(await cluster.router.bus.request(direct, payload, timeout_s=2.0)) == Admitted(job.request_id, 1)
    stream = cluster.router.streams[job.stream_id]
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    assert stream.details[0].computed_tokens == 1
    wrong = encode(cluster.router.prefill_job(decode_card, job, fingerprint="0" * 32))
    refused = decode(await cluster.router.bus.request(direct, wrong, timeout_s=2.0))
    assert isinstance(refused, Refused)
    assert refused.reason == "wrong_worker"


# What routers ask.


async def test_lost_frames_come_again_by_replay(cluster: Cluster):
    _, card = await cluster.worker("decode")
    router = cluster.router
    router.drops_frames = True
    prompt = prompt_of(20, 1)
    job = router.job(card, prompt, GREEDY)
    await router.ask(card, job)
    async with asyncio.timeout(5):
        while cluster.members[0].engine.load().running or not router.frames:
            await asyncio.sleep(0.005)
    question = ReplayRequest(router.router_id, job.request_id, job.stream_id, 1, 5)
    frame = decode_frame(await router.control(card, question))
    replayed = [token_id for _, _, _, token_ids, _ in frame.entries for token_id in token_ids]
    assert frame.entries[0][2] == 5
    assert replayed == right_answer(prompt, GREEDY)[5:]
    assert frame.entries[-1][4] == FINISH_LENGTH
    router.bus.publish_nowait(
        subjects.control(cluster.pool, card.worker_id), encode(FinishAck(router.router_id, [(job.stream_id, 1)]))
    )
    answer = decode(await router.control(card, question))
    assert answer == Unknown(job.request_id)


async def test_a_ping_is_answered_with_a_heartbeat(cluster: Cluster):
    _, card = await cluster.worker("decode")
    beat = decode(await cluster.router.control(card, Ping()))
    assert isinstance(beat, Heartbeat)
    assert (beat.worker_id, beat.epoch, beat.role, beat.running) == (card.worker_id, card.epoch, "decode", 0)
    assert beat.kv_blocks_free == card.kv_blocks


async def test_kv_events_count_without_a_gap_and_a_snapshot_agrees_with_them(cluster: Cluster):
    decode_card = await cluster.pair()
    for seed in range(3):
        await cluster.router.answer(decode_card, prompt_of(50, seed), GREEDY)
    snapshot = decode(await cluster.router.control(decode_card, KvSnapshotRequest()))
    assert isinstance(snapshot, KvSnapshot)
    events = [message for message in cluster.router.kv_events if message.worker_id == decode_card.worker_id]
    assert [message.seq for message in events] == list(range(1, snapshot.seq + 1))
    stored = [
        block_hash
        for message in events
        for event in message.events
        if isinstance(event, BlockStored)
        for block_hash in event.hashes
    ]
    assert b"".join(block_hash.to_bytes(8, "little") for block_hash in stored) == snapshot.hashes
    assert len(stored) == 3 * (69 // 8)


async def test_a_change_of_load_is_told_before_the_next_heartbeat_is_due(cluster: Cluster):
    _, card = await cluster.worker("decode", sim_itl_ms=3.0, heartbeat_s=30.0)
    job = cluster.router.job(card, prompt_of(10, 1), LONG)
    await cluster.router.ask(card, job)
    async with asyncio.timeout(2):
        while not any(beat.running for beat in heartbeats(cluster.router, card)):
            await asyncio.sleep(0.01)
    cluster.router.cancel(job)


async def test_messages_that_are_none_change_nothing(cluster: Cluster):
    decode_card = await cluster.pair()
    bus = cluster.router.bus
    for member in cluster.members:
        card = await member.card()
        bus.publish_nowait(subjects.control(cluster.pool, card.worker_id), b"\xc1")
        bus.publish_nowait(subjects.control(cluster.pool, card.worker_id), encode(Cancel(RequestId("x"), 1)))
    bus.publish_nowait(subjects.cancel(cluster.pool), b"garbage")
    bus.publish_nowait(subjects.cancel(cluster.pool), encode(Ping()))
    bus.publish_nowait(subjects.decode_jobs(cluster.pool, decode_card.worker_id), encode(Ping()))
    await bus.jobs.publish(subjects.prefill_jobs(cluster.pool), b"garbage", job_id="garbage", ttl_s=30.0)
    assert await cluster.router.answer(decode_card, prompt_of(9, 1), GREEDY) == right_answer(prompt_of(9, 1), GREEDY)


async def test_requests_of_a_router_that_has_gone_are_cancelled(cluster: Cluster):
    _, card = await cluster.worker("decode", sim_itl_ms=3.0, max_model_len=2000)
    endless = SamplingParams(max_tokens=1900, temperature=0.0)
    job = cluster.router.job(card, prompt_of(10, 1), endless, router_id="router-gone")
    assert isinstance(await cluster.router.ask(card, job), Admitted)
    assert unpack_tokens(job.token_ids) == prompt_of(10, 1)
    await asyncio.wait_for(cluster.settled(), 5)


# Stopping.


async def test_a_stopped_worker_finishes_what_runs_refuses_the_rest_and_leaves(cluster: Cluster):
    decode_card = await cluster.pair(**SLOW)
    member = cluster.members[1]
    prompt = prompt_of(20, 1)
    sampling = SamplingParams(max_tokens=100, temperature=0.0)
    _, stream = await cluster.router.begin(decode_card, prompt, sampling)
    await asyncio.wait_for(stream.first.wait(), 5)
    member.stop.set()
    async with asyncio.timeout(2):
        while not any(beat.is_draining for beat in heartbeats(cluster.router, decode_card)):
            await asyncio.sleep(0.01)
    refused = await cluster.router.ask(decode_card, cluster.router.job(decode_card, prompt, sampling))
    assert isinstance(refused, Refused)
    assert refused.reason == "draining"
    assert await asyncio.wait_for(member.task, 5) == 0
    assert stream.token_ids == right_answer(prompt, sampling)
    goodbye = await cluster.router.wait_for(Goodbye, messages="load")
    assert goodbye == Goodbye(decode_card.worker_id, decode_card.epoch)
    assert await cluster.router.bus.registry.get(decode_card.worker_id) is None


async def test_a_stopped_prefill_worker_finishes_its_job_and_takes_no_other(cluster: Cluster):
    first, _ = await cluster.worker("prefill", **SLOW)
    _, decode_card = await cluster.worker("decode", **SLOW)
    prompt = prompt_of(200, 1)
    _, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    await cluster.router.wait_for(PrefillClaimed)
    first.stop.set()
    await asyncio.sleep(0)
    _, later = await cluster.router.begin(decode_card, prompt_of(20, 2), GREEDY)
    assert await asyncio.wait_for(first.task, 5) == 0
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    await cluster.worker("prefill", **SLOW)
    await asyncio.wait_for(later.ended.wait(), 5)
    assert later.token_ids == right_answer(prompt_of(20, 2), GREEDY)


async def test_what_does_not_finish_within_the_grace_is_given_to_others(cluster: Cluster):
    first, _ = await cluster.worker("prefill", grace_s=0.1, **SLOW)
    _, decode_card = await cluster.worker("decode", **SLOW)
    prompt = prompt_of(800, 1)
    _, stream = await cluster.router.begin(decode_card, prompt, GREEDY)
    await cluster.router.wait_for(PrefillClaimed)
    await cluster.worker("prefill")
    first.stop.set()
    assert await asyncio.wait_for(first.task, 5) == 0
    await asyncio.wait_for(stream.ended.wait(), 5)
    assert stream.token_ids == right_answer(prompt, GREEDY)
    assert stream.details[0].computed_tokens == 1


async def test_a_failed_engine_ends_the_worker_with_exit_code_1(cluster: Cluster):
    decode_card = await cluster.pair(**SLOW)
    member = cluster.members[1]
    _, stream = await cluster.router.begin(decode_card, prompt_of(20, 1), LONG)
    await asyncio.wait_for(stream.first.wait(), 5)
    await member.engine.aclose()
    assert await asyncio.wait_for(member.task, 5) == 1
    await cluster.router.wait_for(Goodbye, messages="load")
    assert not stream.ended.is_set()
