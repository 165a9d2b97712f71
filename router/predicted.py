"""What workers' caches will hold, or hold as far as we can guess: the blocks of prompts that were sent to them. Pure.

Kept beside the index of what workers have said, and never mixed with it. A burst of prompts with the same start goes
together because the first of them counts at once; a worker that says nothing, or too little, is known by it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, takewhile

from ..bus.ids import RequestId, WorkerId
from .index import PrefixIndex

PREDICTED_TTL_S = 5.0
"""For workers whose events come: by then the prompt is computed and told (Dynamo recommends the same)."""

APPROXIMATE_TTL_S = 120.0
"""For workers whose events do not come (Dynamo's `--router-ttl-secs`)."""

BLOCKS_MAX = 1 << 20
"""All workers together. Full: the worker that is given a prompt loses its own oldest blocks, ends of chains first, and
where it has none the prompt is not remembered."""


class PredictedIndex:
    """Blocks by worker, each with an end of its own. Time is an argument, in monotonic seconds."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._blocks = 0
        self._index = PrefixIndex()
        # By age: block -> until when, and for which request. In a chain the end is older than the start.
        self._until: dict[WorkerId, dict[int, tuple[float, RequestId]]] = {}

    def __len__(self) -> int:
        return self._blocks

    def placed(
        self, worker: WorkerId, request_id: RequestId, hashes: Sequence[int], *, until_s: float, capacity: int
    ) -> None:
        """The prompt goes to `worker`, which has room for `capacity` blocks, and counts as held there until `until_s`."""
        if worker not in self._until:
            self._until[worker] = {}
            self._index.add_worker(worker)
        blocks = self._until[worker]
        self._blocks -= len(blocks)
        kept = hashes[:capacity]
        for block_hash in [block for block in kept if block in blocks]:
            del blocks[block_hash]  # What is set again would keep its old place.
        blocks.update(dict.fromkeys(reversed(kept), (until_s, request_id)))
        self._index.store(worker, kept)
        room = min(capacity, self._blocks_max - self._blocks)
        self._blocks += len(blocks)
        self._forget(worker, list(islice(blocks, max(0, len(blocks) - room))))

    def released(self, worker: WorkerId, request_id: RequestId, hashes: Sequence[int]) -> None:
        """The request failed: what only it would have brought is not there. Blocks that others placed since stay."""
        blocks = self._until.get(worker, {})
        self._forget(worker, [block for block in hashes if block in blocks and blocks[block][1] == request_id])

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget the worker; unknown ones are ignored."""
        self._blocks -= len(self._until.pop(worker, ()))
        self._index.remove_worker(worker)

    def workers(self) -> list[WorkerId]:
        """Those with at least one prompt placed since they were removed last."""
        return list(self._until)

    def hit_blocks(self, hashes: Sequence[int], now: float) -> dict[WorkerId, int]:
        """As `PrefixIndex.hit_blocks`."""
        for worker, blocks in self._until.items():
            if blocks and next(iter(blocks.values()))[0] <= now:
                self._forget(worker, list(takewhile(lambda block: blocks[block][0] <= now, blocks)))  # noqa: B023  # Used up here.
        return self._index.hit_blocks(hashes) if self._blocks else {}

    def _forget(self, worker: WorkerId, hashes: Sequence[int]) -> None:
        if not hashes:
            return  # The worker may be one that nothing was placed on.
        for block_hash in hashes:
            del self._until[worker][block_hash]
        self._blocks -= len(hashes)
        self._index.drop(worker, hashes)
