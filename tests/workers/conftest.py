"""Fixtures for the tests of the workers."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # For `workers_rig`: with import-mode=importlib nothing else adds it.

from workers_rig import PairMaker, SimPair, sim_config

from hocket.transport.links.inproc import InprocFaults, InprocTransport
from hocket.workers.engines.sim.engine import SimEngine


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
