"""What travels between two ranks, computed alike on both sides: which tokens and heads of which layers, in which messages.

Two ranks with the same shape send whole blocks as they lie (native). Two that differ in block size, layout or tensor
parallelism send tokens and heads in the canonical order (layer, K/V, token, head, dim); each side cuts them out of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from .base import Cut, Extent, GroupBlocks
from .layout import KvLayout, KvShape, heads_of


class Part(NamedTuple):
    """Tokens of one layer."""

    layer: int
    first_token: int
    end_token: int


class Message(NamedTuple):
    """What one message carries, in this order."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class MessageSizes:
    """How layers are put together into messages; a message costs about as much as 100 KiB of its bytes."""

    bytes_max: int = 64 << 20  # no message is larger
    computed_bytes: int = 1 << 20  # while the engine computes: as soon as so much is there
    bulk_bytes: int = 4 << 20  # when all layers are ready already
    chunk_parts: int = 0  # but a large chunk goes in about so many messages; 0: however many that makes


@dataclass(frozen=True, slots=True)
class _LayerWire:
    group: int
    block_tokens: int
    first_head: int  # of my rank's heads
    heads: int  # that travel; 0: this layer's heads come from, or go to, another rank
    token_bytes: int


class Wire:
    """One rank's view of a link. `firsts` are the first wanted tokens of each group, `end` the end of the wanted ones."""

    def __init__(self, mine: KvLayout, theirs: KvShape, *, i_send: bool, sizes: MessageSizes = MessageSizes()) -> None:
        if len(theirs.block_tokens) != len(mine.groups):
            raise ValueError(f"{len(theirs.block_tokens)} KV groups on the other side, {len(mine.groups)} here")
        if theirs.tp_rank >= theirs.tp_size:
            raise ValueError(f"rank {theirs.tp_rank} of {theirs.tp_size}")
        self.is_native = theirs == mine.shape
        if not self.is_native and not (theirs.order and mine.shape.order):
            raise ValueError("the shapes differ, and not both layouts are known")
        sender, receiver = (mine.shape, theirs) if i_send else (theirs, mine.shape)
        self._layers = tuple(self._layer(mine, index, sender, receiver) for index in range(len(mine.layers)))
        self.sizes = sizes
        self.groups = len(mine.groups)
        self.unit_tokens = lcm(*mine.shape.block_tokens) if self.is_native else 1

    def _layer(self, mine: KvLayout, index: int, sender: KvShape, receiver: KvShape) -> _LayerWire:
        layer = mine.layers[index]
        wanted = heads_of(layer.heads, receiver.tp_size, receiver.tp_rank)
        given = given_heads(layer.heads, sender.tp_size, receiver.tp_size, sender.tp_rank, receiver.tp_rank)
        first, end = max(wanted.start, given.start), min(wanted.stop, given.stop)
        heads = max(0, end - first)
        own = mine.rank_heads(index)
        return _LayerWire(layer.group, mine.block_tokens(index), first - own.start, heads, heads * layer.head_bytes)

    @property
    def token_bytes_max(self) -> int:
        """Bytes of one token of the widest layer."""
        return max(1, *(layer.token_bytes for layer in self._layers))

    def part_bytes(self, part: Part) -> int:
        layer = self._layers[part.layer]
        tokens = part.end_token - part.first_token
        if self.is_native:
            tokens = -(-tokens // layer.block_tokens) * layer.block_tokens  # The last block travels whole.
        return tokens * layer.token_bytes

    def nbytes(self, message: Message) -> int:
        return sum(map(self.part_bytes, message.parts))

    def is_border(self, token: int, end: int) -> bool:
        """Whether a chunk may end there."""
        return token == end or token % self.unit_tokens == 0

    def messages(self, firsts: Sequence[int], start: int, end: int, layers_per_message: int) -> list[Message]:
        """Of a chunk of tokens start..end; both sides number them alike, from 0."""
        parts = [
            Part(index, max(start, firsts[layer.group]), end)
            for index, layer in enumerate(self._layers)
            if layer.heads and firsts[layer.group] < end
        ]
        return [
            Message(tuple(parts[index : index + layers_per_message]))
            for index in range(0, len(parts), layers_per_message)
        ]

    def extents(self, message: Message, groups: Sequence[GroupBlocks]) -> tuple[Extent, ...]:
        """Where the message lies in my pool. Raises LookupError when `groups` lacks a block of it."""
        return tuple(self._extent(part, groups[self._layers[part.layer].group]) for part in message.parts)

    def _extent(self, part: Part, blocks: GroupBlocks) -> Extent:
        layer = self._layers[part.layer]
        first_block = part.first_token // layer.block_tokens
        start, end = first_block - blocks.first_block, -(-part.end_token // layer.block_tokens) - blocks.first_block
        if start < 0 or end > len(blocks.block_ids):
            raise LookupError(f"blocks {first_block}.. of layer {part.layer} are not here")
        block_ids = blocks.block_ids[start:end]
        if self.is_native:
            return Extent(part.layer, block_ids)
        first_token = part.first_token - first_block * layer.block_tokens
        cut = Cut(first_token, part.end_token - part.first_token, layer.first_head, layer.heads)
        return Extent(part.layer, block_ids, cut)


def given_heads(heads: int, from_size: int, to_size: int, from_rank: int, to_rank: int) -> range:
    """The heads that this sender has to give to that receiver: where several senders have a head, only one gives it."""
    own = heads_of(heads, from_size, from_rank)
    if from_size <= heads:
        return own
    holders = [rank for rank in range(from_size) if heads_of(heads, from_size, rank) == own]
    return own if holders[to_rank % len(holders)] == from_rank else range(own.start, own.start)


def senders_of(layout: KvLayout, from_size: int, to_size: int, to_rank: int) -> tuple[int, ...]:
    """The prefill ranks that have something for this decode rank."""
    senders = []
    for rank in range(from_size):
        for layer in layout.layers:
            wanted = heads_of(layer.heads, to_size, to_rank)
            given = given_heads(layer.heads, from_size, to_size, rank, to_rank)
            if max(wanted.start, given.start) < min(wanted.stop, given.stop):
                senders.append(rank)
                break
    return tuple(senders)
