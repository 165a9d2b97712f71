"""Pools with known bytes, a prefill and a decode endpoint, and what they reported."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from shm_ring import make_shm_pool

from hocket.lab.link import LabTransport, Network
from hocket.lab.loop import Process
from hocket.transport import (
    Chunk,
    Expectation,
    Extent,
    GroupBlocks,
    HandoffEndpoint,
    HandoffKey,
    HostKvPool,
    KvLayer,
    KvLayout,
    KvShape,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    Transport,
)
from hocket.transport.links.cma import CmaTransport
from hocket.transport.links.cuda_ipc import CudaIpcTransport
from hocket.transport.links.inproc import InprocTransport
from hocket.transport.links.tcp import TcpTransport
from hocket.transport.poller import Poller

LAYERS = 4
BLOCK_TOKENS = 16
HEADS = 2
DECODE_EPOCH = 77


_networks: WeakKeyDictionary[asyncio.AbstractEventLoop, Network] = WeakKeyDictionary()


def make_transport(scheme: str) -> Transport:
    if scheme == "ucx":
        ucx = pytest.importorskip("hocket.transport.links.ucx")
        pytest.importorskip("ucxx")
        transport: Transport = ucx.UcxTransport()
        return transport
    if scheme == "cuda_ipc":
        ring = CudaIpcTransport()
        ring.bind(make_shm_pool(make_layout(), 4), Poller())
        return ring
    if scheme == "lab":
        loop = asyncio.get_running_loop()
        network = _networks.setdefault(loop, Network(loop, random.Random(1)))
        return LabTransport(network, Process(loop, "lab"))
    return {"cma": CmaTransport, "inproc": InprocTransport, "tcp": TcpTransport}[scheme]()


def make_layout(
    layers: int = LAYERS,
    block_bytes: int = 4096,
    model: str = "test/model",
    *,
    block_tokens: int = BLOCK_TOKENS,
    heads: int = HEADS,
) -> KvLayout:
    head_bytes = block_bytes // (block_tokens * heads)
    kv_layers = tuple(KvLayer(f"model.layers.{layer}.attn", heads, head_bytes) for layer in range(layers))
    return KvLayout(model, "main", "float32", "float32", kv_layers, KvShape((block_tokens,)))


def expectation(
    token: bytes, attempt: int, first_block: int, block_ids: Sequence[int], timeout_s: float
) -> Expectation:
    """Of whole blocks of the one group."""
    group = GroupBlocks(first_block, tuple(block_ids))
    end_token = (first_block + len(block_ids)) * BLOCK_TOKENS
    return Expectation(token, attempt, (group,), end_token, timeout_s)


def chunk(first_block: int, block_ids: Sequence[int]) -> Chunk:
    """Of whole blocks of the one group."""
    end_block = first_block + len(block_ids)
    group = GroupBlocks(first_block, tuple(block_ids))
    return Chunk(first_block * BLOCK_TOKENS, end_block * BLOCK_TOKENS, (group,))


def send_order(
    key: HandoffKey, addresses: Sequence[str], fingerprint: str, blocks: int, *, epoch: int, timeout_s: float = 10.0
) -> SendOrder:
    return SendOrder(key, tuple(addresses), epoch, fingerprint, blocks * BLOCK_TOKENS, timeout_s)


def blocks_bytes(pool: HostKvPool, blocks: int) -> int:
    """Bytes of so many blocks in all layers."""
    return blocks * BLOCK_TOKENS * pool.layout.token_bytes


def make_pool(layout: KvLayout, blocks: int, seed: int | None = None) -> HostKvPool:
    """Random bytes from `seed`; zeros without one."""
    rng = np.random.default_rng(seed)
    arrays = []
    for layer in range(len(layout.layers)):
        rows = np.zeros((blocks, layout.block_bytes(layer)), np.uint8)
        if seed is not None:
            rows[:] = rng.integers(0, 256, rows.shape, np.uint8)
        arrays.append(rows)
    return HostKvPool(layout, arrays)


def block_bytes(pool: HostKvPool, layer: int, block: int) -> bytes:
    return bytes(pool.buffers([Extent(layer, (block,))])[0])


def differing_blocks(
    source: HostKvPool, from_ids: Sequence[int], target: HostKvPool, to_ids: Sequence[int]
) -> list[int]:
    """Logical blocks that are not the same bytes in every layer."""
    layers = range(len(source.layout.layers))
    return [
        index
        for index, (source_id, target_id) in enumerate(zip(from_ids, to_ids, strict=True))
        if any(block_bytes(source, layer, source_id) != block_bytes(target, layer, target_id) for layer in layers)
    ]


@dataclass
class Ends:
    """What an endpoint reported."""

    received: list[ReceiveEnd] = field(default_factory=list)
    sent: list[SendReleased | SendEnd] = field(default_factory=list)

    @property
    def send_end(self) -> SendEnd | None:
        return next((event for event in self.sent if isinstance(event, SendEnd)), None)


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for a condition that another process or callback brings about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def until_granted(prefill: HandoffEndpoint, key: HandoffKey) -> None:
    """What is gathered from now on is gathered ahead of being sent."""

    def is_granted() -> bool:
        order = prefill._sender._orders.get(key)
        return order is not None and order.grant is not None

    await until(is_granted)


@dataclass
class Pair:
    """A prefill and a decode endpoint with a pool each."""

    prefill: HandoffEndpoint
    decode: HandoffEndpoint
    source: HostKvPool
    target: HostKvPool
    prefill_transport: Transport
    decode_transport: Transport
    ends: Ends = field(default_factory=Ends)

    def key(self, attempt: int = 1, delivery: int = 1, token: bytes | None = None) -> HandoffKey:
        return HandoffKey(token or os.urandom(16), attempt, delivery)

    def expect(
        self, key: HandoffKey, block_ids: Sequence[int], *, first_block: int = 0, timeout_s: float = 10.0
    ) -> None:
        expected = expectation(key.token, key.attempt, first_block, block_ids, timeout_s)
        self.decode.expect(expected, self.ends.received.append)

    def open(self, key: HandoffKey, blocks: int, *, epoch: int = DECODE_EPOCH, timeout_s: float = 10.0) -> None:
        fingerprint = self.source.layout.fingerprint()
        order = send_order(key, self.decode.addresses, fingerprint, blocks, epoch=epoch, timeout_s=timeout_s)
        self.prefill.open(order, self.ends.sent.append)

    def push(self, key: HandoffKey, block_ids: Sequence[int], *, first_block: int = 0) -> None:
        self.prefill.announce(key, chunk(first_block, block_ids))
        for layer in range(len(self.source.layout.layers)):
            self.prefill.layer_ready(key, layer)

    async def both_ended(self, timeout_s: float = 20.0) -> None:
        await until(lambda: self.ends.received and self.ends.send_end, timeout_s)


MakePair = Callable[..., Awaitable[Pair]]
