"""What every work queue owes: a job is stored, delivered at least once, and ends once."""

from __future__ import annotations

import asyncio
import time

import pytest

from hocket.bus import Bus, BusDisconnected, BusError, JobPuller, PulledJob, QueueFull, subjects
from hocket.bus.ids import WorkerId
from hocket.bus.jobs import JobLimits

from .conftest import LIMITS, PATIENT, Rig, until

LANE = subjects.prefill_jobs("test")


async def put(bus: Bus, payload: bytes, *, lane: str = LANE, ttl_s: float = 60.0) -> int:
    """Publish a job under its payload as the id."""
    return await bus.jobs.publish(lane, payload, job_id=payload.decode(), ttl_s=ttl_s)


async def nothing_comes(puller: JobPuller, for_s: float = 0.15) -> bool:
    try:
        async with asyncio.timeout(for_s):
            await puller.pull()
    except TimeoutError:
        return True
    return False


async def test_a_job_waits_for_a_puller_and_is_gone_after_its_ack(rig: Rig) -> None:
    router, worker = await rig.bus(), await rig.bus()
    sequence = await put(router, b"one")
    puller = await worker.jobs.puller(LANE)
    job = await puller.pull()
    assert (job.payload, job.delivery) == (b"one", 1)
    await job.ack()
    await job.ack()
    assert not await router.jobs.delete(sequence)
    assert await nothing_comes(puller, LIMITS.ack_wait_s * 1.5)


async def test_a_job_reaches_a_puller_that_waits_already(rig: Rig) -> None:
    router, worker = await rig.bus(), await rig.bus()
    puller = await worker.jobs.puller(LANE)
    task = asyncio.create_task(puller.pull())
    await asyncio.sleep(0.05)
    await put(router, b"one")
    job = await task
    assert job.payload == b"one"
    await job.ack()


async def test_jobs_come_in_the_order_they_were_published(rig: Rig) -> None:
    bus = await rig.bus()
    sequences = [await put(bus, b"%d" % number) for number in range(4)]
    assert sequences == sorted(sequences)
    puller = await bus.jobs.puller(LANE)
    got = []
    for _ in range(4):
        job = await puller.pull()
        got.append(job.payload)
        await job.ack()
    assert got == [b"0", b"1", b"2", b"3"]


async def test_two_pullers_of_one_lane_share_its_jobs(rig: Rig) -> None:
    bus, one, two = await rig.bus(), await rig.bus(), await rig.bus()
    pullers = [await one.jobs.puller(LANE), await two.jobs.puller(LANE)]
    tasks = [asyncio.create_task(puller.pull()) for puller in pullers]
    await put(bus, b"a")
    await put(bus, b"b")
    jobs = [await task for task in tasks]
    assert {job.payload for job in jobs} == {b"a", b"b"}
    for job in jobs:
        await job.ack()


async def test_a_puller_with_room_gets_as_many_jobs_and_leaves_the_others(rig: Rig) -> None:
    rig.limits = PATIENT
    bus, other = await rig.bus(), await rig.bus()
    jobs: list[PulledJob] = []
    puller = await bus.jobs.puller(LANE, lambda: 3 - len(jobs))
    for number in range(4):
        await put(bus, b"%d" % number)
    for _ in range(3):
        jobs.append(await puller.pull())
    assert [job.payload for job in jobs] == [b"0", b"1", b"2"]
    assert jobs[-1].behind == 1
    pull = asyncio.create_task(puller.pull())
    async with asyncio.timeout(10):
        last = await (await other.jobs.puller(LANE)).pull()
    assert (last.payload, last.behind, last.delivery) == (b"3", 0, 1)
    assert not pull.done()
    await jobs.pop().ack()
    await put(bus, b"4")
    puller.room_changed()
    async with asyncio.timeout(10):
        assert (await pull).payload == b"4"


async def test_a_request_that_is_taken_back_leaves_the_job_to_another_puller(rig: Rig) -> None:
    rig.limits = PATIENT
    bus, other = await rig.bus(), await rig.bus()
    room = 2
    puller = await bus.jobs.puller(LANE, lambda: room)
    for round_number in range(5):
        room = 2
        pull = asyncio.create_task(puller.pull())
        await until(lambda: puller.outstanding > 0)
        room = 0
        puller.room_changed()
        await until(lambda: puller.outstanding == 0)
        await put(bus, b"job%d" % round_number)
        async with asyncio.timeout(10):
            job = await (await other.jobs.puller(LANE)).pull()
        assert (job.payload, job.delivery) == (b"job%d" % round_number, 1)
        await job.ack()
        pull.cancel()
        await asyncio.wait([pull])


async def test_room_that_comes_and_goes_loses_no_job(rig: Rig) -> None:
    rig.limits = JobLimits(ack_wait_s=60.0)
    bus = await rig.bus()
    room, got = 1, list[bytes]()
    puller = await bus.jobs.puller(LANE, lambda: room)

    async def pull_all() -> None:
        while len(got) < 40:
            job = await puller.pull()
            got.append(job.payload)
            await job.ack()

    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        pulling = tasks.create_task(pull_all())
        for number in range(40):
            await put(bus, b"%d" % number)
            room = number % 3
            puller.room_changed()
            await asyncio.sleep(0.0007 * (number % 4))
        room = 4
        puller.room_changed()
        await pulling
    assert sorted(got, key=int) == [b"%d" % number for number in range(40)]


