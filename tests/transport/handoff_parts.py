"""What `handoff_world` is made of: links with late writes, prefill processes, requests and their cells."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hocket.transport.base import Chunk, Extent, GroupBlocks, HandoffKey, ReceiveEnd, SendEnd, SendOrder, SendReleased
from hocket.transport.handoff import Dial, LinkId, MessageId, PostSend
from hocket.transport.layout import KvGroup, KvLayer, KvLayout, KvShape
from hocket.transport.sender import Sender

LAYERS = 3
WINDOW = 2  # tokens that the second group's layer is wanted of, at most
CELL_BYTES = 2
FILLER = 7  # behind the end of a prompt, in its last block

Cell = tuple[int, int, int]  # (layer, block, token in it)


def make_layout(groups: int, block_tokens: tuple[int, ...]) -> KvLayout:
    layers = tuple(KvLayer(str(layer), 1, CELL_BYTES, group=layer % groups) for layer in range(LAYERS))
    kinds = (KvGroup(), KvGroup("window", WINDOW))[:groups]
    return KvLayout("m", "r", "u8", "u8", layers, KvShape(block_tokens[:groups]), groups=kinds)


def make_layouts(rng: random.Random) -> tuple[KvLayout, KvLayout]:
    """Of decode and of prefill; they differ in their blocks in some worlds."""
    groups = rng.choice([1, 2])
    here = rng.choice([(1, 1), (1, 1), (2, 2), (2, 3), (1, 2)])
    there = here if rng.random() < 0.7 else rng.choice([(1, 1), (2, 2), (3, 2), (2, 1)])
    return make_layout(groups, here), make_layout(groups, there)


def cells_of(layout: KvLayout, extents: Sequence[Extent]) -> list[Cell]:
    """What a message reads or writes, in its order."""
    cells: list[Cell] = []
    for extent in extents:
        block_tokens = layout.block_tokens(extent.layer)
        places = [(extent.layer, block, token) for block in extent.block_ids for token in range(block_tokens)]
        if extent.cut:
            places = places[extent.cut.first_token : extent.cut.first_token + extent.cut.tokens]
        cells += places
    return cells


def digest_of(values: list[int]) -> int:
    return hash(tuple(values)) & (1 << 64) - 1


@dataclass
class Side:
    """One machine's end of a link."""

    inbox: deque[bytes] = field(default_factory=deque)
    posted: dict[MessageId, list[Cell]] = field(default_factory=dict)
    is_open: bool = True
    is_aborting: bool = False


@dataclass
class Wire:
    """A link between the receiver and one prefill process."""

    number: LinkId
    sender: Prefill
    address: str
    near: Side = field(default_factory=Side)  # the sender's
    far: Side = field(default_factory=Side)  # the receiver's
    half_written: set[MessageId] = field(default_factory=set)

    @property
    def is_whole(self) -> bool:
        return self.near.is_open and self.far.is_open


