"""What workers' caches will hold, or hold as far as we can guess: the blocks of prompts that were sent to them. Pure.

Kept beside the index of what workers have said, and never mixed with it. A burst of prompts with the same start goes
together because the first of them counts at once; a worker that says nothing, or too little, is known by it alone.

A prompt of thousands of blocks is placed and forgotten as a whole, so blocks are not looked at one by one: a hash stands for
the whole prefix up to it, and the prompts make a tree of what they share (as in SGLang's radix cache). Two chains part at a
place that bisection finds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from ..bus.ids import RequestId, WorkerId

PREDICTED_TTL_S = 5.0
"""For workers whose events come: by then the prompt is computed and told (Dynamo recommends the same)."""

APPROXIMATE_TTL_S = 120.0
"""For workers whose events do not come (Dynamo's `--router-ttl-secs`)."""

BLOCKS_MAX = 1 << 20
"""All workers together. Full: the worker that is given a prompt loses its own oldest blocks, ends of chains first, and
where it has none the prompt is not remembered."""


class PredictedIndex:
    """Prompts by worker, each with an end of its own. Time is an argument, in monotonic seconds.

    A block that two prompts share at a worker belongs to the one that was placed last.
    """

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._blocks = 0
        self._root = _Node((), None)
        self._held: dict[WorkerId, _Held] = {}
        self._ends: list[tuple[float, int, _Placement]] = []  # a heap; who has no block left stays in it until then
        self._number = count()

    def __len__(self) -> int:
        return self._blocks

    def placed(
        self, worker: WorkerId, request_id: RequestId, hashes: Sequence[int], *, until_s: float, capacity: int
    ) -> None:
        """The prompt goes to `worker`, which has room for `capacity` blocks, and counts as held there until `until_s`."""
        self.released(worker, request_id)
        held = self._held.setdefault(worker, _Held())
        if path := self._grown(hashes[:capacity]):
            placement = held.by_age[request_id] = _Placement(worker, request_id, path[-1])
            for node in path:
                self._leave(node, worker)
                node.holders[worker] = placement
                self._count(placement, len(node.hashes))
            heappush(self._ends, (until_s, next(self._number), placement))
        room = min(capacity, self._blocks_max - self._blocks + held.blocks)
        while held.blocks > room:
            self._shorten(next(iter(held.by_age.values())), held.blocks - room)

    def released(self, worker: WorkerId, request_id: RequestId) -> None:
        """The request failed: what only it would have brought is not there. Blocks that others placed since stay."""
        held = self._held.get(worker)
        if held is not None and (placement := held.by_age.get(request_id)):
            self._shorten(placement, placement.blocks)

    def remove_worker(self, worker: WorkerId) -> None:
        """Forget the worker; unknown ones are ignored."""
        if worker in self._held:
            for placement in list(self._held[worker].by_age.values()):
                self._shorten(placement, placement.blocks)
            del self._held[worker]

    def workers(self) -> list[WorkerId]:
        """Those with at least one prompt placed since they were removed last."""
        return list(self._held)

    def hit_blocks(self, hashes: Sequence[int], now: float) -> dict[WorkerId, int]:
        """As `PrefixIndex.hit_blocks`."""
        while self._ends and self._ends[0][0] <= now:
            placement = heappop(self._ends)[2]
            self._shorten(placement, placement.blocks)
        hits: dict[WorkerId, int] = {}
        node, depth = self._root, 0
        while depth < len(hashes) and (child := node.children.get(hashes[depth])):
            start = depth
            depth += _common(child.hashes, hashes, start)
            if not start:
                hits = dict.fromkeys(child.holders, depth)
            for worker in child.holders if start else ():
                if hits.get(worker) == start:  # Else a block before it is missing.
                    hits[worker] = depth
            if depth - start < len(child.hashes):
                break
            node = child
        return hits

    # ---- the tree

    def _grown(self, hashes: Sequence[int]) -> list[_Node]:
        """The nodes that are exactly this prompt, made where they are missing."""
        node, depth, path = self._root, 0, list[_Node]()
        while depth < len(hashes):
            child = node.children.get(hashes[depth])
            if child is None:
                child = node.children[hashes[depth]] = _Node(hashes[depth:], node)
            elif (common := _common(child.hashes, hashes, depth)) < len(child.hashes):
                child = child.cut(common)
            depth += len(child.hashes)
            path.append(child)
            node = child
        return path

    def _shorten(self, placement: _Placement, blocks: int) -> None:
        """Forget so many blocks of it, the end before the start."""
        node = placement.end
        while blocks and node.parent is not None:
            if node.holders.get(placement.worker) is placement:
                if blocks < len(node.hashes):
                    node.cut(len(node.hashes) - blocks)
                blocks -= len(node.hashes)
                self._leave(node, placement.worker)
                node.prune()
            node = node.parent
        if placement.blocks:
            placement.end = node

    def _leave(self, node: _Node, worker: WorkerId) -> None:
        """The worker holds these blocks no more."""
        placement = node.holders.pop(worker, None)
        if placement is None:
            return
        self._count(placement, -len(node.hashes))
        if not placement.blocks:
            del self._held[worker].by_age[placement.request_id]
            placement.end = self._root  # It may stay in the heap for long, its blocks need not.

    def _count(self, placement: _Placement, blocks: int) -> None:
        placement.blocks += blocks
        self._held[placement.worker].blocks += blocks
        self._blocks += blocks


class _Node:
    """Blocks that all prompts with the last of them share, after those of its parents; the root has none."""

    __slots__ = ("children", "hashes", "holders", "parent")

    def __init__(self, hashes: Sequence[int], parent: _Node | None) -> None:
        self.hashes = hashes
        self.parent = parent
        self.children: dict[int, _Node] = {}  # by their first hash
        self.holders: dict[WorkerId, _Placement] = {}

    def cut(self, blocks: int) -> _Node:
        """Leave the node all but its first `blocks`; the new one before it, which has those."""
        assert self.parent is not None
        head = _Node(self.hashes[:blocks], self.parent)
        self.parent.children[self.hashes[0]] = head
        self.hashes = self.hashes[blocks:]
        head.children[self.hashes[0]] = self
        head.holders = self.holders.copy()
        self.parent = head
        return head

    def prune(self) -> None:
        """Take it out of the tree if nobody needs it there, and those before it."""
        node = self
        while node.parent is not None and not node.holders and not node.children:
            del node.parent.children[node.hashes[0]]
            node = node.parent


@dataclass(slots=True, eq=False)
class _Placement:
    """One prompt at one worker: where its chain ends, and how many of the blocks no later one there has taken over."""

    worker: WorkerId
    request_id: RequestId
    end: _Node
    blocks: int = 0


@dataclass(slots=True)
class _Held:
    by_age: dict[RequestId, _Placement] = field(default_factory=dict)
    blocks: int = 0


def _common(chain: Sequence[int], hashes: Sequence[int], start: int) -> int:
    """How many blocks of `chain` are those of the prompt from `start` on."""
    most = min(len(chain), len(hashes) - start)
    if chain[most - 1] == hashes[start + most - 1]:
        return most
    return bisect_left(range(most), True, key=lambda place: chain[place] != hashes[start + place])
