"""Which leading blocks of a prompt are in which worker's prefix cache. Pure state, fed by KV events.

`BlockStored` and `BlockRemoved` carry Hocket's own chained hashes, so a hash stands for the whole prefix up to it. The
answer is exact whatever the order of events: a hole in the middle of a chain ends the run there. A bisection only guesses
where the last hit is, for to know that there is no hole needs each block's parent; every block before that is looked at, at
the speed of C (`itemgetter` and `groupby`), which pays because neighbours mostly have the same holders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter, length_hint

from ..bus.ids import WorkerId
from ..bus.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent

SETS_MAX = 4096
"""Distinct holder sets that are remembered, looked at once a message; past it all are forgotten, which costs no answer."""


class PrefixIndex:
    """`hash -> set of workers`, a set being the bits of an int; a worker's bit is reused after it left."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bits: dict[WorkerId, int] = {}
        self._held: dict[WorkerId, set[int]] = {}
        self._free_bits: list[int] = []
        self._sets: dict[int, int] = {}  # equal sets are one object: less memory, and groupby compares identities
        self._named = _Named(self._bits)

    def __len__(self) -> int:
        return len(self._holders)

    def blocks_of(self, worker: WorkerId) -> int:
        """How many blocks the index believes `worker` holds."""
        return len(self._held.get(worker, ()))

    def add_worker(self, worker: WorkerId) -> None:
        """Begin with an empty cache; a worker that is known starts over."""
        self.remove_worker(worker)
        self._bits[worker] = 1 << (self._free_bits.pop() if self._free_bits else len(self._bits))
        self._held[worker] = set()

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget the worker; unknown ones are ignored."""
        if worker in self._bits:
            self.clear(worker)
            del self._held[worker]
            self._free_bits.append(self._bits.pop(worker).bit_length() - 1)
            self._named.clear()  # The bit may be another worker's soon.

    def apply(self, worker: WorkerId, events: Iterable[KvEvent]) -> None:
        """Take over what changed; events of an unknown worker are ignored."""
        if worker not in self._bits:
            return
        for event in events:
            match event:
                case BlockStored():
                    self.store(worker, event.hashes)
                case BlockRemoved():
                    self.drop(worker, event.hashes)
                case AllBlocksCleared():
                    self.clear(worker)

    def store(self, worker: WorkerId, hashes: Iterable[int]) -> None:
        """The worker holds these blocks now."""
        bit, held, holders = self._bits[worker], self._held[worker], self._holders
        fresh = [block_hash for block_hash in hashes if block_hash not in held]
        one = self._sets_with_room().setdefault
        for block_hash in fresh:
            bits = holders.get(block_hash, 0) | bit
            holders[block_hash] = one(bits, bits)
        held.update(fresh)

    def clear(self, worker: WorkerId) -> None:
        """The worker holds nothing now."""
        self.drop(worker, list(self._held[worker]))

    def drop(self, worker: WorkerId, hashes: Iterable[int]) -> None:
        """The worker holds these blocks no more; blocks it did not hold are ignored."""
        bit, held, holders = self._bits[worker], self._held[worker], self._holders
        one = self._sets_with_room().setdefault
        for block_hash in hashes:
            if block_hash not in held:
                continue
            held.remove(block_hash)
            if left := holders[block_hash] & ~bit:
                holders[block_hash] = one(left, left)
            else:
                del holders[block_hash]

    def hit_blocks(self, hashes: Sequence[int]) -> dict[WorkerId, int]:
        """For each worker with at least one hit, how many leading blocks of the prompt it holds."""
        leading = self._leading(hashes)
        if not leading:
            return {}
        alive, depth, named = leading[0], len(leading), self._named
        hits: dict[WorkerId, int] = {}
        if leading[-1] is not alive or leading.count(alive) != depth:  # Else all of it is one run.
            ahead = iter(leading)
            for holders, _ in groupby(ahead):
                still = alive & holders
                if still != alive:
                    run_start = depth - 1 - length_hint(ahead)  # Of the run, one has been taken.
                    for worker in named[alive ^ still]:
                        hits[worker] = run_start
                    alive = still
                    if not alive:
                        return hits
        ends = dict.fromkeys(named[alive], depth)
        return hits | ends if hits else ends

    def _leading(self, hashes: Sequence[int]) -> tuple[int, ...]:
        """The holders of each block before the first that nobody holds."""
        holders, count = self._holders, len(hashes)
        if count and hashes[-1] not in holders:
            count = bisect_left(hashes, True, key=lambda block_hash: block_hash not in holders)
        while count > 1:
            try:
                found: tuple[int, ...] = itemgetter(*hashes[:count])(holders)
                return found
            except KeyError as hole:
                count = hashes.index(hole.args[0])
        return (holders[hashes[0]],) if count and hashes[0] in holders else ()

    def _sets_with_room(self) -> dict[int, int]:
        if len(self._sets) >= SETS_MAX:
            self._sets.clear()
        return self._sets


class _Named(dict[int, tuple[WorkerId, ...]]):
    """The workers of a holder set, remembered: a lookup is all that most sets cost."""

    def __init__(self, bits: Mapping[WorkerId, int]) -> None:
        super().__init__()
        self._bits = bits

    def __missing__(self, holders: int) -> tuple[WorkerId, ...]:
        if len(self) >= SETS_MAX:
            self.clear()
        workers = self[holders] = tuple(worker for worker, bit in self._bits.items() if holders & bit)
        return workers
