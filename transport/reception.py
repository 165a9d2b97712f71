"""What the decode side remembers of each hand-off; `receiver` decides on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .base import Expectation, HandoffKey
from .handoff import LinkId
from .wire import Wire


@dataclass(frozen=True, slots=True)
class Claim:
    """Somebody who wants to write a token's KV."""

    link: LinkId
    key: HandoffKey
    tokens: int
    expires_at: float


@dataclass(slots=True)
class ReceivedChunk:
    """An announced chunk: what has come of it, and what its sender says it sent."""

    end_token: int
    message_bytes: tuple[int, ...]
    here: dict[int, int] = field(default_factory=dict)  # message -> digest of what arrived
    sent: tuple[int, ...] | None = None  # digest of each message as the sender read it
    is_broken: bool = False  # a message was short or failed
    is_cut: bool = False  # its link is lost; that it was broken is then no sign of wrong bytes

    @property
    def is_wrong(self) -> bool:
        if self.sent is None or self.is_cut:
            return False
        return self.is_broken or any(self.sent[number] != digest for number, digest in self.here.items())

    @property
    def is_good(self) -> bool:
        is_complete = self.sent is not None and len(self.here) == len(self.message_bytes)
        return is_complete and not self.is_broken and not self.is_wrong


@dataclass(slots=True)
class Grant:
    """The one writer that an expectation has at a time."""

    link: LinkId
    wire: Wire
    key: HandoffKey
    transfer: int
    firsts: tuple[int, ...]  # the first token that is wanted of each group
    next_token: int  # where the next chunk must begin
    chunks: list[ReceivedChunk] = field(default_factory=list)
    good_chunks: int = 0  # so many first ones are here, and right
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
    firsts: tuple[int, ...]  # the first wanted token of each group
    deadline: float
    reclaim_by: float
    good: int  # the wanted tokens before it are verified in every layer
    newest: tuple[int, int] = (0, 0)  # (attempt, delivery) that was granted last
    kv_bytes: int = 0
    grant: Grant | None = None
    successor: Claim | None = None
    ending: str = ""
    failure: str = "timeout"
