"""Reading another process's memory: `process_vm_readv` over two lists of ranges, or plain copies of what can be mapped.

The kernel copies from the one process's pages into the other's with nobody in between: about what a memcpy does. It
wants the same user (or CAP_SYS_PTRACE), Yama's ptrace_scope 0 (or 1 with the permission that `allow_readers` gives),
and a sandbox that does not forbid the call.
"""

from __future__ import annotations

import ctypes
import errno
import os
from bisect import bisect_left
from collections.abc import Sequence
from ctypes import c_int, c_ssize_t, c_ulong, c_void_p
from pathlib import Path

import numpy as np
import xxhash

from ..base import HostBuffer
from ..views import Ranges, Views
from .cursor import Cursor, address_of
from .mapped import Copy, PeerMemory

PIECE_BYTES = 4 << 20  # of one system call: 0.3 ms, 95 to 98 % of memcpy's speed; 1 MiB: 80 to 90 %
SHORT_BYTES = 1 << 20  # copied in 0.1 ms, which is less than it takes to wake a thread
RANGES_MAX = 1024  # of one system call: IOV_MAX
YAMA_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER, _PTRACER_ANY = 0x59616D61, c_ulong(-1)

_libc = ctypes.CDLL(None, use_errno=True)
_readv = _libc.process_vm_readv
_readv.argtypes = [c_int, c_void_p, c_ulong, c_void_p, c_ulong, c_ulong]
_readv.restype = c_ssize_t


def ranges_of(buffers: Sequence[HostBuffer]) -> Ranges:
    """Where these buffers lie; neighbours are joined and empty ones left out."""
    if isinstance(buffers, Views):
        return buffers.ranges
    addresses, lengths = [address_of(buffer) for buffer in buffers], [buffer.nbytes for buffer in buffers]
    ranges = np.array([addresses, lengths], np.uint64).T
    ranges = ranges[ranges[:, 1] > 0]
    if len(ranges) < 2:
        return ranges
    is_first = np.ones(len(ranges), bool)
    is_first[1:] = ranges[1:, 0] != ranges[:-1, 0] + ranges[:-1, 1]
    starts = np.flatnonzero(is_first)
    return np.stack([ranges[starts, 0], np.add.reduceat(ranges[:, 1], starts)], axis=1)


def allow_readers() -> None:
    """Where Yama lets only a parent read its child (scope 1), let every process of this user read this one."""
    if _yama_scope() == 1:
        _libc.prctl(_PR_SET_PTRACER, _PTRACER_ANY, 0, 0, 0)


def why_not(error: OSError) -> str:
    """What would help, for a failure to read."""
    if error.errno == errno.ESRCH:
        return f"{error.strerror}: it has gone, or is in a pid namespace that this process does not see"
    if error.errno not in (errno.EPERM, errno.EACCES):
        return str(error.strerror)
    scope = _yama_scope()
    hint = "both must run as one user and be dumpable; in a container the seccomp profile must allow process_vm_readv"
    if scope > 1:
        hint = f"kernel.yama.ptrace_scope is {scope}: set it to 1 or 0, or give both processes CAP_SYS_PTRACE"
    return f"{error.strerror}: {hint}"


def _yama_scope() -> int:
    try:
        return int(YAMA_SCOPE.read_text())
    except (OSError, ValueError):
        return 0


