"""Two processes' sides of a lent ring: message i is block i of both layers."""

from __future__ import annotations

from shm_ring import ShmKvPool, make_shm_pool
from transport_rig import make_layout

from hocket.transport import Extent
from hocket.transport.links.cuda_ipc import CudaIpcTransport
from hocket.transport.poller import Poller

BLOCK_BYTES = 1 << 20
NBYTES = 2 * BLOCK_BYTES


def extents_of(tag: int) -> tuple[Extent, ...]:
    return Extent(0, (tag,)), Extent(1, (tag,))


async def lending_side(messages: int, seed: int | None) -> tuple[ShmKvPool, CudaIpcTransport]:
    pool = make_shm_pool(make_layout(2, BLOCK_BYTES), messages, seed, staging_bytes=messages * NBYTES)
    transport = CudaIpcTransport()
    transport.bind(pool, Poller())
    await transport.start()
    return pool, transport
