"""The two buses under one roof: what a contract test needs of either, with a real nats-server behind one of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from hocket.bus import Bus, EmbeddedServer, JobLimits, MemoryBroker, MemoryBus, NatsBus
from hocket.lab.bus import LabBroker, LabBus
from hocket.lab.log import EventLog
from hocket.lab.loop import Process

LIMITS = JobLimits(ack_wait_s=0.5, max_deliver=2, max_jobs=4)
PATIENT = JobLimits(
    ack_wait_s=60.0, max_deliver=2, max_jobs=4
)  # what comes again does not come because of `ack_wait_s`
TIMEOUT_S = 10.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what the caller can see come true."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.002)


class Rig:
    """Buses on one broker or server, which can go away and come back."""

    kind = ""

    def __init__(self) -> None:
        self._buses: list[Bus] = []
        self.limits = LIMITS  # may be changed before the first bus

    async def bus(self, name: str = "test") -> Bus:
        """One more connected bus; closed at the end of the test."""
        bus = self.make(name)
        await bus.connect()
        self._buses.append(bus)
        return bus

    def make(self, name: str) -> Bus:
        raise NotImplementedError

    async def stop(self) -> None:
        """The server goes away."""
        raise NotImplementedError

    async def start(self) -> None:
        """It is back, with what was stored."""
        raise NotImplementedError

    async def aclose(self) -> None:
        for bus in self._buses:
            await bus.aclose()


class MemoryRig(Rig):
    kind = "memory"

    def __init__(self) -> None:
        super().__init__()
        self._broker: MemoryBroker | None = None

    @property
    def broker(self) -> MemoryBroker:
        self._broker = self._broker or MemoryBroker(jobs=self.limits)
        return self._broker

    def make(self, name: str) -> Bus:
        return MemoryBus(self.broker, name=name)

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()


class LabRig(Rig):
    """The lab's bus, here on the clock of the wall."""

    kind = "lab"

    def __init__(self) -> None:
        super().__init__()
        self._broker: LabBroker | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def broker(self) -> LabBroker:
        log = EventLog(self._loop.time)
        self._broker = self._broker or LabBroker(self._loop, random.Random(1), log, jobs=self.limits)
        return self._broker

    def make(self, name: str) -> Bus:
        return LabBus(self.broker, Process(self._loop, name))

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()


class NatsRig(Rig):
    kind = "nats"

    def __init__(self, server: EmbeddedServer) -> None:
        super().__init__()
        self.server = server

    def make(self, name: str) -> Bus:
        return NatsBus(self.server.url, name=name, jobs=self.limits, connect_timeout_s=1.0)

    async def stop(self) -> None:
        await self.server.stop()

    async def start(self) -> None:
        await self.server.start()


@pytest.fixture(params=["memory", "lab", "nats"])
async def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Rig]:
    """The bus under test; a NATS one has a server and a store of its own."""
    async with AsyncExitStack() as stack:
        rig: Rig
        if request.param == "nats":
            store = tmp_path_factory.mktemp("store")
            rig = NatsRig(await stack.enter_async_context(EmbeddedServer(store)))
        else:
            rig = MemoryRig() if request.param == "memory" else LabRig()
        stack.push_async_callback(rig.aclose)
        yield rig


@pytest.fixture
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedServer]:
    """A real nats-server with a store of its own."""
    async with EmbeddedServer(tmp_path_factory.mktemp("store")) as server:
        yield server
