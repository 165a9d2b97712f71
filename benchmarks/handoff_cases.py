"""What `kv_handoff.py` moves: the cases, the memory of both sides, and how it is known that the right bytes came."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from hocket.transport import (
    Chunk,
    Expectation,
    GroupBlocks,
    HandoffKey,
    HostKvPool,
    KvLayer,
    KvLayout,
    KvShape,
    SendOrder,
)
from hocket.transport.base import KvPool
from hocket.transport.host_memory import SharedPages

MIB = 1 << 20
EPOCH = 1
ORDER_TIMEOUT_S = 60.0
STAGING_BYTES = 512 << 20  # of a GPU pool, for each side: what a worker has
RUN_BLOCK_BYTES = 64 << 10  # of the blocks that lie one after the other
_BLOCK_TOKENS = 16
_PLANES = 64  # 32 layers, K and V apart
_PLANE_BLOCKS = 64
_GOLDEN = 0x9E3779B97F4A7C15  # odd: the words of a pool are all different


class Case(msgspec.Struct, frozen=True):
    """In each layer every block, whose places on the two sides have nothing to do with each other, or one run."""

    name: str
    layers: int
    blocks: int
    block_bytes: int
    is_one_run: bool = False
    layer_ms: float = 0.0  # of computing before each layer; 0: all layers are there at once

    @property
    def kv_bytes(self) -> int:
        return self.layers * self.blocks * self.block_bytes

    @property
    def tokens(self) -> int:
        return self.blocks * _BLOCK_TOKENS

    def layout(self, digest: str) -> KvLayout:
        layers = tuple(KvLayer(f"layer.{layer}", 1, self.block_bytes // _BLOCK_TOKENS) for layer in range(self.layers))
        shape = KvShape((_BLOCK_TOKENS,))
        return KvLayout(
            "benchmark", "", "float16", "float16", layers, shape, digest="weighted" if digest == "weighted" else "xxh3"
        )

    def block_ids(self, side: str) -> tuple[int, ...]:
        """Of the prompt's blocks on the "prefill" or the "decode" side."""
        if self.is_one_run:
            return tuple(range(self.blocks))
        seed = {"prefill": 1, "decode": 2}[side]
        return tuple(np.random.default_rng(seed).permutation(self.blocks).tolist())

    def groups(self, side: str) -> tuple[GroupBlocks, ...]:
        return (GroupBlocks(0, self.block_ids(side)),)

    def expectation(self, token: bytes) -> Expectation:
        return Expectation(token, 1, self.groups("decode"), self.tokens, ORDER_TIMEOUT_S)

    def order(self, key: HandoffKey, address: str, fingerprint: str) -> SendOrder:
        return SendOrder(key, (address,), EPOCH, fingerprint, self.tokens, ORDER_TIMEOUT_S)

    def chunk(self) -> Chunk:
        return Chunk(0, self.tokens, self.groups("prefill"))


class Arena(Protocol):
    """The KV memory of one side, touched (a first touch would be measured); each case takes its beginning."""

    address: int
    nbytes: int
    kind: str  # for NIXL: "DRAM", "VRAM"
    gpu: int  # number of the GPU; 0 in host memory

    def enter(self) -> None:
        """A thread's first word to the device, for libraries that expect one."""


class Memory(Protocol):
    """The KV of one case on one side: all layers in one piece, block after block."""

    @property
    def pool(self) -> KvPool:
        """Its blocks; made when it is first asked for."""

    def fill(self) -> None:
        """Prefill side: words that are all different."""

    def spoil(self) -> None:
        """Decode side: words that no fill makes."""

    def wrong_blocks(self) -> int:
        """Decode side: blocks of all layers that are not what prefill's `fill` made."""


class HostArena:
    """Implements `Arena` with memory as the simulator has it."""

    kind = "DRAM"
    gpu = 0

    def __init__(self, nbytes: int) -> None:
        self.words = SharedPages(nbytes, touch=True).array.view(np.uint64)
        self.address = self.words.ctypes.data
        self.nbytes = nbytes

    def enter(self) -> None:
        pass


class HostMemory:
    """Implements `Memory` with numpy."""

    def __init__(self, case: Case, arena: HostArena) -> None:
        self._case = case
        self._words = arena.words[: case.kv_bytes // 8]
        self.rows: list[npt.NDArray[np.uint8]] = [
            layer.reshape(case.blocks, case.block_bytes) for layer in np.split(self._words.view(np.uint8), case.layers)
        ]
        self.pool = HostKvPool(case.layout("xxh3"), self.rows)

    def fill(self) -> None:
        words = np.arange(len(self._words), dtype=np.uint64)
        np.multiply(words, np.uint64(_GOLDEN), out=self._words)

    def spoil(self) -> None:
        self._words[:] = 0

    def wrong_blocks(self) -> int:
        case = self._case
        words = case.block_bytes // 8
        sources = np.array(case.block_ids("prefill"), np.uint64)
        targets = np.array(case.block_ids("decode"))
        wrong = 0
        for layer, rows in enumerate(self.rows):
            for part in block_parts(case.blocks, case.block_bytes):
                first = (sources[part] + np.uint64(layer * case.blocks)) * np.uint64(words)
                wanted = (first[:, None] + np.arange(words, dtype=np.uint64)) * np.uint64(_GOLDEN)
                wrong += int((rows[targets[part]].view(np.uint64) != wanted).any(axis=1).sum())
        return wrong


def block_parts(blocks: int, block_bytes: int) -> Iterator[slice]:
    """All blocks, 32 MiB at a time."""
    step = max(1, (32 * MIB) // block_bytes)
    yield from (slice(start, start + step) for start in range(0, blocks, step))


def contiguous(mib: int) -> Case:
    """So many MiB in one run of blocks of 64 KiB."""
    return Case(f"{mib} MiB in one run", 1, mib * MIB // RUN_BLOCK_BYTES, RUN_BLOCK_BYTES, is_one_run=True)


def scattered(kib: int) -> Case:
    """32 layers x 2 x 64 blocks of so many KiB."""
    return Case(f"32 x 2 x 64 blocks of {kib} KiB", _PLANES, _PLANE_BLOCKS, kib << 10)


def long_prompt() -> Case:
    """3,000 tokens of a 70B: 80 layers x 2 x 188 blocks of 32 KiB, 0.99 GB."""
    return Case("80 x 2 x 188 blocks of 32 KiB", 160, 188, 32 << 10)


def layer_by_layer(layer_ms: float) -> Case:
    """32 layers of 4 MiB in blocks of 64 KiB, each there so many milliseconds after the one before it."""
    return Case(f"layer by layer, 32 x 4 MiB, {layer_ms} ms each", 32, 64, 64 << 10, layer_ms=layer_ms)


def gpu_cases(device: str, *, quick: bool) -> list[Case]:
    """What is moved between two processes on a GPU; a toy of it where kernels are interpreted on the CPU."""
    if device == "interpreted":
        return [
            Case("2 MiB in one run", 1, 32, 64 << 10, is_one_run=True),
            Case("4 x 16 blocks of 16 KiB", 4, 16, 16 << 10),
            Case("4 layers", 4, 16, 16 << 10, layer_ms=5.0),
        ]
    layers = [layer_by_layer(0.5), layer_by_layer(2.5)]
    if quick:
        return [scattered(64), layers[0]]
    return [
        scattered(64),
        *layers,
        *map(contiguous, (16, 256, 1024)),
        scattered(16),
        scattered(32),
        *map(contiguous, (1, 4, 64)),
        long_prompt(),
    ]
