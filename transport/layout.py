"""The shape of a KV cache, and the fingerprint that two workers compare before a byte moves."""

from __future__ import annotations

import msgspec
import xxhash

HANDOFF_PROTOCOL = 1


class KvLayout(msgspec.Struct, frozen=True):
    """Everything that makes one worker's KV block readable, or not, by another."""

    model: str
    revision: str
    dtype: str
    kv_dtype: str
    block_tokens: int
    layer_names: tuple[str, ...]
    layer_block_bytes: tuple[int, ...]  # one (layer, block), contiguous: K and V of `block_tokens` tokens
    kv_heads: int
    head_size: int
    tp_size: int = 1
    extra: str = ""  # what else an engine must agree on (speculative config, layout name)
    protocol: int = HANDOFF_PROTOCOL

    def __post_init__(self) -> None:
        if len(self.layer_names) != len(self.layer_block_bytes) or not self.layer_names:
            raise ValueError(f"{len(self.layer_names)} layer names for {len(self.layer_block_bytes)} block sizes")
        if self.block_tokens < 1 or min(self.layer_block_bytes) < 1:
            raise ValueError("a block has at least one token and one byte")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return sum(self.layer_block_bytes)

    def fingerprint(self) -> str:
        """32 hex digits; equal exactly when every field is."""
        return xxhash.xxh3_128_hexdigest(msgspec.msgpack.encode(self))