async def test_the_next_job_of_a_lane_can_be_taken_without_waiting(rig: Rig) -> None:
    bus, other = await rig.bus(), await rig.bus()
    lane = subjects.prefill_lane("test", WorkerId("prefill-dead"))
    assert await bus.jobs.take(lane) is None
    await put(bus, b"one", lane=lane)
    await put(bus, b"two", lane=lane)
    async with asyncio.timeout(10):
        job = await other.jobs.take(lane)
        assert job is not None
        assert (job.payload, job.delivery) == (b"one", 1)
        while job.behind != 1:  # The server counts what was stored a moment after it has confirmed it.
            await job.nak()
            job = await other.jobs.take(lane)
            assert job is not None
    assert job.payload == b"one"
    await job.ack()
    second = await bus.jobs.take(lane)
    assert second is not None
    await second.ack()
    assert await bus.jobs.take(lane) is None


async def test_lanes_do_not_mix(rig: Rig) -> None:
    bus = await rig.bus()
    other = subjects.prefill_jobs("test", "batch")
    puller, other_puller = await bus.jobs.puller(LANE), await bus.jobs.puller(other)
    await put(bus, b"batch", lane=other)
    assert await nothing_comes(puller)
    assert (await other_puller.pull()).payload == b"batch"


async def test_the_same_job_id_is_stored_once(rig: Rig) -> None:
    bus = await rig.bus()
    first = await put(bus, b"one")
    assert await put(bus, b"one") == first
    puller = await bus.jobs.puller(LANE)
    await (await puller.pull()).ack()
    assert await put(bus, b"one") == first
    assert await nothing_comes(puller)


