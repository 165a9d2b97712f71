"""What the decode side remembers of each hand-off; `receiver` decides on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import Expectation, HandoffKey
from .handoff import LinkId


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody who wants to write a token's KV."""

    link: LinkId
    key: HandoffKey
    blocks: int
    expires_at: float


@dataclass(slots=True)
class ReceivedChunk:
    """An announced chunk: what has come of it, and what its sender says it sent."""

    block_ids: tuple[int, ...]
    here: dict[int, int] = field(default_factory=dict)  # layer -> digest of what arrived
    sent: tuple[int, ...] | None = None  # digest of each layer as the sender read it
    is_broken: bool = False  # a message was short or failed

    @property
    def is_wrong(self) -> bool:
        if self.sent is None:
            return False
        return self.is_broken or any(self.sent[layer] != digest for layer, digest in self.here.items())

    def is_good(self, layers: int) -> bool:
        return not self.is_broken and self.sent is not None and len(self.here) == layers and not self.is_wrong


@dataclass(slots=True)
class Grant:
    """The one writer that an expectation has at a time."""

    link: LinkId
    key: HandoffKey
    transfer: int
    base: int  # good blocks of the expectation when it was granted
    next_block: int  # logical, where the next chunk must begin
    chunks: list[ReceivedChunk] = field(default_factory=list)
    posted: int = 0  # receives that are not done
    hashing: int = 0
    is_done: bool = False  # the sender said that every chunk was announced
    is_drained: bool = False  # nothing more will be announced, and what was has been sent; or the link is gone
    stop_at: float | None = None  # told to stop; the link is aborted then
    failure: str = ""

    @property
    def is_over(self) -> bool:
        is_closed = self.is_drained or (self.stop_at is not None and self.is_done)
        return is_closed and not self.posted and not self.hashing


@dataclass(slots=True)
class Reception:
    """An expectation that has not ended."""

    expectation: Expectation
    deadline: float
    reclaim_by: float
    newest: tuple[int, int] = (0, 0)  # (attempt, delivery) that was granted last
    good: int = 0  # leading blocks verified in every layer
    kv_bytes: int = 0
    grant: Grant | None = None
    successor: Claim | None = None
    ending: str = ""
    failure: str = "timeout"

    @property
    def end_block(self) -> int:
        return self.expectation.first_block + len(self.expectation.block_ids)
