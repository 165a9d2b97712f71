"""Which leading blocks of a prompt are in which worker's prefix cache. Pure state, fed by KV events.

`BlockStored` and `BlockRemoved` carry Hocket's own chained hashes, so a hash stands for the whole prefix up to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..bus.ids import WorkerId
from ..bus.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent


class PrefixIndex:
    """`hash -> set of workers`, a set being the bits of an int; a worker's bit is reused after it left."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._bits: dict[WorkerId, int] = {}
        self._held: dict[WorkerId, set[int]] = {}
        self._free_bits: list[int] = []

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

    def apply(self, worker: WorkerId, events: Iterable[KvEvent]) -> None:
        """Take over what changed; events of an unknown worker are ignored."""
        if worker not in self._bits:
            return
        for event in events:
            match event:
                case BlockStored():
                    self.store(worker, event.hashes)
                case BlockRemoved():
                    self._drop(worker, event.hashes)
                case AllBlocksCleared():
                    self.clear(worker)

    def store(self, worker: WorkerId, hashes: Iterable[int]) -> None:
        """The worker holds these blocks now."""
        bit, held, holders = self._bits[worker], self._held[worker], self._holders
        for block_hash in hashes:
            holders[block_hash] = holders.get(block_hash, 0) | bit
            held.add(block_hash)

    def clear(self, worker: WorkerId) -> None:
        """The worker holds nothing now."""
        self._drop(worker, list(self._held[worker]))

    def hit_blocks(self, hashes: Sequence[int]) -> dict[WorkerId, int]:
        """For each worker with at least one hit, how many leading blocks of the prompt it holds."""
        alive, depth_of, depth = 0, {}, 0
        for depth, block_hash in enumerate(hashes):
            holders = self._holders.get(block_hash, 0)
            alive_here = holders if depth == 0 else alive & holders
            if lost := alive & ~alive_here:
                depth_of[lost] = depth
            alive = alive_here
            if not alive:
                break
        if alive:
            depth_of[alive] = depth + 1
        return {worker: blocks for worker, bit in self._bits.items() for bits, blocks in depth_of.items() if bits & bit}

    def _drop(self, worker: WorkerId, hashes: Iterable[int]) -> None:
        bit, held, holders = self._bits[worker], self._held[worker], self._holders
        for block_hash in hashes:
            if block_hash not in held:
                continue
            held.remove(block_hash)
            if left := holders[block_hash] & ~bit:
                holders[block_hash] = left
            else:
                del holders[block_hash]