@dataclass(eq=False)
class Request:
    """A prompt whose KV the decode side wants, and who may write it."""

    token: bytes
    attempt: int  # that its expectation is of
    end_token: int
    hit_tokens: int  # in the decode side's prefix cache
    timeout_s: float
    jobs_max: int
    truth: list[list[int]]  # [layer][token]
    groups: tuple[GroupBlocks, ...] = ()
    is_expected: bool = False
    end: ReceiveEnd | None = None
    newest_claimed: tuple[int, int] = (0, 0)
    newest_granted: tuple[int, int] = (0, 0)
    writer: tuple[LinkId, int] | None = None  # (link, transfer) that was granted last
    jobs: list[tuple[int, int]] = field(default_factory=list)  # (attempt, delivery)

    def first_blocks(self, layout: KvLayout) -> list[int]:
        """The first block of each group that decode wants."""
        firsts = []
        for kind, block_tokens in zip(layout.groups, layout.shape.block_tokens, strict=True):
            first = max(self.hit_tokens, self.end_token - kind.span_tokens) if kind.span_tokens else self.hit_tokens
            firsts.append(first // block_tokens)
        return firsts

    def blocks_needed(self, layout: KvLayout) -> list[int]:
        ends = [-(-self.end_token // block_tokens) for block_tokens in layout.shape.block_tokens]
        return [max(0, end - first) for end, first in zip(ends, self.first_blocks(layout), strict=True)]

    def replaced_by(self, key: HandoffKey) -> str:
        if self.writer is None:
            return "granted"
        return "replaced" if self.newest_granted < (key.attempt, key.delivery) else "regrant"

    def grant(self, order: SendOrder, epoch: int, writer: tuple[LinkId, int]) -> None:
        """Somebody may write from now on; it must be the right one."""
        key = (order.key.attempt, order.key.delivery)
        assert not self.end, "a grant after the end"
        assert order.decode_epoch == epoch, "a job for an earlier incarnation was granted"
        assert key >= max(self.newest_granted, (self.attempt, 0)), "an older attempt was granted"
        self.newest_granted, self.writer = key, writer


class Blocks:
    """The decode side's KV: who has which block, and every cell. What nobody has, a stranger fills with his own."""

    def __init__(self, layout: KvLayout, count: int) -> None:
        self._layout = layout
        self._count = count
        self.free = list(range(count))
        self.owner: dict[int, Request] = {}
        self.used: set[int] = set()  # that a request had and gave back
        self.memory: dict[Cell, int] = {}
        self._fill(self.free)

    def take(self, request: Request, count: int, rng: random.Random) -> list[int]:
        block_ids = [self.free.pop(rng.randrange(len(self.free))) for _ in range(count)]
        self._check_strangers(block_ids)
        self.owner.update((block, request) for block in block_ids)
        return block_ids

    def give_back(self, block_ids: list[int]) -> None:
        """Somebody else has them from now on."""
        for block in block_ids:
            del self.owner[block]
        self.free += block_ids
        self.used.update(block_ids)
        self._fill(block_ids)

    def _fill(self, block_ids: list[int]) -> None:
        for block in block_ids:
            for layer in range(LAYERS):
                for offset in range(self._layout.block_tokens(layer)):
                    self.memory[layer, block, offset] = -1 - block

    def _check_strangers(self, block_ids: list[int]) -> None:
        for cell, value in self.memory.items():
            assert cell[1] not in block_ids or value == -1 - cell[1], "a stranger's block was written"

    def check_good(self, request: Request, good_token: int) -> None:
        """The wanted tokens before this one are those of the prompt."""
        for layer in range(LAYERS):
            first_block, block_ids = request.groups[self._layout.layers[layer].group]
            block_tokens = self._layout.block_tokens(layer)
            for token in range(first_block * block_tokens, good_token):
                cell = (layer, block_ids[token // block_tokens - first_block], token % block_tokens)
                assert self.memory[cell] == request.truth[layer][token], "a good block is wrong"

    def check_end(self) -> None:
        assert len(self.free) == self._count, "blocks are missing"
        self._check_strangers(self.free)


@dataclass(eq=False)
class Job:
    """One try of a prefill engine: its order, its source blocks, and what it heard of them."""

    request: Request
    order: SendOrder
    chunks: list[Chunk]
    source: dict[Cell, int]
    announced: int = 0
    ready: int = 0  # layers of the last announced chunk
    events: list[SendReleased | SendEnd] = field(default_factory=list)
    reading: int = 0  # sends and digests under way

    def compute(self, layout: KvLayout, layer: int) -> None:
        """Of the last announced chunk. Where no decode side can want it, the group has no block."""
        chunk = self.chunks[self.announced - 1]
        first_block, block_ids = chunk.groups[layout.layers[layer].group]
        block_tokens = layout.block_tokens(layer)
        for index, block in enumerate(block_ids, first_block):
            for offset in range(block_tokens):
                token = index * block_tokens + offset
                value = self.request.truth[layer][token] if token < self.request.end_token else FILLER
                self.source[layer, block, offset] = value

    def read(self, cells: list[Cell]) -> list[int]:
        for cell in cells:
            assert cell in self.source, "a source block was read after its release, or before it was computed"
        return [self.source[cell] for cell in cells]


@dataclass(eq=False)
class Prefill:
    """A prefill process: one machine, and its links by address."""

    machine: Sender
    jobs: dict[HandoffKey, Job] = field(default_factory=dict)
    is_alive: bool = True
    paused_until: float = 0.0
    dials: list[Dial] = field(default_factory=list)
    digests: list[PostSend] = field(default_factory=list)


def cut_into_chunks(rng: random.Random, layout: KvLayout, end_token: int) -> list[Chunk]:
    """A prompt as an engine computes it."""
    return list(_chunks(rng, layout, end_token))


def _chunks(rng: random.Random, layout: KvLayout, end_token: int) -> Iterator[Chunk]:
    borders = [token for token in range(1, end_token + 1) if _is_border(layout, token, end_token)]
    start = 0
    while start < end_token:
        end = rng.choice([border for border in borders if border > start])
        groups = []
        for kind, block_tokens in zip(layout.groups, layout.shape.block_tokens, strict=True):
            # An engine has freed what is out of its window; the decode side may have larger blocks and want more of it.
            first = max(start, end_token - WINDOW - 3) if kind.span_tokens else start
            first_block, end_block = min(first, end) // block_tokens, -(-end // block_tokens)
            groups.append(GroupBlocks(first_block, tuple(range(first_block, end_block))))
        yield Chunk(start, end, tuple(groups))
        start = end


def _is_border(layout: KvLayout, token: int, end_token: int) -> bool:
    return token == end_token or not any(token % block_tokens for block_tokens in layout.shape.block_tokens)
