"""A link whose receiver reads: control frames over a stream, KV messages offered there and pulled by the other side.

The sender names its own buffers in an offer and waits; the receiver reads them straight into its place (`pulls.py`) and says
that it has. Nobody but the receiver's own threads writes into its memory, so an abort is safe as soon as they have put
down the piece in hand, whatever the peer does. A sender that aborts may be read for a moment longer: what that brings
belongs to a link that is lost, and its digest would not fit.

Frames on the stream: one byte for the kind, then a control frame of the link's user, or {tag, message bytes} and the words
of the mover for where the bytes lie, or {tag} when they have been pulled.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..base import Buffer, Done, Place
from ..errors import LinkLost, TransportError
from ..views import total_bytes
from .channel_link import EARLY_MAX, ChannelLink
from .pulls import Job, Lane, Pull, PullThreads
from .tcp import TcpLink

OFFER_BYTES_MAX = 4 << 20
MESSAGE_BYTES_MAX = 1 << 44  # so that sums of lengths cannot overflow
PULLS_MAX = 8  # of a link at a time; the others hold no place
TURN_BYTES = 4 << 20  # of short pulls, then other work of the loop gets its turn
_OFFER, _PULLED = 2, 3
_OFFER_HEAD = struct.Struct("<BQQ")
_PULLED_FRAME = struct.Struct("<BQ")


class Mover(Protocol):
    """How one process reads another's memory, for one link."""

    @property
    def name(self) -> str: ...

    @property
    def moves_device_memory(self) -> bool: ...

    def offer(self, buffers: Sequence[Buffer]) -> bytes:
        """Sender: where these buffers lie, in words for the other side's `pull`. Raises TypeError, ValueError."""

    def pull(self, words: bytes, nbytes: int, buffers: Sequence[Buffer]) -> Pull:
        """Receiver: read those `nbytes` (at least 1) into the front of `buffers`. The words are checked when it steps."""


@dataclass(frozen=True, slots=True)
class _Offer:
    tag: int
    nbytes: int
    words: bytes


@dataclass(frozen=True, slots=True)
class _Receive:
    tag: int
    place: Place
    done: Done


