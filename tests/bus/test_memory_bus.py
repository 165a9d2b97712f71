"""What only the bus in memory has: one order for all, its own clock, connections that can be cut one by one."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from hocket.bus import Bus, BusDisconnected, JobLimits, MemoryBroker, MemoryBus, NatsBus, QueueUnavailable, subjects
from hocket.bus.memory_bus import matches

from .conftest import until

LANE = subjects.prefill_jobs("test")


@asynccontextmanager
async def connected(broker: MemoryBroker) -> AsyncIterator[MemoryBus]:
    bus = MemoryBus(broker)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.aclose()


def both_keep_the_contract(nats: NatsBus, memory: MemoryBus) -> tuple[Bus, Bus]:
    """For the type checker."""
    return nats, memory


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop whose time jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self._now = max(self._now, heapq.nsmallest(1, self._scheduled)[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


def test_ack_wait_and_time_to_live_run_on_virtual_time() -> None:
    async def run() -> list[tuple[float, int]]:
        broker = MemoryBroker(jobs=JobLimits(ack_wait_s=15.0, max_deliver=4))
        async with connected(broker) as bus:
            loop = asyncio.get_running_loop()
            exhausted: list[bytes] = []
            await bus.jobs.watch_exhausted(exhausted.append)
            puller = await bus.jobs.puller(LANE)
            await bus.jobs.publish(LANE, b"never done", job_id="1", ttl_s=600)
            deliveries = []
            for _ in range(4):
                job = await puller.pull()
                deliveries.append((loop.time(), job.delivery))
            await asyncio.sleep(100)
            assert exhausted == [b"never done"]
            await bus.jobs.publish(LANE, b"late", job_id="2", ttl_s=60)
            await asyncio.sleep(61)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1000):
                    await puller.pull()
            first = await bus.jobs.publish(LANE, b"again", job_id="1", ttl_s=60)
            assert first > 2  # The dedup window is over.
            return deliveries

    loop = VirtualLoop()
    try:
        assert loop.run_until_complete(run()) == [(0.0, 1), (15.0, 2), (30.0, 3), (45.0, 4)]
    finally:
        loop.close()


async def test_a_clock_of_ones_own_rules_the_queue() -> None:
    now = 0.0
    async with connected(MemoryBroker(clock=lambda: now)) as bus:
        sequence = await bus.jobs.publish(LANE, b"x", job_id="1", ttl_s=10)
        now = 9.9
        assert await bus.jobs.publish(LANE, b"x", job_id="1", ttl_s=10) == sequence
        now = 10.1
        puller = await bus.jobs.puller(LANE)
        pull = asyncio.create_task(puller.pull())
        await asyncio.sleep(0.02)
        assert not pull.done()
        now = 200.0
        assert await bus.jobs.publish(LANE, b"y", job_id="1", ttl_s=10) > sequence
        assert (await pull).payload == b"y"


async def test_all_subscribers_see_one_order() -> None:
    broker = MemoryBroker()
    log: list[tuple[str, bytes]] = []

    def note(who: str) -> Callable[[object], None]:
        return lambda delivery: log.append((who, delivery.payload))  # type: ignore[attr-defined]

    async with connected(broker) as one, connected(broker) as two, connected(broker) as three:
        await three.subscribe("a.>", note("three"))
        await two.subscribe("a.b", note("two"))
        await one.subscribe("a.*", note("one"))
        one.publish_nowait("a.b", b"1")
        three.publish_nowait("a.b", b"2")
        assert log == []  # never inside the publisher's own turn
        await until(lambda: len(log) == 6)
    assert log == [(who, payload) for payload in (b"1", b"2") for who in ("two", "one", "three")]


async def test_one_bus_can_lose_its_connection_alone() -> None:
    broker = MemoryBroker()
    async with connected(broker) as stays, connected(broker) as drops:
        got: list[bytes] = []
        await drops.subscribe("a", lambda delivery: got.append(delivery.payload))
        stays.publish_nowait("a", b"1")
        await until(lambda: len(got) == 1)
        drops.drop()
        assert not drops.publish_nowait("a", b"lost")
        with pytest.raises(BusDisconnected):
            await drops.request("a", b"", timeout_s=1)
        stays.publish_nowait("a", b"2")
        await asyncio.sleep(0.01)
        broker.stop()
        broker.start()
        assert (stays.is_connected, drops.is_connected) == (True, False)
        drops.restore()
        stays.publish_nowait("a", b"3")
        await until(lambda: len(got) == 2)
        assert got == [b"1", b"3"]


async def test_an_election_makes_the_queue_unavailable_and_nothing_else() -> None:
    broker = MemoryBroker(jobs=JobLimits(publish_timeout_s=0.05))
    async with connected(broker) as bus:
        broker.store.is_available = False
        with pytest.raises(QueueUnavailable):
            await bus.jobs.publish(LANE, b"x", job_id="1", ttl_s=10)
        assert bus.publish_nowait("a", b"x")
        broker.store.is_available = True
        await bus.jobs.publish(LANE, b"x", job_id="1", ttl_s=10)


async def test_a_refusal_for_good_can_be_played() -> None:
    async with connected(MemoryBroker()) as bus:
        bus.fail("permissions violation")
        assert str(await bus.fatal()) == "permissions violation"


@pytest.mark.parametrize(
    ("pattern", "subject", "is_match"),
    [
        ("a", "a", True),
        ("a", "a.b", False),
        ("a.b", "a", False),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.d", False),
        (">", "a", True),
        ("a.>", "a", False),
        ("a.>", "a.b.c", True),
        ("a.*", "a.b.c", False),
    ],
)
def test_wildcards_match_as_in_nats(pattern: str, subject: str, *, is_match: bool) -> None:
    assert matches(pattern, subject) == is_match
