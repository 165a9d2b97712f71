"""A KV pool in host memory: one byte array for each layer, a row for each block."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from .base import Extent, HostBuffer
from .layout import KvLayout
from .views import Part, Views

TRANSPOSED_K = "HKtV"
"""The order of vLLM's CPU kernels, followed by the bytes of a number: of each head K as (dim, tokens), V as (tokens, dim)."""
SCRATCH_BYTES = 1 << 20  # stays in a core's cache
DIGEST_RUN_BYTES = 128 << 10  # longer runs are digested where they lie


class _Blocks(NamedTuple):
    """Blocks of one size, in some order. Shared: nobody writes into the arrays."""

    ids: npt.NDArray[np.int64]
    first: int
    last: int  # -1: there are none
    runs: npt.NDArray[np.uint64]  # (count, 2): bytes from the layer's beginning, bytes


class HostKvPool:
    """Blocks as rows of uint8 arrays (blocks, block bytes), one array a layer; the arrays stay the caller's.

    A row must be contiguous; rows may lie apart. Keep the arrays alive and pre-touched as long as the pool is used
    (first touch of memory is 10x slower than a copy).
    """

    def __init__(self, layout: KvLayout, layers: Sequence[npt.NDArray[np.uint8]]) -> None:
        if len(layers) != len(layout.layers):
            raise ValueError(f"{len(layers)} arrays for {len(layout.layers)} layers")
        if layout.digest != "xxh3":
            raise ValueError(f"KV in host memory is digested by xxh3, not {layout.digest}")
        blocks = len(layers[0])
        for index, (layer, rows) in enumerate(zip(layout.layers, layers, strict=True)):
            block_bytes = layout.block_bytes(index)
            if rows.dtype != np.uint8 or rows.shape != (blocks, block_bytes):
                raise ValueError(f"layer {layer.name} is {rows.dtype}{rows.shape}, not uint8{(blocks, block_bytes)}")
            if block_bytes > 1 and rows.strides[1] != 1:
                raise ValueError(f"rows of layer {layer.name} are not contiguous: strides {rows.strides}")
            if not rows.flags.writeable:
                raise ValueError(f"layer {layer.name} is read-only")
        self._layout = layout
        self._layers = list(layers)
        # Only rows without a gap may be joined; a flat view then gives a run of blocks as one slice.
        self._flat = [rows.reshape(-1) if rows.flags.c_contiguous else None for rows in layers]
        self._addresses = [rows.ctypes.data for rows in layers]
        self._blocks = blocks
        self._local = threading.local()

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def blocks(self) -> int:
        return self._blocks

    def buffers(self, extents: Iterable[Extent]) -> Views:
        """Views of whole blocks in that order, neighbours in memory as one view. Raises IndexError."""
        parts = []
        for extent in extents:
            assert extent.cut is None, "a cut has no views, only copies"
            rows, flat, address = self._layers[extent.layer], self._flat[extent.layer], self._addresses[extent.layer]
            found, size = self._checked(extent), rows.shape[1]
            if flat is None:
                whole = np.array([[0, size]], np.uint64)
                parts += [Part(rows[block], address + block * rows.strides[0], whole) for block in extent.block_ids]
            elif len(found.runs):
                parts.append(Part(flat, address, found.runs))
        return Views(parts)

    def digest(self, extents: Iterable[Extent]) -> int:
        """xxh3-64 over the bytes of whole blocks in that order. Thread-safe; releases the GIL for what is large."""
        extents = tuple(extents)
        if not self.is_scattered(extents, DIGEST_RUN_BYTES):
            return digest_of(self.buffers(extents))
        # One call for many blocks: with one for each, two threads would fight for the GIL at each of them.
        digest = xxhash.xxh3_64()
        scratch = self._scratch()
        for extent in extents:
            ids, rows = self._checked(extent).ids, self._layers[extent.layer]
            if rows.shape[1] >= DIGEST_RUN_BYTES:
                for view in self.buffers((extent,)):
                    digest.update(view.data)
                continue
            step = len(scratch) // rows.shape[1]
            for start in range(0, len(ids), step):
                part = ids[start : start + step]
                blocks = scratch[: len(part) * rows.shape[1]].reshape(len(part), rows.shape[1])
                np.take(rows, part, axis=0, out=blocks, mode="clip")
                digest.update(blocks.data)
        return digest.intdigest()

    def _scratch(self) -> HostBuffer:
        """A thread's own memory, touched, for as long as the thread lives."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = np.empty(SCRATCH_BYTES, np.uint8)
        scratch: HostBuffer = self._local.scratch
        return scratch

    def is_scattered(self, extents: Iterable[Extent], run_bytes: int) -> bool:
        """Whether whole blocks lie in runs shorter than that on the average, in layers that `pack` reads at once."""
        nbytes = runs = 0
        for extent in extents:
            if self._flat[extent.layer] is None:
                return False
            found = self._checked(extent)
            runs += len(found.runs)
            nbytes += len(found.ids) * self._layers[extent.layer].shape[1]
        return nbytes < runs * run_bytes

    def pack(self, extents: Iterable[Extent], out: HostBuffer) -> None:
        """Copy cuts in canonical order (K/V, token, head, dim), or whole blocks, one after the other, into `out`.

        Thread-safe. Raises IndexError.
        """
        start = 0
        for extent in extents:
            if extent.cut is None:
                ids, rows = self._checked(extent).ids, self._layers[extent.layer]
                end = start + len(ids) * rows.shape[1]
                blocks = out[start:end].reshape(len(ids), rows.shape[1])
                np.take(rows, ids, axis=0, out=blocks, mode="clip")  # "raise" would go through one more copy.
            else:
                cells = self._cells(extent)
                end = start + cells.size
                out[start:end].reshape(cells.shape)[:] = cells
            start = end

    def unpack(self, extents: Iterable[Extent], source: HostBuffer) -> None:
        """What `pack` has put together goes into these cuts or blocks. Thread-safe for other blocks. Raises IndexError."""
        start = 0
        for extent in extents:
            if extent.cut is None:
                ids, rows = self._checked(extent).ids, self._layers[extent.layer]
                end = start + len(ids) * rows.shape[1]
                rows[ids] = source[start:end].reshape(len(ids), rows.shape[1])
                start = end
                continue
            layer = self._layout.layers[extent.layer]
            shape = (layer.parts, extent.cut.tokens, extent.cut.heads, layer.head_bytes // layer.parts)
            end = start + int(np.prod(shape))
            self._put(extent, source[start:end].reshape(shape))
            start = end

    def _checked(self, extent: Extent) -> _Blocks:
        found = _blocks_of(extent.block_ids, self._layers[extent.layer].shape[1])
        if not found.first >= 0 or not found.last < self._blocks:
            raise IndexError(f"blocks {found.first}..{found.last} of a pool of {self._blocks}")
        return found

    def _part_views(self, layer: int) -> list[npt.NDArray[np.uint8]]:
        """K and V of a layer, in place: each (blocks, tokens, heads, items, item bytes)."""
        order = self._layout.shape.order
        info, tokens = self._layout.layers[layer], self._layout.block_tokens(layer)
        heads = len(self._layout.rank_heads(layer))
        dim = info.head_bytes // info.parts
        if order in ("HND", "NHD"):
            token, head = info.head_bytes, tokens * info.head_bytes
            if order == "NHD":
                token, head = heads * info.head_bytes, info.head_bytes
            return [self._view(layer, part * dim, (token, head, dim), dim) for part in range(info.parts)]
        assert order.startswith(TRANSPOSED_K), f"blocks of the unknown order {order} are only sent whole"
        item = int(order.removeprefix(TRANSPOSED_K))
        head = tokens * info.head_bytes
        return [
            self._view(layer, 0, (item, head, tokens * item), item),
            self._view(layer, tokens * dim, (dim, head, item), item),
        ]

    def _view(self, layer: int, offset: int, strides: tuple[int, int, int], item: int) -> npt.NDArray[np.uint8]:
        """Of one part, from `offset` of each block; `strides` are those of tokens, heads and items."""
        rows, info = self._layers[layer], self._layout.layers[layer]
        shape = (
            self._blocks,
            self._layout.block_tokens(layer),
            len(self._layout.rank_heads(layer)),
            info.head_bytes // info.parts // item,
            item,
        )
        return np.lib.stride_tricks.as_strided(rows[:, offset:], shape, (rows.strides[0], *strides, 1), writeable=True)

    def _cells(self, extent: Extent) -> npt.NDArray[np.uint8]:
        """A copy of a cut: (parts, tokens, heads, dim bytes)."""
        cut = extent.cut
        assert cut
        heads = slice(cut.first_head, cut.first_head + cut.heads)
        parts = []
        for view in self._part_views(extent.layer):
            found = view[np.array(extent.block_ids), :, heads]
            tokens = found.reshape(-1, cut.heads, found.shape[3] * found.shape[4])
            parts.append(tokens[cut.first_token : cut.first_token + cut.tokens])
        return np.stack(parts)

    def _put(self, extent: Extent, cells: npt.NDArray[np.uint8]) -> None:
        cut = extent.cut
        assert cut
        positions = np.arange(cut.first_token, cut.first_token + cut.tokens)
        block_tokens = self._layout.block_tokens(extent.layer)
        blocks = np.array(extent.block_ids)[positions // block_tokens]
        heads = slice(cut.first_head, cut.first_head + cut.heads)
        for view, part in zip(self._part_views(extent.layer), cells, strict=True):
            view[blocks, positions % block_tokens, heads] = part.reshape(cut.tokens, cut.heads, *view.shape[3:])


@lru_cache(256)
def _blocks_of(block_ids: tuple[int, ...], block_bytes: int) -> _Blocks:
    """Asked for again in every layer of a chunk, and for each several times."""
    ids = np.array(block_ids, np.int64)
    if not len(ids):
        return _Blocks(ids, 0, -1, np.empty((0, 2), np.uint64))
    firsts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)  # Each begins a run.
    runs = np.stack([ids[firsts], np.diff(firsts, append=len(ids))], axis=1) * block_bytes
    return _Blocks(ids, int(ids.min()), int(ids.max()), runs.astype(np.uint64))


def digest_of(buffers: Iterable[HostBuffer]) -> int:
    """xxh3-64 over these bytes in that order."""
    digest = xxhash.xxh3_64()
    for view in buffers:
        digest.update(view.data)
    return digest.intdigest()
