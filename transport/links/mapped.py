"""Another process's shared memory, mapped here: found by the address that the peer has it at, then read by plain copies.

`process_vm_readv` walks the page tables of each page that it reads, which costs more than the copy itself. Memory in a sealed
memfd (`host_memory.py`) can be mapped instead, through the peer's entry in /proc, with the permission that the system
call needs. Everything else is read with the call.
"""

from __future__ import annotations

import ctypes
import os
import threading
from bisect import bisect_right
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from ..base import HostBuffer
from ..host_memory import map_shared
from ..views import Ranges

PIECE_BYTES = 256 << 10  # copied, then digested while it is in the core's cache
STEP_BYTES = 4 << 20  # then another pull may have its turn
ROW_BYTES_MAX = 40 << 10  # shorter blocks are moved by numpy, many with one call


class _Region(NamedTuple):
    start: int
    end: int
    view: HostBuffer | None  # None: cannot be mapped
    local: int  # address of `view`


class PeerMemory:
    """What is mapped of one process. Thread-safe; the mappings end with this object."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._regions: list[_Region] = []  # by start
        self._lock = threading.Lock()

    def here(self, ranges: Ranges) -> Ranges | None:
        """The same ranges of the peer (address, bytes) at this process's addresses; None unless one mapping holds them all."""
        region = self._region(int(ranges[:, 0].min()))
        if region is None or region.view is None:
            return None
        size, offsets = np.uint64(region.end - region.start), ranges[:, 0] - np.uint64(region.start)
        if offsets.max() > size or (ranges[:, 1] > size - offsets).any():  # Sums of what a peer says could wrap around.
            return None
        return np.stack([offsets + np.uint64(region.local), ranges[:, 1]], axis=1)

    def _region(self, address: int) -> _Region | None:
        with self._lock:
            place = bisect_right(self._regions, address, key=lambda region: region.start)
            if place and address < self._regions[place - 1].end:
                return self._regions[place - 1]
            region = self._look_up(address)
            if region is not None:
                self._regions.insert(place, region)
            return region

    def _look_up(self, address: int) -> _Region | None:
        for line in Path(f"/proc/{self.pid}/maps").read_text().splitlines():
            span, mode, offset, device, inode, *_ = line.split(maxsplit=5)
            start, end = (int(word, 16) for word in span.split("-"))
            if not start <= address < end:
                continue
            view = self._map(device, int(inode), int(offset, 16), end - start) if mode[3] == "s" else None
            return _Region(start, end, view, 0 if view is None else view.ctypes.data)
        return None

    def _map(self, device: str, inode: int, offset: int, nbytes: int) -> HostBuffer | None:
        """The file of a mapping, if the peer still has it open and it can not be cut short."""
        major, minor = (int(word, 16) for word in device.split(":"))
        with os.scandir(f"/proc/{self.pid}/fd") as entries:
            for entry in entries:
                try:
                    found = os.stat(entry.path)
                    if (found.st_dev, found.st_ino) == (os.makedev(major, minor), inode):
                        return _map_sealed(entry.path, offset, nbytes)
                except OSError:
                    continue  # Closed meanwhile, or no file that can be opened.
        return None


def _map_sealed(path: str, offset: int, nbytes: int) -> HostBuffer | None:
    """None for a file that may be cut short. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return map_shared(descriptor, nbytes, offset)
    except ValueError:
        return None
    finally:
        os.close(descriptor)


class Copy:
    """One message's bytes from ranges of memory into others, both of this process; both hold `nbytes`."""

    def __init__(self, sources: Ranges, targets: Ranges) -> None:
        self._row_bytes = _row_bytes(sources, targets)
        if self._row_bytes:
            self._from, self._to = _Rows(sources, self._row_bytes), _Rows(targets, self._row_bytes)
            self._scratch = np.empty((PIECE_BYTES // self._row_bytes, self._row_bytes), np.uint8)
            self._count = len(self._from.index)
        else:
            self._pieces = _pieces(sources, targets)
            self._count = len(self._pieces)
        self._next = 0

    @property
    def is_done(self) -> bool:
        return self._next == self._count

    def step(self, digest: xxhash.xxh3_64 | None) -> int:
        """Copy about STEP_BYTES more, digesting what was written; how many bytes that were."""
        return self._step_rows(digest) if self._row_bytes else self._step_pieces(digest)

    def _step_rows(self, digest: xxhash.xxh3_64 | None) -> int:
        at_once, moved_bytes = len(self._scratch), 0
        while moved_bytes < STEP_BYTES and self._next < self._count:
            end = min(self._next + at_once, self._count)
            rows = self._scratch[: end - self._next]
            np.take(self._from.rows, self._from.index[self._next : end], axis=0, out=rows, mode="clip")
            if digest is not None:
                digest.update(rows.data)
            self._to.rows[self._to.index[self._next : end]] = rows
            moved_bytes += rows.nbytes
            self._next = end
        return moved_bytes

    def _step_pieces(self, digest: xxhash.xxh3_64 | None) -> int:
        moved_bytes = 0
        while moved_bytes < STEP_BYTES and self._next < self._count:
            source, target, nbytes = self._pieces[self._next]
            ctypes.memmove(target, source, nbytes)
            if digest is not None:
                digest.update((ctypes.c_ubyte * nbytes).from_address(target))
            moved_bytes += nbytes
            self._next += 1
        return moved_bytes


class _Rows:
    """Ranges of one length, a multiple of it apart, as numpy sees them."""

    def __init__(self, ranges: Ranges, row_bytes: int) -> None:
        first = int(ranges[:, 0].min())
        self.index: npt.NDArray[np.int64] = ((ranges[:, 0] - np.uint64(first)) // np.uint64(row_bytes)).astype(np.int64)
        count = int(self.index.max()) + 1
        memory = (ctypes.c_ubyte * (count * row_bytes)).from_address(first)
        self.rows: npt.NDArray[np.uint8] = np.ctypeslib.as_array(memory).reshape(count, row_bytes)


def _row_bytes(sources: Ranges, targets: Ranges) -> int:
    """The length of every range, if they are all alike, many and short; else 0."""
    nbytes = int(sources[0, 1])
    if len(sources) < 4 or len(sources) != len(targets) or not 0 < nbytes <= ROW_BYTES_MAX:
        return 0
    for ranges in (sources, targets):
        apart = (ranges[:, 0] - ranges[:, 0].min()) % np.uint64(nbytes)
        if apart.any() or (ranges[:, 1] != nbytes).any():
            return 0
    return nbytes


def _pieces(sources: Ranges, targets: Ranges) -> list[tuple[int, int, int]]:
    """(source, target, bytes), PIECE_BYTES each at most: cut wherever a range of either side ends."""
    ends = [np.cumsum(ranges[:, 1]) for ranges in (sources, targets)]
    borders = np.arange(PIECE_BYTES, int(ends[0][-1]), PIECE_BYTES, dtype=np.uint64)
    cuts = np.unique(np.concatenate([*ends, borders]))
    starts = np.concatenate([np.zeros(1, np.uint64), cuts[:-1]])
    places = []
    for ranges, range_ends in zip((sources, targets), ends, strict=True):
        which = np.searchsorted(range_ends, starts, side="right")
        places.append(ranges[which, 0] + starts - (range_ends[which] - ranges[which, 1]))
    return list(zip(places[0].tolist(), places[1].tolist(), (cuts - starts).tolist(), strict=True))
