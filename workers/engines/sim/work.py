"""One request inside the simulator: its tokens, its blocks and how far its KV has come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ....bus.block_hash import block_hashes_of
from ..base import DecodeTask, PrefillOutcome, PrefillTask, StepOutput
from .kv import ROOT_STATE, next_states


@dataclass(slots=True, eq=False)
class Work:
    """What prefill and decode have in common: a prompt that gets blocks and KV."""

    tokens: list[int]  # the prompt and, on decode, what was made
    block_tokens: int
    blocks: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)  # of the whole blocks of `tokens`, as far as they were needed
    cached_blocks: int = 0  # leading blocks that were in the prefix cache
    computed: int = 0  # leading positions that have their KV
    state: int = ROOT_STATE  # after `computed` positions
    stored_blocks: int = 0  # leading blocks that were offered to the prefix cache
    is_over: bool = False  # cancelled, refused or done: nothing more is computed for it

    @property
    def blocks_needed(self) -> int:
        return -(-len(self.tokens) // self.block_tokens)

    @property
    def whole_blocks(self) -> int:
        """Leading blocks whose every position has its KV."""
        return self.computed // self.block_tokens

    def extend_hashes(self, blocks: int) -> None:
        """Know at least the hashes of so many whole blocks."""
        known = len(self.hashes)
        if blocks > known:
            span = self.tokens[known * self.block_tokens : blocks * self.block_tokens]
            self.hashes += block_hashes_of(span, self.block_tokens, parent=self.hashes[-1] if self.hashes else None)

    def skip_to(self, computed: int) -> None:
        """The KV up to this position came from elsewhere."""
        if computed > self.computed:
            self.state = next_states(self.state, self.tokens[self.computed : computed])[-1]
            self.computed = computed

    def rewind(self) -> None:
        """Its blocks were taken away: everything must be computed again."""
        self.computed = self.stored_blocks = self.cached_blocks = 0
        self.state = ROOT_STATE


@dataclass(slots=True, eq=False, kw_only=True)
class PrefillWork(Work):
    task: PrefillTask
    done: asyncio.Future[PrefillOutcome]
    is_open: bool = False  # the hand-off has begun; its blocks are held until SendReleased


@dataclass(slots=True, eq=False, kw_only=True)
class DecodeWork(Work):
    task: DecodeTask
    on_step: Callable[[StepOutput], None]
    done: asyncio.Future[None]
    tokens_max: int  # to make
    handoff_token: bytes | None  # None also after the hand-off was tried
    is_receiving: bool = False  # somebody may write into its blocks
    made: int = 0
    answer: int = 0  # of all positions with KV, from their bytes
    computed_here: int = 0  # prompt tokens, for the first StepOutput
    cached_tokens: int = 0

    @property
    def has_pending_token(self) -> bool:
        """The token made last has no KV yet."""
        return self.computed < len(self.tokens)
