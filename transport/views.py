"""Pieces of a pool as numbers: a list of numpy views costs 2 us a piece to make, and as much to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from .base import Buffer, HostBuffer

Ranges = npt.NDArray[np.uint64]
"""(count, 2): address and length of each, which is also how `struct iovec` lies in memory."""


class Views(Sequence[HostBuffer]):
    """Runs of bytes of some arrays, none of them empty; each becomes a view when it is asked for."""

    def __init__(self, parts: Sequence[tuple[HostBuffer, npt.NDArray[np.int64], npt.NDArray[np.int64]]]) -> None:
        """A part: a contiguous array, where in it the runs begin, and how long each is (bytes)."""
        self._parts = parts
        self._ends = np.cumsum([len(starts) for _, starts, _ in parts], dtype=np.int64)
        ranges = [np.stack([starts + array.ctypes.data, lengths], axis=1) for array, starts, lengths in parts]
        self.ranges: Ranges = (np.concatenate(ranges) if ranges else np.empty((0, 2))).astype(np.uint64)
        self.nbytes = int(self.ranges[:, 1].sum())

    def __len__(self) -> int:
        return len(self.ranges)

    @overload
    def __getitem__(self, index: int) -> HostBuffer: ...
    @overload
    def __getitem__(self, index: slice) -> list[HostBuffer]: ...
    def __getitem__(self, index: int | slice) -> HostBuffer | list[HostBuffer]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"run {index} of {len(self)}")
        index %= len(self)
        part = int(np.searchsorted(self._ends, index, side="right"))
        array, starts, lengths = self._parts[part]
        index -= int(self._ends[part]) - len(starts)
        return array[starts[index] : starts[index] + lengths[index]]


def total_bytes(buffers: Sequence[Buffer]) -> int:
    """Of all of them together."""
    return buffers.nbytes if isinstance(buffers, Views) else sum(buffer.nbytes for buffer in buffers)