def _checked_ranges(words: bytes, nbytes: int) -> Ranges:
    """What `ranges_of` gave at the peer. Raises ValueError."""
    ranges = np.frombuffer(words[: len(words) // 16 * 16], "<u8").reshape(-1, 2)
    lengths = ranges[:, 1]
    if not len(ranges) or not lengths.min() or lengths.max() > nbytes or int(lengths.sum()) != nbytes:
        raise ValueError(f"{len(ranges)} ranges of memory are not {nbytes} B")
    return ranges


def read_memory(pid: int, address: int, nbytes: int) -> bytes:
    """A few bytes of another process. Raises OSError."""
    place = np.empty(nbytes, np.uint8)
    Reader(PeerMemory(pid), np.array([address, nbytes], np.uint64).tobytes(), nbytes, [place]).step(None)
    return place.tobytes()


class _Side:
    """One side's ranges as a run of bytes, out of which a piece is taken at a time."""

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._ends: list[int] = np.cumsum(ranges[:, 1]).tolist()
        self._first = 0  # the range that the next byte lies in

    def end_of_piece(self, end: int) -> int:
        """How far a piece may go, `end` at most, to have no more than RANGES_MAX ranges."""
        last = self._first + RANGES_MAX - 1
        return min(end, self._ends[last]) if last < len(self._ends) else end

    def piece(self, start: int, end: int) -> Ranges:
        """The ranges of those bytes."""
        last = bisect_left(self._ends, end, self._first)
        piece = self._ranges[self._first : last + 1].copy()
        piece[-1, 1] -= self._ends[last] - end
        skipped = start - (self._ends[self._first - 1] if self._first else 0)
        piece[0, 0] += skipped
        piece[0, 1] -= skipped
        self._first = last + (self._ends[last] == end)
        return piece


class Reader:
    """Some ranges of a process, read into the front of these buffers; a `pulls.Pull`."""

    def __init__(self, memory: PeerMemory, words: bytes, nbytes: int, buffers: Sequence[HostBuffer]) -> None:
        """`words` are the ranges, as a peer sent them; they are looked at in the first step."""
        self._memory = memory
        self._words = words
        self._buffers = buffers
        self._pull: Copy | _SystemCalls | None = None
        self._nbytes = nbytes

    @property
    def is_done(self) -> bool:
        return self._pull is not None and self._pull.is_done

    @property
    def is_short(self) -> bool:
        ranges = max(len(self._words) // 16, len(self._buffers))
        return self._nbytes <= SHORT_BYTES and ranges <= RANGES_MAX

    def step(self, digest: xxhash.xxh3_64 | None) -> int:
        """Read the next piece. Raises OSError: the process is gone, or what it offered is no memory of its any more.

        Raises ValueError when the ranges are not `nbytes`.
        """
        if self._pull is None:
            ranges = _checked_ranges(self._words, self._nbytes)
            here = self._memory.here(ranges)
            if here is not None:
                self._pull = Copy(here, _front(ranges_of(self._buffers), self._nbytes))
            else:
                self._pull = _SystemCalls(self._memory.pid, ranges, self._buffers, self._nbytes)
        return self._pull.step(digest)

    def close(self) -> None:
        pass


class _SystemCalls:
    """`process_vm_readv`, PIECE_BYTES with each."""

    def __init__(self, pid: int, ranges: Ranges, buffers: Sequence[HostBuffer], nbytes: int) -> None:
        self._pid = pid
        self._sides = _Side(ranges), _Side(ranges_of(buffers))
        self._read = Cursor(buffers)
        self._done_bytes, self._nbytes = 0, nbytes

    @property
    def is_done(self) -> bool:
        return self._done_bytes == self._nbytes

    def step(self, digest: xxhash.xxh3_64 | None) -> int:
        start, end = self._done_bytes, min(self._done_bytes + PIECE_BYTES, self._nbytes)
        for side in self._sides:
            end = side.end_of_piece(end)
        remote, local = (side.piece(start, end) for side in self._sides)
        count: int = _readv(self._pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        if count < end - start:
            raise OSError(errno.EFAULT, f"read {count} of {end - start} B of process {self._pid}")
        self._done_bytes = end
        if digest is not None:
            for view in self._read.take(count):
                digest.update(view)
        return count


def _front(ranges: Ranges, nbytes: int) -> Ranges:
    """The first `nbytes` of these ranges."""
    ends = np.cumsum(ranges[:, 1])
    last = int(np.searchsorted(ends, nbytes))
    front = ranges[: last + 1].copy()
    front[-1, 1] -= ends[last] - np.uint64(nbytes)
    return front
