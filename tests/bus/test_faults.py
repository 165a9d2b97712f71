"""The bus on NATS through crashes: what was confirmed is there, what was not is told, nothing hangs."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from hocket.bus import (
    BusDisconnected,
    BusError,
    EmbeddedServer,
    JobLimits,
    NatsBus,
    QueueFull,
    QueueUnavailable,
    subjects,
)
from hocket.bus.jetstream import ApiAnswer as Answer
from hocket.bus.jetstream import JetStreamError, StreamInfo, api_subject, call
from hocket.bus.jobs_pull import consumer_name

from .conftest import until

LANE = subjects.prefill_jobs("test")
LIMITS = JobLimits(ack_wait_s=0.6, max_deliver=50)


@asynccontextmanager
async def connected(server: EmbeddedServer, limits: JobLimits | None = LIMITS) -> AsyncIterator[NatsBus]:
    bus = NatsBus(server.url, name="test", jobs=limits)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.aclose()


async def kill_and_restart(server: EmbeddedServer) -> None:
    os.kill(server.pid, signal.SIGKILL)
    await server.wait_exit()
    await server.start()


async def test_every_confirmed_job_is_done_though_the_server_is_killed_twice(server: EmbeddedServer) -> None:
    confirmed: list[bytes] = []
    unconfirmed: list[bytes] = []
    done: dict[bytes, int] = {}
    all_published = asyncio.Event()

    async def publish(bus: NatsBus) -> None:
        for number in range(300):
            payload = b"%d" % number
            try:
                await bus.jobs.publish(LANE, payload, job_id=f"{number}", ttl_s=60)
                confirmed.append(payload)
            except (QueueUnavailable, BusDisconnected):
                unconfirmed.append(payload)
                await asyncio.sleep(0.05)
        all_published.set()

    async def work(bus: NatsBus) -> None:
        puller = await bus.jobs.puller(LANE)
        while True:
            job = await puller.pull()
            done[job.payload] = done.get(job.payload, 0) + 1
            await job.ack()

    async with (
        connected(server) as router,
        connected(server) as worker,
        asyncio.timeout(40),
        asyncio.TaskGroup() as tasks,
    ):
        workers = [tasks.create_task(work(worker)) for _ in range(3)]
        publisher = tasks.create_task(publish(router))
        for done_jobs in (60, 150):
            await until(lambda done_jobs=done_jobs: len(done) >= done_jobs or publisher.done())  # type: ignore[misc]
            await kill_and_restart(server)
        await all_published.wait()
        await until(lambda: set(confirmed) <= set(done))
        for task in workers:
            task.cancel()
    assert len(confirmed) > 250
    assert len(confirmed) + len(unconfirmed) == 300
    assert set(done) <= {*confirmed, *unconfirmed}


async def test_a_job_whose_delivery_the_server_forgot_is_removed_by_its_ack(server: EmbeddedServer) -> None:
    """A killed nats-server comes back without its last deliveries; it answers no ack for them."""
    async with connected(server) as bus:
        sequence = await bus.jobs.publish(LANE, b"done", job_id="1", ttl_s=60)
        puller = await bus.jobs.puller(LANE)
        job = await puller.pull()
        stream, consumer = subjects.PREFILL_STREAM, consumer_name(LANE)
        await puller.aclose()
        await call(bus, api_subject("CONSUMER", "DELETE", stream, consumer), None, Answer)
        await bus.jobs.ensure_consumer(LANE)  # A new one, which delivered nothing yet.
        async with asyncio.timeout(5):
            await job.ack()
        assert not await bus.jobs.delete(sequence)


async def test_a_pull_survives_the_loss_of_its_consumer(server: EmbeddedServer) -> None:
    async with connected(server) as bus:
        puller = await bus.jobs.puller(LANE)
        pull = asyncio.create_task(puller.pull())
        await asyncio.sleep(0.05)
        await call(bus, api_subject("CONSUMER", "DELETE", subjects.PREFILL_STREAM, consumer_name(LANE)), None, Answer)
        await bus.jobs.publish(LANE, b"after", job_id="1", ttl_s=60)
        async with asyncio.timeout(5):
            job = await pull
        assert job.payload == b"after"
        await job.ack()


async def test_a_stream_that_is_gone_is_made_again(server: EmbeddedServer) -> None:
    async with connected(server) as bus:
        puller = await bus.jobs.puller(LANE)
        pull = asyncio.create_task(puller.pull())
        await asyncio.sleep(0.05)
        await call(bus, api_subject("STREAM", "DELETE", subjects.PREFILL_STREAM), None, Answer)
        await bus.jobs.publish(LANE, b"after", job_id="1", ttl_s=60)
        async with asyncio.timeout(5):
            assert (await pull).payload == b"after"


async def test_a_queue_without_jetstream_is_unavailable_in_bounded_time(server: EmbeddedServer) -> None:
    limits = JobLimits(publish_timeout_s=0.4)
    async with connected(server, limits) as bus, connected(server, limits) as holder:
        await bus.jobs.publish(LANE, b"x", job_id="0", ttl_s=60)
        held = await (await holder.jobs.puller(LANE)).pull()
        os.kill(server.pid, signal.SIGSTOP)
        try:
            start = asyncio.get_running_loop().time()
            with pytest.raises(QueueUnavailable, match="did not confirm job 1"):
                await bus.jobs.publish(LANE, b"x", job_id="1", ttl_s=60)
            assert asyncio.get_running_loop().time() - start < 1
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await held.ack()


async def test_the_queue_is_full_by_bytes_too(server: EmbeddedServer) -> None:
    async with connected(server, JobLimits(max_bytes=100_000)) as bus:
        for number in range(9):
            await bus.jobs.publish(LANE, b"x" * 10_000, job_id=f"{number}", ttl_s=60)
        with pytest.raises(QueueFull, match="maximum bytes"):
            await bus.jobs.publish(LANE, b"x" * 10_000, job_id="9", ttl_s=60)


async def test_limits_are_changed_by_the_bus_that_is_given_some_and_kept_by_others(server: EmbeddedServer) -> None:
    async def max_msgs(bus: NatsBus) -> object:
        return (await call(bus, api_subject("STREAM", "INFO", subjects.PREFILL_STREAM), None, StreamInfo)).config[
            "max_msgs"
        ]

    for limits, expected in ((JobLimits(max_jobs=7), 7), (None, 7), (JobLimits(max_jobs=9), 9), (None, 9)):
        async with connected(server, limits) as bus:
            puller = await bus.jobs.puller(LANE)
            await bus.jobs.publish(LANE, b"x", job_id="same", ttl_s=60)
            await puller.aclose()
            assert await max_msgs(bus) == expected


async def test_a_refusal_of_jetstream_says_why(server: EmbeddedServer) -> None:
    async with connected(server) as bus:
        with pytest.raises(JetStreamError, match=r"stream not found \(10059\)"):
            await call(bus, api_subject("STREAM", "DELETE", "nothing"), None, Answer)
    with pytest.raises(BusError, match="cannot reach"):
        await NatsBus("nats://127.0.0.1:1", name="test", connect_timeout_s=0.3).connect()
