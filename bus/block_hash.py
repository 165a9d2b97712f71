"""Hocket's own chain of block hashes: xxh3-64 over (previous hash, token ids of the block).

Router and workers compute it alike, so KV events and prompts meet whatever hash the engine uses inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import iter_unpack

import xxhash

from .messages import pack_tokens

ROOT_SEED = 0x484F434B4554
"""Start of every chain; a tenant, LoRA or model salt replaces it (`chain_seed`)."""


def chain_seed(*salts: str) -> int:
    """The start of a chain that no other combination of salts shares; `ROOT_SEED` when all are empty."""
    if not any(salts):
        return ROOT_SEED
    return xxhash.xxh3_64_intdigest("\x00".join(salts).encode(), seed=ROOT_SEED)


def block_hashes(packed_tokens: bytes, block_tokens: int, *, parent: int | None = None) -> list[int]:
    """One hash for each whole block of a prompt given as packed int32 token ids; `parent` continues a chain."""
    digest = xxhash.xxh3_64_intdigest
    block_bytes = 4 * block_tokens
    previous = ROOT_SEED if parent is None else parent
    whole = memoryview(packed_tokens)[: len(packed_tokens) // block_bytes * block_bytes]
    return [previous := digest(block, previous) for (block,) in iter_unpack(f"{block_bytes}s", whole)]


def block_hashes_of(token_ids: Sequence[int], block_tokens: int, *, parent: int | None = None) -> list[int]:
    """`block_hashes` for a sequence of token ids."""
    return block_hashes(pack_tokens(token_ids), block_tokens, parent=parent)
