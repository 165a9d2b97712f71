"""Where slots lie in one run of memory: first fit over a list of holes. Arithmetic only, so it knows no GPU."""

from __future__ import annotations

import threading
from bisect import bisect_left


class Arena:
    """Hands out runs of `0..capacity_bytes` that never overlap. Thread-safe.

    First fit keeps low addresses busy and the rest in one piece. An allocation fails only when no hole is large enough,
    and there is at most one hole more than there are allocations, since neighbouring holes are joined.
    """

    def __init__(self, capacity_bytes: int, *, align_bytes: int = 256) -> None:
        if align_bytes < 1 or align_bytes & (align_bytes - 1):
            raise ValueError(f"alignment of {align_bytes} B is not a power of two")
        if capacity_bytes < align_bytes:
            raise ValueError(f"an arena of {capacity_bytes} B cannot hold one run of {align_bytes} B")
        self._align = align_bytes
        self.capacity_bytes = capacity_bytes // align_bytes * align_bytes
        self._lock = threading.Lock()
        self._starts = [0]  # of the holes, ascending
        self._ends = [self.capacity_bytes]
        self._taken: dict[int, int] = {}  # first byte -> end

    @property
    def free_bytes(self) -> int:
        """In all holes together."""
        with self._lock:
            return sum(self._ends) - sum(self._starts)

    @property
    def hole_bytes_max(self) -> int:
        """The largest allocation that would succeed now."""
        with self._lock:
            return max((end - start for start, end in zip(self._starts, self._ends, strict=True)), default=0)

    def reserve(self, nbytes: int) -> int | None:
        """The first byte of a run of `nbytes`, aligned; None when no hole is large enough now."""
        if nbytes < 1:
            raise ValueError(f"a run of {nbytes} B")
        size = -(-nbytes // self._align) * self._align
        with self._lock:
            for hole, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
                if end - start < size:
                    continue
                if end - start == size:
                    del self._starts[hole], self._ends[hole]
                else:
                    self._starts[hole] = start + size
                self._taken[start] = start + size
                return start
        return None

    def release(self, start: int) -> None:
        """Give back the run that begins there. Raises ValueError when it is not taken (given back twice)."""
        with self._lock:
            end = self._taken.pop(start, None)
            if end is None:
                raise ValueError(f"no run begins at byte {start}")
            hole = bisect_left(self._starts, start)
            joins_left = hole > 0 and self._ends[hole - 1] == start
            joins_right = hole < len(self._starts) and self._starts[hole] == end
            if joins_left and joins_right:
                self._ends[hole - 1] = self._ends[hole]
                del self._starts[hole], self._ends[hole]
            elif joins_left:
                self._ends[hole - 1] = end
            elif joins_right:
                self._starts[hole] = start
            else:
                self._starts.insert(hole, start)
                self._ends.insert(hole, end)
