"""Lists of block ids in device memory, where every program of a launch reads its own.

Read from pinned memory, over the bus, they cost a launch of 16 MiB 4 us (blocks of 64 KiB: 880-940 GB/s instead of 1130 on
an H100) to 9 us (128 KiB: 690 instead of 1100). A small kernel that fetches a list first costs as much, but the layers of a
chunk have one list between them: it is fetched once.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from ..errors import TransportUnavailable

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

STREAMS_MAX = 4  # the pool's own two, and the engine's
_KNOWN_MAX = 64  # layers of one group have the same list, chunk for chunk


class BlockList:
    """Block ids as an array. Equal ids are one object for as long as they are remembered, so compare with `is`."""

    __slots__ = ("ids",)

    def __init__(self, ids: npt.NDArray[np.int64]) -> None:
        self.ids = ids


class BlockLists:
    """The lists that were used of late: each is checked and made an array once. Thread-safe."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._by_object: dict[int, tuple[tuple[int, ...], BlockList]] = {}  # by id(): hashing 256 ids takes 2 us
        self._by_value: dict[tuple[int, ...], BlockList] = {}

    def of(self, block_ids: tuple[int, ...]) -> BlockList:
        """The list of these ids. Raises IndexError for one outside of the pool, or none at all."""
        known = self._by_object.get(id(block_ids))
        if known is not None and known[0] is block_ids:
            return known[1]
        found = self._by_value.get(block_ids) or self._new(block_ids)
        if len(self._by_object) >= _KNOWN_MAX:
            self._by_object = {}
        self._by_object[id(block_ids)] = (block_ids, found)  # Held, so that its id stays its own.
        return found

    def _new(self, block_ids: tuple[int, ...]) -> BlockList:
        ids = np.fromiter(block_ids, np.int64, len(block_ids))
        # A negative one is huge as an unsigned one.
        if not len(ids) or ids.view(np.uint64).max() >= self._blocks:
            first, last = min(block_ids, default=0), max(block_ids, default=0)
            raise IndexError(f"blocks {first}..{last} of a pool of {self._blocks}")
        if len(self._by_value) >= _KNOWN_MAX:
            self._by_value = {}
        self._by_value[block_ids] = found = BlockList(ids)
        return found


class ListRing:
    """The lists of one stream's launches. Hold `lock` from `find` or `room` until the launch that reads it is queued.

    A stream runs what it is given in order, so words may be overwritten once the launches that read them are queued.
    """

    def __init__(self, address: int, words: int) -> None:
        self.lock = threading.Lock()
        self._address = address
        self._words = words
        self._next = 0
        self._known: dict[BlockList, int] = {}

    def find(self, blocks: BlockList | None) -> int | None:
        """Where this list is, if it still is."""
        return self._known.get(blocks) if blocks is not None else None

    def keep(self, blocks: BlockList, address: int) -> None:
        """The list was fetched there and can be found, until the ring comes round."""
        self._known[blocks] = address

    def room(self, words: int) -> int:
        """Where the next list goes. Raises ValueError when the ring is shorter."""
        if words > self._words:
            raise ValueError(f"a list of {words} blocks; {self._words} are the most")
        if self._next + words > self._words:
            self._next = 0
            self._known.clear()
        address = self._address + self._next * 8
        self._next += words
        return address


class ListRings:
    """A ring for each of the first four streams; the lists of any later one stay in pinned memory."""

    def __init__(self, device: torch.device, words: int) -> None:
        # All at once: memory from torch's cache may still be used by the stream that gave it back.
        self._memory = torch.zeros(STREAMS_MAX * words, dtype=torch.int64, device=device)
        first: int = self._memory.data_ptr()
        self._free = [ListRing(first + index * words * 8, words) for index in range(STREAMS_MAX)]
        self._rings: dict[int, ListRing | None] = {}
        self._lock = threading.Lock()

    def of(self, stream: int) -> ListRing | None:
        """The ring of a stream (its CUDA handle)."""
        try:
            return self._rings[stream]
        except KeyError:
            with self._lock:
                return self._rings.setdefault(stream, self._free.pop() if self._free else None)