class PullLink(ChannelLink):
    """One connected stream and a mover."""

    def __init__(
        self, channel: TcpLink, mover: Mover, threads: PullThreads, on_over: Callable[[PullLink], None]
    ) -> None:
        self.makes_digests = False  # see `received_digest`; may be set until a receive is posted
        super().__init__(channel)
        self._mover = mover
        self._threads = threads
        self._lane = Lane()
        self._on_over = on_over
        self._sends: dict[int, tuple[Sequence[Buffer], Done]] = {}  # offered
        self._waiting: dict[int, _Receive] = {}  # no offer has come yet
        self._early: dict[int, _Offer] = {}  # no receive was posted yet
        self._matched: dict[int, tuple[_Receive, _Offer]] = {}  # to be pulled, in the order of their coming
        self._held: dict[int, tuple[_Receive, _Offer]] = {}  # likewise, whose place had no room
        self._pulling: dict[int, _Receive] = {}
        self._digest: tuple[int, int] | None = None  # tag and digest, while its `done` runs
        self._is_woken = False

    @property
    def transport(self) -> str:
        return self._mover.name

    @property
    def moves_device_memory(self) -> bool:
        return self._mover.moves_device_memory

    @property
    def _is_sending(self) -> bool:
        return bool(self._sends)

    @property
    def _is_reading(self) -> bool:
        return bool(self._pulling)

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received + self._lane.moved_bytes

    def received_digest(self, tag: int) -> int | None:
        """xxh3-64 of the message, made piece by piece while it arrived; only within its `done`, if `makes_digests`.

        None where there is none: an empty message.
        """
        return self._digest[1] if self._digest and self._digest[0] == tag else None

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        """Also raises ValueError for more pieces of memory than an offer can name."""
        self._check_alive()
        assert tag not in self._sends, f"tag {tag} is being sent already"
        nbytes = total_bytes(buffers)
        self._channel.send_control(_OFFER_HEAD.pack(_OFFER, tag, nbytes) + self._mover.offer(buffers))
        self._sends[tag] = (buffers, done)

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        self._check_alive()
        assert tag not in self._waiting, f"tag {tag} is posted already"
        receive = _Receive(tag, place, done)
        if offer := self._early.pop(tag, None):
            self._matched[tag] = (receive, offer)
            self._wake()
        else:
            self._waiting[tag] = receive

    def retry_receives(self) -> None:
        if self._held and self._error is None:
            self._matched = self._held | self._matched
            self._held = {}
            self._wake()

    # What the peer says.

    def _on_frame(self, kind: int, frame: bytes) -> bool:
        if kind == _OFFER and len(frame) >= _OFFER_HEAD.size:
            _, tag, nbytes = _OFFER_HEAD.unpack_from(frame)
            self._on_offer(_Offer(tag, nbytes, frame[_OFFER_HEAD.size :]))
        elif kind == _PULLED and len(frame) == _PULLED_FRAME.size:
            self._on_pulled(_PULLED_FRAME.unpack(frame)[1])
        else:
            return False
        return True

    def _on_offer(self, offer: _Offer) -> None:
        is_known = offer.tag in self._early or offer.tag in self._matched or offer.tag in self._held
        if is_known or offer.tag in self._pulling or len(self._early) == EARLY_MAX or offer.nbytes > MESSAGE_BYTES_MAX:
            self._lose(LinkLost(f"{self.peer} offered messages that nobody expects"))
        elif receive := self._waiting.pop(offer.tag, None):
            self._matched[offer.tag] = (receive, offer)
            self._wake()
        else:
            self._early[offer.tag] = offer

    def _on_pulled(self, tag: int) -> None:
        _, done = self._sends.pop(tag, (None, None))
        if done is None:
            self._lose(LinkLost(f"{self.peer} pulled message {tag:#x}, which was not offered"))
            return
        done(None)
        self._is_idle.set()

    # Pulling.

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._pull_more)

    def _pull_more(self) -> None:
        """Begin to pull what may be, then let other work of the loop have its turn."""
        self._is_woken = False
        turn_end = self._lane.moved_bytes + TURN_BYTES
        while self._matched and len(self._pulling) < PULLS_MAX and self._error is None:
            if self._lane.moved_bytes > turn_end:
                self._wake()
                return
            tag, (receive, offer) = next(iter(self._matched.items()))
            if offer.nbytes > receive.place.nbytes:
                self._lose(LinkLost(f"{self.peer} sent {offer.nbytes} B for a receive of {receive.place.nbytes} B"))
                return
            buffers = receive.place.take()
            if buffers is None:
                self._held[tag] = self._matched.pop(tag)
            else:
                self._pull(receive, offer, buffers)

    def _pull(self, receive: _Receive, offer: _Offer, buffers: Sequence[Buffer]) -> None:
        pull = self._mover.pull(offer.words, offer.nbytes, buffers) if offer.nbytes else None
        del self._matched[receive.tag]
        self._pulling[receive.tag] = receive
        if pull is None:
            self._loop.call_soon(self._end_pull, receive, offer, None)
            return
        self._threads.submit(
            self._lane, pull, lambda job: self._end_pull(receive, offer, job), makes_digest=self.makes_digests
        )

    def _end_pull(self, receive: _Receive, offer: _Offer, job: Job | None) -> None:
        del self._pulling[receive.tag]
        if job and job.error and not self._error:
            self._waiting[receive.tag] = receive
            self._lose(LinkLost(f"lost {self.peer} while reading its memory: {job.error}"))
            return
        if self._error:
            receive.done(self._error)
            self._check_over()
            return
        self._channel.send_control(_PULLED_FRAME.pack(_PULLED, receive.tag))
        if offer.nbytes < receive.place.nbytes:
            error = f"{self.peer} sent {offer.nbytes} B for a receive of {receive.place.nbytes} B"
            receive.done(TransportError(error))
        else:
            if job and job.digest is not None:
                self._digest = (receive.tag, job.digest)
            receive.done(None)
            self._digest = None
        self._wake()

    # The end.

    def _let_go(self, error: LinkLost) -> None:
        self._threads.drop(self._lane)
        dones = [done for _, done in self._sends.values()]
        dones += [receive.done for receive in self._waiting.values()]
        dones += [receive.done for receive, _ in (*self._matched.values(), *self._held.values())]
        for record in (self._sends, self._waiting, self._early, self._matched, self._held):
            record.clear()
        for done in dones:
            done(error)

    def _end(self) -> None:
        self._on_over(self)
