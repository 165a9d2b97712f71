"""Fixtures for the tests of the workers."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # For `workers_rig`: with import-mode=importlib nothing else adds it.

from scripted_router import ScriptedRouter
from workers_rig import Cluster, PairMaker, SimPair, sim_config

from hocket.bus.base import Bus
from hocket.bus.memory_bus import MemoryBroker, MemoryBus
from hocket.bus.nats_bus import NatsBus
from hocket.bus.server import EmbeddedServer
from hocket.transport.links.inproc import InprocFaults, InprocTransport
from hocket.workers.engines.sim.engine import SimEngine


@pytest.fixture
async def nats_server() -> AsyncIterator[EmbeddedServer]:
    """A server of the test's own: it starts in 0.02 s."""
    async with EmbeddedServer() as server:
        yield server


@asynccontextmanager
async def cluster_on(make_bus: Callable[[str], Bus]) -> AsyncIterator[Cluster]:
    """At the end everything stops, and nothing may be left."""
    pool = f"pool-{os.urandom(4).hex()}"
    bus = make_bus("router")
    await bus.connect()
    router = ScriptedRouter(bus, pool)
    await router.start()
    built = Cluster(pool, router, make_bus)
    try:
        yield built
        await built.stop()
    finally:
        await built.abandon()
        await bus.aclose()


@pytest.fixture(params=["memory", "nats"])
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """Workers and one scripted router on one bus."""
    async with AsyncExitStack() as stack:
        make_bus: Callable[[str], Bus]
        if request.param == "memory":
            broker = MemoryBroker()

            def make_bus(name: str) -> Bus:
                return MemoryBus(broker, name=name)
        else:
            server = await stack.enter_async_context(EmbeddedServer())

            def make_bus(name: str) -> Bus:
                return NatsBus(server.url, name=name)

        yield await stack.enter_async_context(cluster_on(make_bus))


@pytest.fixture
async def nats_cluster(nats_server: EmbeddedServer) -> AsyncIterator[Cluster]:
    """The same, on the test's own server."""
    async with cluster_on(lambda name: NatsBus(nats_server.url, name=name)) as built:
        yield built


@pytest.fixture
async def sim_pair() -> AsyncIterator[PairMaker]:
    """`await sim_pair(**changes)` makes a pair; after the test nothing may be left in it."""
    async with AsyncExitStack() as stack:
        pairs: list[SimPair] = []

        async def make(**changes: object) -> SimPair:
            faults = InprocFaults()
            engines = []
            for role in ("decode", "prefill"):
                config = sim_config(role, **changes)
                engine = SimEngine(config, worker_id=role, epoch=7, transports=[InprocTransport(faults)])
                stack.push_async_callback(engine.aclose)
                engines.append(engine)
            decode, prefill = engines
            info = await decode.start()
            await prefill.start()
            pairs.append(SimPair(prefill, decode, info, faults))
            return pairs[-1]

        yield make
        for pair in pairs:
            await pair.settled()
