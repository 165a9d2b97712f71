"""What the two machines of a hand-off are told and what they answer.

`receiver.Receiver` (decode) and `sender.Sender` (prefill) decide; they have no I/O, clock or randomness. `endpoint` tells
them events with the time and carries out the instructions they return, in order. What the endpoint promises:

- a `PostReceive` or `PostSend` is answered by exactly one `MessageDone`, also on failure; a `ComputeDigest`, and a `PostSend`
  with extents, by exactly one `Digested`;
- `LinkLost` comes once for each link, after the `MessageDone` of all its messages, also after `AbortLink`;
- `LinkUp` or `LinkGreeted` comes before the first frame of a link, with what travels on it;
- `Dial` is answered by one `LinkUp` or `DialFailed`;
- `Tick` comes about every 100 ms while a machine is not idle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, NewType

from .base import Chunk, Expectation, Extent, HandoffKey, ReceiveEnd, SendEnd, SendOrder, SendReleased
from .frames import Frame
from .wire import Wire

LinkId = NewType("LinkId", int)

KEEPALIVE_S = 0.5
STALLED_S = 2.0  # four keepalives missed: UCX and TCP never report a stopped peer themselves
DRAIN_S = 0.5  # for a writer that was told to stop; then its link is aborted
HOLD_S = 5.0  # a claim may come before the decode engine has allocated
RECLAIM_S = 1.0  # after a sender gave up or a digest was wrong: for its retry, or a redelivered job
LOST_S = 3.0  # likewise after a lost link, from when its peer was last heard: a router gives a dead worker's job back by then
PAUSE_S = 1.0  # a gap between ticks that means we were suspended ourselves, not our peers
TICK_S = 0.1


class MessageId(NamedTuple):
    """One message of one chunk on one grant."""

    key: HandoffKey
    link: LinkId
    transfer: int
    chunk: int
    number: int


@dataclass(frozen=True, slots=True)
class FrameReceived:
    link: LinkId
    frame: Frame


@dataclass(frozen=True, slots=True)
class MessageDone:
    """All bytes of a message have moved, or `error` says why not; its buffers are no longer touched."""

    message: MessageId
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Digested:
    message: MessageId
    digest: int


@dataclass(frozen=True, slots=True)
class LinkActive:
    """Bytes arrived on this link since the last tick."""

    link: LinkId


@dataclass(frozen=True, slots=True)
class LinkLost:
    link: LinkId


@dataclass(frozen=True, slots=True)
class LinkGreeted:
    """A peer connected and said hello."""

    link: LinkId
    wire: Wire


@dataclass(frozen=True, slots=True)
class LinkUp:
    key: HandoffKey
    link: LinkId
    wire: Wire


@dataclass(frozen=True, slots=True)
class DialFailed:
    key: HandoffKey
    why: str


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Close:
    """The endpoint stops; every link will be aborted."""


@dataclass(frozen=True, slots=True)
class Expect:
    expectation: Expectation


@dataclass(frozen=True, slots=True)
class CancelExpectation:
    token: bytes


@dataclass(frozen=True, slots=True)
class OpenOrder:
    order: SendOrder


@dataclass(frozen=True, slots=True)
class Announce:
    key: HandoffKey
    chunk: Chunk


@dataclass(frozen=True, slots=True)
class LayersReady:
    """Of one announced chunk."""

    key: HandoffKey
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class AbortOrder:
    key: HandoffKey
    reason: str


LinkEvent = FrameReceived | MessageDone | Digested | LinkActive | LinkLost | Tick | Close
ReceiverEvent = LinkEvent | LinkGreeted | Expect | CancelExpectation
SenderEvent = LinkEvent | OpenOrder | Announce | LayersReady | AbortOrder | LinkUp | DialFailed


@dataclass(frozen=True, slots=True)
class SendFrame:
    link: LinkId
    frame: Frame


@dataclass(frozen=True, slots=True)
class PostReceive:
    message: MessageId
    extents: tuple[Extent, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class PlanSend:
    """These messages will be sent as their layers become ready: who gathers ahead of time may."""

    key: HandoffKey
    messages: tuple[tuple[MessageId, tuple[Extent, ...], int], ...]  # with the bytes of each


@dataclass(frozen=True, slots=True)
class PostSend:
    """Answered by its digest, too. With no extents: an empty message, which ends the peer's posted receive; no digest."""

    message: MessageId
    extents: tuple[Extent, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ComputeDigest:
    """Of a message that was received."""

    message: MessageId
    extents: tuple[Extent, ...]


@dataclass(frozen=True, slots=True)
class AbortLink:
    link: LinkId
    why: str


@dataclass(frozen=True, slots=True)
class Dial:
    key: HandoffKey
    addresses: tuple[str, ...]  # try in this order


@dataclass(frozen=True, slots=True)
class Emit:
    """Tell the engine."""

    event: ReceiveEnd | SendReleased | SendEnd


Instruction = SendFrame | PostReceive | PlanSend | PostSend | ComputeDigest | AbortLink | Dial | Emit


@dataclass(slots=True)
class LinkWatch:
    """When each link was last heard and last spoken on. Silence, not the link's own word, says that a peer hangs."""

    _heard: dict[LinkId, float] = field(default_factory=dict)
    _spoken: dict[LinkId, float] = field(default_factory=dict)
    _ticked_at: float = 0.0

    def hear(self, link: LinkId, now: float) -> None:
        self._heard[link] = now

    def heard_at(self, link: LinkId, now: float) -> float:
        """When it was last heard; now for a link that is not watched."""
        return self._heard.get(link, now)

    def forget(self, link: LinkId) -> None:
        self._heard.pop(link, None)
        self._spoken.pop(link, None)

    def note_tick(self, now: float) -> None:
        """Call first on every tick: after a pause of our own nobody's silence counts."""
        if now - self._ticked_at > PAUSE_S:
            for link in self._heard:
                self._heard[link] = now
        self._ticked_at = now

    def due(self, busy: Iterable[LinkId], now: float) -> list[LinkId]:
        """Those of the busy links that want a keepalive now."""
        links = [link for link in busy if now - self._spoken.get(link, -KEEPALIVE_S) >= KEEPALIVE_S]
        for link in links:
            self._spoken[link] = now
        return links

    def silent(self, busy: Iterable[LinkId], now: float) -> list[LinkId]:
        """Those of the busy links whose peer said nothing for too long. Says so once for each silence."""
        links = [link for link in busy if now - self._heard.setdefault(link, now) > STALLED_S]
        for link in links:
            self._heard[link] = now
        return links