async def test_a_job_that_is_given_back_comes_again_at_once(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    await put(bus, b"one")
    await (await puller.pull()).nak()
    job = await puller.pull()
    assert (job.payload, job.delivery) == (b"one", 2)
    await job.ack()


async def test_a_job_given_back_with_a_delay_comes_after_it(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    await put(bus, b"one")
    await (await puller.pull()).nak(0.3)
    start = time.monotonic()
    job = await puller.pull()
    assert 0.2 < time.monotonic() - start < 2
    await job.ack()


async def test_a_job_nobody_ends_is_delivered_again(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    await put(bus, b"one")
    start = time.monotonic()
    assert (await puller.pull()).delivery == 1
    job = await puller.pull()
    assert job.delivery == 2
    assert time.monotonic() - start > LIMITS.ack_wait_s * 0.8
    await job.ack()


async def test_a_job_in_progress_is_not_delivered_again(rig: Rig) -> None:
    bus = await rig.bus()
    puller, other = await bus.jobs.puller(LANE), await bus.jobs.puller(LANE)
    await put(bus, b"one")
    job = await puller.pull()
    for _ in range(4):
        assert await nothing_comes(other, LIMITS.ack_wait_s / 2)
        await job.in_progress()
    await job.ack()
    assert await nothing_comes(other, LIMITS.ack_wait_s * 1.5)


async def test_a_terminated_job_is_gone(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    sequence = await put(bus, b"one")
    await (await puller.pull()).term("bad_job")
    assert await nothing_comes(puller, LIMITS.ack_wait_s * 1.5)
    assert not await bus.jobs.delete(sequence)


async def test_anyone_can_give_back_a_dead_workers_job(rig: Rig) -> None:
    rig.limits = PATIENT
    router, worker, survivor = await rig.bus(), await rig.bus(), await rig.bus()
    await put(router, b"one")
    job = await (await worker.jobs.puller(LANE)).pull()
    puller = await survivor.jobs.puller(LANE)
    router.jobs.nak_for(job.ack_subject)
    async with asyncio.timeout(10):
        assert (await puller.pull()).delivery == 2


async def test_a_late_ack_after_redelivery_is_harmless(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    await put(bus, b"one")
    first = await puller.pull()
    second = await puller.pull()
    await second.ack()
    await first.ack()
    assert await nothing_comes(puller, LIMITS.ack_wait_s * 1.5)


async def test_a_deleted_job_is_never_delivered(rig: Rig) -> None:
    bus = await rig.bus()
    sequence = await put(bus, b"one")
    await put(bus, b"two")
    assert await bus.jobs.delete(sequence)
    assert not await bus.jobs.delete(sequence)
    assert not await bus.jobs.delete(10_000)
    assert (await (await bus.jobs.puller(LANE)).pull()).payload == b"two"


async def test_a_job_whose_time_is_over_is_never_delivered(rig: Rig) -> None:
    bus = await rig.bus()
    await put(bus, b"short", ttl_s=0.5)
    await asyncio.sleep(1.6)  # Whole seconds on NATS: the job's time itself is what is tested.
    await put(bus, b"long")
    puller = await bus.jobs.puller(LANE)
    assert (await puller.pull()).payload == b"long"


async def test_a_full_queue_refuses_and_takes_again_when_there_is_room(rig: Rig) -> None:
    bus = await rig.bus()
    sequences = [await put(bus, b"%d" % number) for number in range(LIMITS.max_jobs)]
    with pytest.raises(QueueFull, match="full"):
        await put(bus, b"one_too_many")
    await bus.jobs.delete(sequences[0])
    await put(bus, b"fits")


async def test_what_cannot_be_a_job_is_refused_here(rig: Rig) -> None:
    bus = await rig.bus()
    with pytest.raises(ValueError, match="ttl_s"):
        await put(bus, b"one", ttl_s=0)
    with pytest.raises(ValueError, match="exceeds"):
        await bus.jobs.publish(LANE, b"x" * (LIMITS.max_job_bytes + 1), job_id="big", ttl_s=1)
    with pytest.raises(ValueError, match="job id"):
        await bus.jobs.publish(LANE, b"x", job_id="a\r\nNats-Rollup: all", ttl_s=1)


async def test_a_job_delivered_in_vain_is_handed_to_one_watcher_and_removed(rig: Rig) -> None:
    bus, one, two = await rig.bus(), await rig.bus(), await rig.bus()
    got: list[bytes] = []
    for router in (one, two):
        await router.jobs.watch_exhausted(got.append)
    sequence = await put(bus, b"poison")
    puller = await bus.jobs.puller(LANE)
    for _ in range(LIMITS.max_deliver):
        await (await puller.pull()).nak()
    waiting = asyncio.create_task(puller.pull())
    await until(lambda: bool(got))
    await put(bus, b"next")
    job = await waiting
    assert job.payload == b"next"
    assert got == [b"poison"]
    assert not await bus.jobs.delete(sequence)


async def test_cancelling_a_pull_loses_no_job(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    for number in range(20):
        pull = asyncio.create_task(puller.pull())
        await asyncio.sleep(0.001 * (number % 4))
        await put(bus, b"%d" % number)
        await asyncio.sleep(0.0005 * (number % 5))
        pull.cancel()
        try:
            job = await pull
        except asyncio.CancelledError:
            async with asyncio.timeout(5):
                job = await puller.pull()
        assert job.payload == b"%d" % number
        await job.ack()


async def test_a_job_that_came_for_a_cancelled_pull_goes_to_another_worker(rig: Rig) -> None:
    rig.limits = PATIENT
    bus, other = await rig.bus(), await rig.bus()
    puller = await bus.jobs.puller(LANE)
    assert await nothing_comes(puller, 0.05)
    await put(bus, b"one")
    await asyncio.sleep(0.05)
    async with asyncio.timeout(10):
        job = await (await other.jobs.puller(LANE)).pull()
    assert job.payload == b"one"
    await job.ack()


async def test_a_closed_puller_gives_back_what_it_was_sent(rig: Rig) -> None:
    rig.limits = PATIENT
    bus, other = await rig.bus(), await rig.bus()
    puller = await bus.jobs.puller(LANE)
    assert await nothing_comes(puller, 0.05)
    await put(bus, b"one")
    await asyncio.sleep(0.05)
    await puller.aclose()
    await puller.aclose()
    async with asyncio.timeout(10):
        job = await (await other.jobs.puller(LANE)).pull()
    await job.ack()
    with pytest.raises(ValueError, match="closed"):
        await puller.pull()


async def test_closing_a_puller_ends_its_pull(rig: Rig) -> None:
    bus = await rig.bus()
    puller = await bus.jobs.puller(LANE)
    pull = asyncio.create_task(puller.pull())
    await asyncio.sleep(0.02)
    await puller.aclose()
    with pytest.raises(BusError, match="closed"):
        async with asyncio.timeout(2):
            await pull


async def test_pulls_go_on_after_the_server_was_away(rig: Rig) -> None:
    router, worker = await rig.bus(), await rig.bus()
    puller = await worker.jobs.puller(LANE)
    pull = asyncio.create_task(puller.pull())
    await asyncio.sleep(0.05)
    await rig.stop()
    await until(lambda: not router.is_connected)
    with pytest.raises(BusDisconnected):
        await put(router, b"while_away")
    await rig.start()
    await until(lambda: router.is_connected and worker.is_connected)
    await put(router, b"after")
    async with asyncio.timeout(10):
        job = await pull
    assert job.payload == b"after"
    await job.ack()


async def test_jobs_outlive_a_restart_of_the_server(rig: Rig) -> None:
    bus = await rig.bus()
    await put(bus, b"one")
    puller = await bus.jobs.puller(LANE)
    held = await puller.pull()
    await put(bus, b"two")
    await rig.stop()
    await until(lambda: not bus.is_connected)
    ack = asyncio.create_task(held.ack())
    await rig.start()
    async with asyncio.timeout(10):
        await ack
        job = await puller.pull()
    assert job.payload == b"two"
    await job.ack()
    assert await nothing_comes(puller, LIMITS.ack_wait_s * 1.5)
