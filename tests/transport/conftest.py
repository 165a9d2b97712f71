"""Endpoints that are closed at the end of each test."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))  # For `transport_rig`: with import-mode=importlib nothing else adds it.

from transport_rig import DECODE_EPOCH, MakePair, Pair, make_layout, make_pool, make_transport

from hocket.transport import HandoffEndpoint, KvLayout


@pytest_asyncio.fixture
async def make_pair() -> AsyncIterator[MakePair]:
    endpoints: list[HandoffEndpoint] = []

    async def make(scheme: str = "inproc", *, layout: KvLayout | None = None, blocks: int = 64) -> Pair:
        layout = layout or make_layout()
        source, target = make_pool(layout, blocks, seed=7), make_pool(layout, blocks)
        prefill_transport, decode_transport = make_transport(scheme), make_transport(scheme)
        decode = HandoffEndpoint(target, [decode_transport], worker_name="decode-0", epoch=DECODE_EPOCH)
        prefill = HandoffEndpoint(source, [prefill_transport], worker_name="prefill-0", epoch=5, listens=False)
        for endpoint in (decode, prefill):
            await endpoint.start()
            endpoints.append(endpoint)
        return Pair(prefill, decode, source, target, prefill_transport, decode_transport)

    yield make
    for endpoint in reversed(endpoints):
        async with asyncio.timeout(10.0):
            await endpoint.aclose()
