"""Ranks that know nothing of each other, as in an engine whose ranks are processes: together they hand everything over once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from transport_rig import (
    BLOCK_TOKENS,
    DECODE_EPOCH,
    LAYERS,
    chunk,
    expectation,
    make_layout,
    make_transport,
    send_order,
)

from hocket.transport import (
    Extent,
    HandoffEndpoint,
    HandoffKey,
    HostKvPool,
    KvLayout,
    KvShape,
    ReceiveEnd,
    SendEnd,
    SendReleased,
)
from hocket.transport.layout import heads_of
from hocket.transport.ranks import RankedEndpoint

BLOCKS = 6
FROM_IDS, TO_IDS = [4, 1, 3], [0, 5, 2]
KEY = HandoffKey(b"k" * 16, 1, 1)
Bytes = npt.NDArray[np.uint8]


def rank_layout(heads: int, ranks: int, rank: int) -> KvLayout:
    layout = make_layout(block_bytes=BLOCK_TOKENS * heads * 64, heads=heads)
    return msgspec.structs.replace(layout, shape=KvShape((BLOCK_TOKENS,), tp_size=ranks, tp_rank=rank))


def whole_kv(heads: int) -> Bytes:
    return np.random.default_rng(heads).integers(0, 256, (LAYERS, BLOCKS, heads, BLOCK_TOKENS * 64), np.uint8)


def rank_pool(layout: KvLayout, whole: Bytes) -> HostKvPool:
    own = heads_of(whole.shape[2], layout.shape.tp_size, layout.shape.tp_rank)
    rows = [np.ascontiguousarray(layer[:, own.start : own.stop]).reshape(BLOCKS, -1) for layer in whole]
    return HostKvPool(layout, rows)


class Ranks:
    """A worker's ranks, each an endpoint by itself."""

    def __init__(self, heads: int, ranks: int, whole: Bytes, *, listens: bool) -> None:
        self.pools = [rank_pool(rank_layout(heads, ranks, rank), whole.copy()) for rank in range(ranks)]
        self.endpoints = [
            RankedEndpoint(
                [
                    HandoffEndpoint(
                        pool, [make_transport("inproc")], worker_name="w", epoch=DECODE_EPOCH, listens=listens
                    )
                ]
            )
            for pool in self.pools
        ]
        self.released = 0
        self.sent: list[SendEnd] = []
        self.received: list[ReceiveEnd] = []

    def on_sent(self, event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            self.sent.append(event)
        else:
            self.released += 1


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("heads", "from_ranks", "to_ranks"),
    [(4, 1, 2), (4, 2, 1), (4, 2, 4), (2, 2, 2), (2, 2, 4), (2, 4, 1), (1, 2, 1), (1, 4, 2), (1, 1, 2)],
)
async def test_every_rank_has_its_heads_and_each_head_came_once(heads: int, from_ranks: int, to_ranks: int) -> None:
    whole = whole_kv(heads)
    prefill = Ranks(heads, from_ranks, whole, listens=False)
    decode = Ranks(heads, to_ranks, np.zeros_like(whole), listens=True)
    async with AsyncExitStack() as stack:
        for endpoint in (*prefill.endpoints, *decode.endpoints):
            await endpoint.start()
            stack.push_async_callback(endpoint.aclose)
        for endpoint in decode.endpoints:
            wanted = expectation(KEY.token, 1, 0, TO_IDS, 10.0)
            endpoint.expect(wanted, decode.received.append, prefill_ranks=from_ranks)
        addresses = [address for endpoint in decode.endpoints for address in endpoint.addresses]
        order = send_order(KEY, addresses, prefill.pools[0].layout.fingerprint(), len(FROM_IDS), epoch=DECODE_EPOCH)
        for endpoint in prefill.endpoints:
            endpoint.open(order, prefill.on_sent, decode_ranks=to_ranks)
            endpoint.announce(KEY, chunk(0, FROM_IDS))
            endpoint.gather_ahead([KEY], [0], None)
            endpoint.layers_ready(KEY, range(LAYERS))
        await wait_until(lambda: len(decode.received) == to_ranks and len(prefill.sent) == from_ranks)
    assert all(end.is_landed for end in (*decode.received, *prefill.sent))
    assert prefill.released == from_ranks
    for rank, pool in enumerate(decode.pools):
        own = heads_of(heads, to_ranks, rank)
        right = rank_pool(pool.layout, whole)
        assert pool.layout.token_bytes == len(own) * 64 * LAYERS
        for layer in range(LAYERS):
            for source, target in zip(FROM_IDS, TO_IDS, strict=True):
                assert np.array_equal(rows(pool, layer, target), rows(right, layer, source))
    kv_bytes = len(FROM_IDS) * BLOCK_TOKENS * sum(pool.layout.token_bytes for pool in decode.pools)
    assert sum(end.kv_bytes for end in decode.received) == sum(end.kv_bytes for end in prefill.sent) == kv_bytes


def rows(pool: HostKvPool, layer: int, block: int) -> Bytes:
    (row,) = pool.buffers([Extent(layer, (block,))])
    return row
