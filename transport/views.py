"""Pieces of a pool as numbers: a list of numpy views costs 2 us a piece to make, and as much to look at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from .base import Buffer, HostBuffer

Ranges = npt.NDArray[np.uint64]
"""(count, 2): address and length of each, which is also how `struct iovec` lies in memory."""


class Part(NamedTuple):
    """Runs of one contiguous array: where in it they begin, and how long each is (bytes)."""

    array: HostBuffer
    address: int  # of the array; to ask numpy for it costs more than all else here
    runs: npt.NDArray[np.uint64]  # (count, 2)


class Views(Sequence[HostBuffer]):
    """Runs of bytes of some arrays, none of them empty; each becomes a view when it is asked for."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part.runs) for part in parts))
        self.ranges: Ranges = np.empty((self._ends[-1] if parts else 0, 2), np.uint64)
        for part, end in zip(parts, self._ends, strict=True):
            ranges = self.ranges[end - len(part.runs) : end]
            ranges[:] = part.runs
            ranges[:, 0] += part.address
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
        number = bisect_right(self._ends, index)
        part = self._parts[number]
        start, nbytes = part.runs[index - self._ends[number] + len(part.runs)].tolist()
        return part.array[start : start + nbytes]


def total_bytes(buffers: Sequence[Buffer]) -> int:
    """Of all of them together."""
    return buffers.nbytes if isinstance(buffers, Views) else sum(buffer.nbytes for buffer in buffers)
