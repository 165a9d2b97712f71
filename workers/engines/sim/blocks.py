"""Paged KV blocks in small, as vLLM keeps them: reference counts, a prefix cache by chained hashes, LRU eviction.

Pure: no bytes, no clock. A block is free (its cached content may still be there, until it is needed) or held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from ....bus.messages import BlockRemoved, BlockStored, KvEvent


class BlockPool:
    """Blocks 0..blocks-1. Whoever holds a block gives it back once, with `release`."""

    def __init__(self, blocks: int) -> None:
        self._references = [0] * blocks
        self._hash_of: dict[int, int] = {}  # of blocks whose content is in the prefix cache
        self._block_of: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(blocks))  # the next one to take first
        self._events: list[KvEvent] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def cached_blocks(self) -> int:
        return len(self._block_of)

    def is_held(self, block: int) -> bool:
        """Whether somebody has it."""
        return self._references[block] > 0

    def hit(self, hashes: Iterable[int]) -> list[int]:
        """The cached blocks of the longest known start of this chain; they are not held yet."""
        found = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def allocate(self, hits: Sequence[int], fresh: int) -> list[int] | None:
        """Hold `hits` and `fresh` more blocks; None, and nothing has changed, when there are too few."""
        if fresh > len(self._free) - sum(self._references[block] == 0 for block in hits):
            return None
        for block in hits:
            self._free.pop(block, None)
            self._references[block] += 1
        return [*hits, *(self._take() for _ in range(fresh))]

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            if self._events and isinstance(last := self._events[-1], BlockRemoved):
                last.hashes.append(block_hash)
            else:
                self._events.append(BlockRemoved([block_hash]))
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back. The end of a chain is taken before its start, which more prompts share."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released twice"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)  # Nothing to lose there: take it first.

    def store(self, blocks: Sequence[int], hashes: Sequence[int], parent: int | None) -> None:
        """The held `blocks` now have the content of `hashes`, a chain after `parent`. Content known twice counts once."""
        run: list[int] = []
        for block, block_hash in zip(blocks, hashes, strict=True):
            if block_hash not in self._block_of and block not in self._hash_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block
                run.append(block_hash)
                continue
            self._note_stored(run, parent)
            run, parent = [], block_hash
        self._note_stored(run, parent)

    def _note_stored(self, run: list[int], parent: int | None) -> None:
        if run:
            self._events.append(BlockStored(run, parent))

    def take_events(self) -> list[KvEvent]:
        """What changed in the prefix cache since the last call."""
        events, self._events = self._events, []
        return events
