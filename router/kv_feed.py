"""One worker's KV events in order: applied while they come without a gap, else held until a snapshot mends the gap. Pure."""

from __future__ import annotations

import array
import sys
from enum import Enum

from ..bus.ids import WorkerId
from ..bus.messages import KvEvent, KvEvents, KvSnapshot
from .index import PrefixIndex

HELD_MAX = 1024
"""Event messages kept while a snapshot is under way; past it the oldest are dropped and another snapshot is needed."""


class FeedMode(Enum):
    """How far the index can be trusted for this worker."""

    EXACT = "exact"
    CATCHING_UP = "catching_up"
    APPROXIMATE = "approximate"  # events are applied, but they are not the whole truth


class KvFeed:
    """Keeps `index` in step with one incarnation of a worker."""

    def __init__(self, index: PrefixIndex, worker: WorkerId) -> None:
        self._index = index
        self._worker = worker
        self._seq = 0
        self._held: list[KvEvents] = []
        self._is_whole = True  # the last snapshot was not cut
        self._is_doubted = False  # the engine does not confirm it
        self.mode = FeedMode.CATCHING_UP
        index.add_worker(worker)

    def on_events(self, message: KvEvents) -> bool:
        """True when a snapshot has to be fetched now."""
        if self.mode is FeedMode.CATCHING_UP:
            self._held = [*self._held[-HELD_MAX + 1 :], message]
            return False
        if message.seq <= self._seq:
            return False
        if message.seq != self._seq + 1:
            self.mode = FeedMode.CATCHING_UP
            self._held = [message]
            return True
        self._apply(message.seq, message.events)
        return False

    def on_heartbeat(self, seq: int) -> bool:
        """The worker has sent events up to `seq`; True when some are missing and a snapshot has to be fetched now."""
        if self.mode is not FeedMode.CATCHING_UP and seq > self._seq:
            self.mode = FeedMode.CATCHING_UP
            return True
        return False

    def on_snapshot(self, snapshot: KvSnapshot) -> bool:
        """Start over from the snapshot and what was held since; True when another one is needed.

        A snapshot that was cut leaves the worker APPROXIMATE: what it lacks may be there all the same.
        """
        hashes = array.array("Q")
        hashes.frombytes(snapshot.hashes)
        if sys.byteorder == "big":
            hashes.byteswap()
        self._index.clear(self._worker)
        self._index.store(self._worker, hashes)
        self._seq = snapshot.seq
        held, self._held = self._held, []
        self._is_whole = snapshot.is_complete
        self.mode = self._settled()
        is_short = False
        for message in held:  # After a gap the rest is held again, so every message must be seen.
            is_short = self.on_events(message) or is_short
        return is_short

    def on_truth(self, *, has_drifted: bool) -> bool:
        """Whether what the engine reports has drifted from the index; True when a snapshot has to be fetched now."""
        is_new = has_drifted and not self._is_doubted
        self._is_doubted = has_drifted
        if self.mode is FeedMode.CATCHING_UP:
            return False
        self.mode = self._settled()
        return is_new

    def _settled(self) -> FeedMode:
        return FeedMode.EXACT if self._is_whole and not self._is_doubted else FeedMode.APPROXIMATE

    def _apply(self, seq: int, events: list[KvEvent]) -> None:
        self._seq = seq
        self._index.apply(self._worker, events)
