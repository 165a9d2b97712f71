"""The sending side of links whose receiver reads our slots: offered ahead of time, so that nothing is left but to launch.

As soon as a message is planned it gets its slot, if there is room, and the peer learns where it will lie and which flag will
say so. When its layers are computed, its gather is launched and the peer is woken up; what the state machine has to do comes
after that. A first step after some milliseconds of sleep costs Python 50 to 150 us, a warm one 10 to 40.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol

from .base import Done, HandoffKey, Link
from .errors import LinkLost
from .handoff import MessageId
from .mover import Extents, OnDigest, tag_of
from .poller import Poller
from .stager import LendingLink, LendingStager, Slot, Ticket


class Rooms(Protocol):
    """Slots, shared between links."""

    def take(self, link: Link, nbytes: int) -> Slot | None:
        """A slot, if that leaves the others who want one their share."""

    def give_back(self, link: Link, slot: Slot, nbytes: int) -> None: ...


@dataclass(slots=True, eq=False)
class _Lent:
    """A message of ours."""

    link: Link
    lending: LendingLink
    message: MessageId
    extents: Extents
    nbytes: int
    layers: frozenset[int]
    slot: Slot | None = None
    ticket: Ticket | None = None
    is_launched: bool = False
    has_gone: bool = False  # the peer was woken up
    error: BaseException | None = None  # ended before it was sent
    done: Done | None = None
    on_digest: OnDigest | None = None


class _Scatter:
    """Implements `stager.Reader`."""

    def __init__(self, stager: LendingStager, extents: Extents) -> None:
        self._stager, self._extents = stager, extents

    def arm(self, slot: Slot) -> None:
        self._ticket = self._stager.arm(self._extents, slot, is_gather=False)

    def launch(self) -> Ticket:
        return self._stager.launch(self._ticket)

    def cancel(self) -> None:
        self._stager.disarm(self._ticket)


class Lender:
    """What `StagedMover` does on a `LendingLink`; see `mover.Mover`. On the loop, but for `gather_ahead`."""

    def __init__(self, stager: LendingStager, poller: Poller, rooms: Rooms) -> None:
        self._stager = stager
        self._poller = poller
        self._rooms = rooms
        self._lock = Lock()  # of the plans, and of who launches
        self._planned: dict[HandoffKey, list[_Lent]] = {}
        self._waiting: dict[Link, deque[_Lent]] = {}  # sent, but without a slot
        self._digests: dict[MessageId, int] = {}  # of what was borrowed, until they are asked for

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        """From any thread: launch on this stream what is complete with the last of these layers."""
        with self._lock:
            due = [lent for key in keys for lent in self._planned.get(key, ()) if layers[-1] in lent.layers]
            due = [lent for lent in due if lent.slot and not lent.is_launched and lent.layers.issubset(layers)]
            for lent in due:
                lent.is_launched = True
        for lent in due:
            assert lent.ticket
            self._stager.launch(lent.ticket, stream=stream)

    def plan(self, link: Link, lending: LendingLink, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        for message, extents, nbytes in messages:
            lent = _Lent(link, lending, message, extents, nbytes, frozenset(extent.layer for extent in extents))
            if link not in self._waiting:  # Those that are computed already come first.
                self._offer(lent)
            with self._lock:
                self._planned.setdefault(message.key, []).append(lent)

    def start(self, key: HandoffKey, layers: frozenset[int]) -> None:
        """These layers are in memory: launch what needs no others, and wake the peer up."""
        with self._lock:
            due = [lent for lent in self._planned.get(key, ()) if lent.layers <= layers]
            due = [lent for lent in due if lent.slot and not lent.is_launched]
            for lent in due:
                lent.is_launched = True
        if due:  # All of one link. First of all the peer wakes up, which takes it as long as a launch takes us.
            self._go(due[0].lending, due)
        for lent in due:
            assert lent.ticket
            self._stager.launch(lent.ticket)

    def skip(self, message: MessageId) -> None:
        """It is given up; the link takes its offer back."""
        self._pop(message)

    def send(
        self, link: Link, lending: LendingLink, planned: tuple[MessageId, Extents, int], done: Done, on_digest: OnDigest
    ) -> None:
        lent = self._pop(planned[0]) or _Lent(link, lending, *planned, frozenset())
        lent.done, lent.on_digest = done, on_digest
        if lent.slot is not None or lent.error:
            self._send(lent)
            return
        self._waiting.setdefault(link, deque()).append(lent)
        self.feed(link)

    def feed(self, link: Link) -> None:
        """Offer and launch what there is room for."""
        while waiting := self._waiting.get(link):
            lent = waiting[0]
            if not self._offer(lent):
                return
            waiting.popleft()
            if not waiting:
                del self._waiting[link]
            self._send(lent)

    @property
    def waiting(self) -> Iterable[Link]:
        """Links that want a slot."""
        return self._waiting

    def forget(self, key: HandoffKey) -> None:
        """What was offered and is not sent after all is taken back."""
        with self._lock:
            left = self._planned.pop(key, [])
        for lent in left:
            if lent.slot is not None:
                try:
                    lent.link.post_send(tag_of(lent.message), (), lambda error: None)
                except LinkLost:
                    pass  # Which ended it.

    def drop(self, link: Link) -> None:
        """The link has ended what was offered there."""
        with self._lock:
            for key, planned in list(self._planned.items()):
                self._planned[key] = [lent for lent in planned if lent.link is not link]
        error = LinkLost(f"{link.peer} is gone")
        for lent in self._waiting.pop(link, ()):
            assert lent.done
            assert lent.on_digest
            lent.done(error)
            lent.on_digest(0)

    def borrow(self, lending: LendingLink, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        """The receiving side: scatter straight out of the peer's slot."""

        def received(error: BaseException | None, digest: int) -> None:
            if error is None:
                self._digests[message] = digest
            done(error)

        self._stager.prepare(extents)
        try:
            lending.borrow(tag_of(message), nbytes, _Scatter(self._stager, extents), received)
        except LinkLost as error:
            done(error)

    def borrowed_digest(self, message: MessageId) -> int | None:
        """Of a message that was borrowed; once."""
        return self._digests.pop(message, None)

    def _pop(self, message: MessageId) -> _Lent | None:
        with self._lock:
            planned = self._planned.get(message.key, [])
            for index, lent in enumerate(planned):
                if lent.message == message:
                    return planned.pop(index)
        return None

    def _offer(self, lent: _Lent) -> bool:
        """False: no room now."""
        slot = self._rooms.take(lent.link, lent.nbytes)
        if slot is None:
            return False
        lent.slot, lent.ticket = slot, self._stager.arm(lent.extents, slot, is_gather=True)
        try:
            lent.lending.lend(tag_of(lent.message), slot, lent.ticket, partial(self._on_freed, lent))
        except LinkLost as error:
            self._on_freed(lent, error)
        return True

    def _send(self, lent: _Lent) -> None:
        """It has a slot, or had one: launch it if that was not done, and follow it."""
        assert lent.done
        assert lent.on_digest
        with self._lock:
            is_first, lent.is_launched = not lent.is_launched and not lent.error, True
        assert lent.ticket
        if not lent.has_gone and not lent.error:
            self._go(lent.lending, [lent])
        if is_first:
            self._stager.launch(lent.ticket)
        if lent.error:
            lent.done(lent.error)
        self._poller.when(lent.ticket, lent.on_digest)

    def _go(self, lending: LendingLink, due: Sequence[_Lent]) -> None:
        for lent in due:
            lent.has_gone = True
        try:
            lending.go([tag_of(lent.message) for lent in due])
        except LinkLost:
            pass  # `_on_freed` has been told, or will be.

    def _on_freed(self, lent: _Lent, error: BaseException | None) -> None:
        """The peer has read the slot, or does not want it, or has gone."""
        assert lent.slot
        assert lent.ticket
        with self._lock:
            has_run, lent.is_launched = lent.is_launched, True
        if not has_run:
            self._stager.disarm(lent.ticket)
        self._rooms.give_back(lent.link, lent.slot, lent.nbytes)
        lent.slot = None
        if lent.done:
            lent.done(error)
        else:
            lent.error = error or LinkLost("it was taken back")
