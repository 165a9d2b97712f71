"""A KV pool in host memory: one byte array for each layer, a row for each block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from .base import Buffer
from .layout import KvLayout


class HostKvPool:
    """Blocks as rows of uint8 arrays (blocks, layer_block_bytes), one array a layer; the arrays stay the caller's.

    A row must be contiguous; rows may lie apart. Keep the arrays alive and pre-touched as long as the pool is used
    (first touch of memory is 10x slower than a copy).
    """

    def __init__(self, layout: KvLayout, layers: Sequence[npt.NDArray[np.uint8]]) -> None:
        if len(layers) != len(layout.layer_names):
            raise ValueError(f"{len(layers)} arrays for {len(layout.layer_names)} layers")
        blocks = len(layers[0])
        for name, block_bytes, rows in zip(layout.layer_names, layout.layer_block_bytes, layers, strict=True):
            if rows.dtype != np.uint8 or rows.shape != (blocks, block_bytes):
                raise ValueError(f"layer {name} is {rows.dtype}{rows.shape}, not uint8{(blocks, block_bytes)}")
            if block_bytes > 1 and rows.strides[1] != 1:
                raise ValueError(f"rows of layer {name} are not contiguous: strides {rows.strides}")
            if not rows.flags.writeable:
                raise ValueError(f"layer {name} is read-only")
        self._layout = layout
        self._layers = list(layers)
        # Only rows without a gap may be joined; a flat view then gives a run of blocks as one slice.
        self._flat = [rows.reshape(-1) if rows.flags.c_contiguous else None for rows in layers]
        self._blocks = blocks

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def blocks(self) -> int:
        return self._blocks

    def buffers(self, layer: int, block_ids: Sequence[int]) -> list[Buffer]:
        """Views of those blocks in that order, neighbours in memory as one view. Raises IndexError."""
        if block_ids and (min(block_ids) < 0 or max(block_ids) >= self._blocks):
            raise IndexError(f"blocks {min(block_ids)}..{max(block_ids)} of a pool of {self._blocks}")
        flat = self._flat[layer]
        if flat is None:
            rows = self._layers[layer]
            return [rows[block] for block in block_ids]
        size = self._layout.layer_block_bytes[layer]
        return [flat[first * size : end * size] for first, end in _runs(block_ids)]

    def digest(self, layer: int, block_ids: Sequence[int]) -> int:
        """xxh3-64 over the bytes of those blocks in that order. Thread-safe; releases the GIL for large runs."""
        digest = xxhash.xxh3_64()
        for view in self.buffers(layer, block_ids):
            digest.update(view.data)
        return digest.intdigest()


def _runs(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Join ascending neighbours: 4, 5, 6, 9 -> (4, 7), (9, 10)."""
    runs: list[tuple[int, int]] = []
    first = end = -1
    for block in block_ids:
        if block == end:
            end += 1
            continue
        if end > first:
            runs.append((first, end))
        first, end = block, block + 1
    if end > first:
        runs.append((first, end))
    return runs
