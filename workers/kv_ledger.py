"""What a worker's prefix cache holds, as the routers are told: numbered events, and a snapshot for who missed some."""

from __future__ import annotations

import array
import sys

from ..bus.ids import WorkerId
from ..bus.messages import AllBlocksCleared, BlockRemoved, BlockStored, KvEvent, KvEvents, KvSnapshot

SNAPSHOT_HASHES_MAX = 500_000  # 4 MB, half of the bus's largest message


class KvLedger:
    """Pure: events in, messages out."""

    def __init__(self, worker_id: WorkerId, epoch: int) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._held: dict[int, None] = {}  # in order of arrival
        self.seq = 0

    def apply(self, events: list[KvEvent]) -> KvEvents:
        """The next message for the routers."""
        for event in events:
            match event:
                case BlockStored():
                    self._held.update(dict.fromkeys(event.hashes))
                case BlockRemoved():
                    for block_hash in event.hashes:
                        self._held.pop(block_hash, None)
                case AllBlocksCleared():
                    self._held.clear()
        self.seq += 1
        return KvEvents(self._worker_id, self._epoch, self.seq, events)

    def snapshot(self, hashes_max: int = SNAPSHOT_HASHES_MAX) -> KvSnapshot:
        """Everything held after event `seq`; the oldest hashes when it is too much, for chains begin there."""
        packed = array.array("Q", list(self._held)[:hashes_max])
        if sys.byteorder == "big":
            packed.byteswap()
        is_complete = len(self._held) <= hashes_max
        return KvSnapshot(self._worker_id, self._epoch, self.seq, packed.tobytes(), is_complete)
