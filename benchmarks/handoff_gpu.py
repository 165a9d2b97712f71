"""KV in GPU memory for `kv_handoff.py`: the memory of both sides, the limit inside one process, and layers as they come."""

from __future__ import annotations

import asyncio
import time
from functools import cached_property

import torch
from handoff_cases import MIB, STAGING_BYTES, Case, block_parts
from handoff_methods import Facts, LayerSource, LoneSink

from hocket.transport.gpu.pool import CudaKvPool

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as a signed word; products wrap
PIECE_BYTES = 16 * MIB
PIECES = 8  # under way at a time
MATMUL = (1408, 8192)  # 0.24 ms on a Hopper chip


class GpuArena:
    """Implements `Arena` on a GPU; with `device` "interpreted", in host memory."""

    kind = "VRAM"

    def __init__(self, nbytes: int, device: str, gpu: int) -> None:
        self.is_cuda = device != "interpreted"
        self.gpu = gpu
        self.enter()
        self.words = torch.ones(nbytes // 8, dtype=torch.int64, device="cuda" if self.is_cuda else "cpu")
        self.address = self.words.data_ptr()
        self.nbytes = nbytes
        if not self.is_cuda:
            self.kind = "DRAM"
        self.wait()

    def enter(self) -> None:
        if self.is_cuda:
            torch.cuda.set_device(self.gpu)

    def wait(self) -> None:
        """Until the GPU has done all that it was told."""
        if self.is_cuda:
            torch.cuda.synchronize()


class GpuMemory:
    """Implements `Memory` with torch."""

    def __init__(self, case: Case, arena: GpuArena) -> None:
        self.case, self.arena = case, arena
        self.words = arena.words[: case.kv_bytes // 8]

    @cached_property
    def pool(self) -> CudaKvPool:
        case = self.case
        rows = self.words.view(torch.uint8).view(case.layers, case.blocks, case.block_bytes)
        return CudaKvPool(case.layout("weighted"), list(rows), STAGING_BYTES)

    def fill(self) -> None:
        fill_words(self.words)
        self.arena.wait()

    def spoil(self) -> None:
        self.words.zero_()
        self.arena.wait()

    def wrong_blocks(self) -> int:
        case, device = self.case, self.words.device
        words = case.block_bytes // 8
        sources, targets = (torch.tensor(case.block_ids(side), device=device) for side in ("prefill", "decode"))
        inside = torch.arange(words, device=device)
        wrong = 0
        for layer, rows in enumerate(self.words.view(case.layers, case.blocks, words)):
            for part in block_parts(case.blocks, case.block_bytes):
                first = (sources[part] + layer * case.blocks) * words
                wanted = (first[:, None] + inside) * _GOLDEN
                wrong += int((rows[targets[part]] != wanted).any(dim=1).sum())
        return wrong


def fill_words(words: torch.Tensor) -> None:
    """All different, as `HostMemory.fill`."""
    torch.arange(len(words), out=words)
    words.mul_(_GOLDEN)


class GpuCopySink(LoneSink):
    """Gather, copy and scatter in pieces on three streams of this process, as one CUDA graph."""

    def __init__(self, case: Case, memory: GpuMemory) -> None:
        self._case, self._memory = case, memory
        self._source = torch.empty_like(memory.words)
        fill_words(self._source)
        words = case.block_bytes // 8
        first = torch.arange(case.layers, device=self._source.device)[:, None] * case.blocks
        sides = (torch.tensor(case.block_ids(side), device=self._source.device) for side in ("prefill", "decode"))
        self._from, self._to = ((first + ids).reshape(-1) for ids in sides)
        self._rows = self._source.view(-1, words), memory.words.view(-1, words)
        step = min(len(self._from), max(1, PIECE_BYTES // case.block_bytes))
        self._parts = [slice(start, start + step) for start in range(0, len(self._from), step)]
        self._rings = [
            torch.empty(PIECES, step, words, dtype=torch.int64, device=self._source.device) for _ in range(2)
        ]
        self._graph: torch.cuda.CUDAGraph | None = None

    async def open(self) -> Facts:
        if self._memory.arena.is_cuda:
            await asyncio.to_thread(self._capture)
        return Facts()

    def move(self) -> float:
        self._memory.arena.wait()
        started = time.perf_counter()
        if self._graph:
            self._graph.replay()
        else:
            for number in range(len(self._parts)):
                for stage in (self._gather, self._copy, self._scatter):
                    stage(number)
        self._memory.arena.wait()
        return time.perf_counter() - started

    def _gather(self, number: int) -> None:
        places = self._from[self._parts[number]]
        torch.index_select(self._rows[0], 0, places, out=self._rings[0][number % PIECES, : len(places)])

    def _copy(self, number: int) -> None:
        count = len(self._from[self._parts[number]])
        self._rings[1][number % PIECES, :count].copy_(self._rings[0][number % PIECES, :count], non_blocking=True)

    def _scatter(self, number: int) -> None:
        places = self._to[self._parts[number]]
        # Of int64 words: of bytes it is five times slower.
        self._rows[1].index_copy_(0, places, self._rings[1][number % PIECES, : len(places)])

    def _capture(self) -> None:
        """Each piece goes through three streams; a piece of the ring is used again when the next stage is done with it."""
        self._memory.arena.enter()
        self.move()  # The first use of a kernel loads it, which a capture does not allow.
        main, *streams = (torch.cuda.Stream() for _ in range(4))
        done = [[torch.cuda.Event() for _ in self._parts] for _ in streams]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=main):
            for stream in streams:
                stream.wait_stream(main)
            for number in range(len(self._parts)):
                for at, work in enumerate((self._gather, self._copy, self._scatter)):
                    if at:
                        streams[at].wait_event(done[at - 1][number])
                    if at < 2 and number >= PIECES:
                        streams[at].wait_event(done[at + 1][number - PIECES])
                    with torch.cuda.stream(streams[at]):
                        work(number)
                    done[at][number].record(streams[at])
            for stream in streams:
                main.wait_stream(stream)
        self._graph = graph

    async def aclose(self) -> None:
        self._graph = None
        del self._source, self._rings


class PeerCopySink(GpuCopySink):
    """One copy from the first GPU, where the blocks lie as they are wanted, in one piece."""

    def __init__(self, case: Case, memory: GpuMemory) -> None:
        super().__init__(case, memory)
        self._gather_all()

    def _gather_all(self) -> None:
        wanted = torch.empty_like(self._rows[0])
        wanted.index_copy_(0, self._to, self._rows[0].index_select(0, self._from))
        self._source = wanted.view(-1).to("cuda:0")
        self._memory.arena.wait()

    async def open(self) -> Facts:
        return Facts()

    def move(self) -> float:
        self._memory.arena.enter()
        started = time.perf_counter()
        self._memory.words.copy_(self._source, non_blocking=True)
        self._memory.arena.wait()
        return time.perf_counter() - started


class GpuLayerSource(LayerSource):
    """Each layer's matmuls, then its gather on the same stream; `send` counts from the last matmul."""

    async def open(self, theirs: Facts) -> Facts:
        facts = await super().open(theirs)
        if torch.cuda.is_available():
            await asyncio.to_thread(self._warm_up)
        return facts

    def _warm_up(self) -> None:
        """Find out how many matmuls a layer is."""
        self._stream = torch.cuda.Stream()
        rows, inner = MATMUL
        self._input = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
        self._weight = torch.randn(inner, inner, device="cuda", dtype=torch.bfloat16)
        self._output = torch.empty_like(self._input)
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for number in range(60):
                if number == 20:
                    begin.record()
                torch.mm(self._input, self._weight, out=self._output)
            end.record()
        end.synchronize()
        self._matmuls = max(1, round(self._case.layer_ms / (begin.elapsed_time(end) / 40)))

    def _ready(self, loop: asyncio.AbstractEventLoop, layer: int, stream: object) -> None:
        self.endpoint.gather_ahead([self.key], range(layer + 1), stream)
        super()._ready(loop, layer, stream)

    def _compute(self, loop: asyncio.AbstractEventLoop) -> float:
        """When the last layer's matmuls had ended, by the GPU's clock; without a GPU nothing computes."""
        if not torch.cuda.is_available():
            return super()._compute(loop)
        begin, end = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
        self._stream.synchronize()
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):
            begin.record()
            for layer in range(self._case.layers):
                for _ in range(self._matmuls):
                    torch.mm(self._input, self._weight, out=self._output)
                if layer == self._case.layers - 1:
                    end.record()
                self._ready(loop, layer, self._stream)
        end.synchronize()
        return began + float(begin.elapsed_time(end)) / 1e3
