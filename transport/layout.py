"""The shape of a KV cache: what two workers must agree on (the fingerprint), and what may differ between them (the shape)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import xxhash

HANDOFF_PROTOCOL = 2
GROUPS_MAX = 32
RANKS_MAX = 1 << 10


class KvGroup(msgspec.Struct, frozen=True):
    """Layers whose blocks are allocated together: they look back equally far."""

    kind: Literal["full", "window", "chunk"] = "full"
    span_tokens: int = 0  # of the window or attention chunk; 0: the whole prefix


class KvLayer(msgspec.Struct, frozen=True):
    """One layer's KV, over all tensor-parallel ranks."""

    name: str
    heads: int  # KV heads; 1 for MLA, whose latent every rank has whole
    head_bytes: int  # K and V of one token and head
    parts: int = 2  # K and V lie apart in the canonical order; 1 for MLA
    group: int = 0


class KvShape(msgspec.Struct, frozen=True):
    """How one rank lays out what it has; two that differ here still understand each other."""

    block_tokens: tuple[Annotated[int, msgspec.Meta(ge=1, le=1 << 20)], ...]  # of each group
    order: Annotated[str, msgspec.Meta(max_length=16)] = (
        "HND"  # of a block: heads, tokens, (K, V); or "NHD", "HKtV4" (pool.py); "" unknown
    )
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=RANKS_MAX)] = 1
    tp_rank: Annotated[int, msgspec.Meta(ge=0, lt=RANKS_MAX)] = 0


class KvLayout(msgspec.Struct, frozen=True):
    """Everything that makes one worker's KV readable, or not, by another."""

    model: str
    revision: str
    dtype: str
    kv_dtype: str
    layers: tuple[KvLayer, ...]
    shape: KvShape
    groups: tuple[KvGroup, ...] = (KvGroup(),)
    digest: Literal["xxh3", "weighted"] = "xxh3"
    extra: str = ""  # what else an engine must agree on (its version, attention backends, speculative config)
    protocol: int = HANDOFF_PROTOCOL

    def __post_init__(self) -> None:
        if not self.layers or not 1 <= len(self.groups) <= GROUPS_MAX:
            raise ValueError(f"{len(self.layers)} layers in {len(self.groups)} KV groups")
        if len(self.shape.block_tokens) != len(self.groups):
            raise ValueError(f"{len(self.shape.block_tokens)} block sizes for {len(self.groups)} KV groups")
        if min(self.shape.block_tokens) < 1:
            raise ValueError("a block has at least one token")
        if not 0 <= self.shape.tp_rank < self.shape.tp_size:
            raise ValueError(f"rank {self.shape.tp_rank} of {self.shape.tp_size}")
        for layer in self.layers:
            if min(layer.heads, layer.head_bytes) < 1 or not 0 <= layer.group < len(self.groups):
                raise ValueError(
                    f"layer {layer.name} has {layer.heads} heads of {layer.head_bytes} B, group {layer.group}"
                )
            if layer.head_bytes % layer.parts:
                raise ValueError(f"layer {layer.name}: {layer.head_bytes} B are not {layer.parts} equal parts")

    def block_tokens(self, layer: int) -> int:
        """Tokens of one block of this layer."""
        return self.shape.block_tokens[self.layers[layer].group]

    def rank_heads(self, layer: int) -> range:
        """The KV heads of this layer that this rank has."""
        return heads_of(self.layers[layer].heads, self.shape.tp_size, self.shape.tp_rank)

    def block_bytes(self, layer: int) -> int:
        """Bytes of one block of this layer on this rank, contiguous."""
        return self.block_tokens(layer) * len(self.rank_heads(layer)) * self.layers[layer].head_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers of this rank."""
        return sum(len(self.rank_heads(index)) * layer.head_bytes for index, layer in enumerate(self.layers))

    def fingerprint(self) -> str:
        """32 hex digits; equal exactly when one can read what the other sends."""
        shape = KvShape((1,) * len(self.groups)) if self.shape.order else self.shape
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(msgspec.structs.replace(self, shape=shape)))


def heads_of(heads: int, tp_size: int, tp_rank: int) -> range:
    """The KV heads of one rank, as vLLM shards them: an equal share, or one head that several ranks have (GQA, MLA)."""
    if tp_size <= heads:
        share = heads // tp_size
        return range(tp_rank * share, (tp_rank + 1) * share)
    first = tp_rank * heads // tp_size
    return range(first, first + 1)
