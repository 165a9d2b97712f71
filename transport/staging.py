"""Messages through staging memory: gathered into a slot, sent, received into a slot, scattered.

For KV in GPU memory, where a message per block costs 8-11 us of any size, and for two ranks whose blocks differ. Slots are
few and shared: each link gets its share while others wait, and a receive takes its slot only when its message arrives, so
that whoever waits holds nothing and no two sides can wait for each other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np

from .base import Buffer, DeviceBuffer, Done, Extent, HandoffKey, HostBuffer, Link, Place
from .errors import LinkLost
from .handoff import MessageId
from .lender import Lender
from .mover import Extents, OnDigest, tag_of
from .poller import Poller
from .pool import HostKvPool, digest_of
from .stager import HostSlot, LendingLink, LendingStager, Slot, Stager, Ticket


@dataclass(slots=True)
class _Ahead:
    """A message that is gathered on the compute stream as soon as all of its layers are computed."""

    message: MessageId
    extents: Extents
    nbytes: int
    layers: frozenset[int]
    on_device: bool


@dataclass(slots=True)
class _Send:
    """A message on its way out."""

    link: Link
    message: MessageId
    extents: Extents
    nbytes: int
    done: Done
    on_digest: OnDigest
    slot: Slot | None = None
    is_dropped: bool = False


class StagedMover:
    """Implements `Mover` over a `Stager`."""

    def __init__(self, stager: Stager) -> None:
        self._stager = stager
        stager.bind_thread()
        self._loop = asyncio.get_running_loop()
        self.poller = Poller()
        self._lock = Lock()
        self._plans: dict[HandoffKey, list[_Ahead]] = {}
        self._gathered: dict[MessageId, tuple[Slot, Ticket]] = {}
        self._sends: dict[Link, deque[_Send]] = {}  # wait for a slot
        self._sending: list[_Send] = []  # have one, and their gather is under way
        self._hungry: dict[Link, None] = {}  # receives wait for a slot
        self._held: dict[Link, int] = {}  # bytes of slots
        self._lending: dict[Link, LendingLink | None] = {}  # isinstance of a protocol takes 10 us
        self._lender = Lender(stager, self.poller, self) if isinstance(stager, LendingStager) else None
        self._arrived: dict[MessageId, tuple[Link, Slot]] = {}

    # On the thread of the compute stream.

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        """These layers were enqueued on `stream`: gather there what is complete with the last one, as far as there is room."""
        if self._lender:
            self._lender.gather_ahead(keys, layers, stream)
        with self._lock:
            planned = [ahead for key in keys for ahead in self._plans.get(key, ())]
        due = [ahead for ahead in planned if layers[-1] in ahead.layers and ahead.layers.issubset(layers)]
        for ahead in due:
            slot = self._stager.reserve(ahead.nbytes, on_device=ahead.on_device)
            if slot is None:
                return
            ticket = self._stager.gather(ahead.extents, slot, stream=stream)
            with self._lock:
                self._gathered[ahead.message] = (slot, ticket)

    # On the loop.

    def plan(self, link: Link, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        if self._lender and (lending := self._lending_of(link)):
            self._lender.plan(link, lending, messages)
            return
        for _, extents, _ in messages:
            self._stager.prepare(extents)
        with self._lock:
            for message, extents, nbytes in messages:
                layers = frozenset(extent.layer for extent in extents)
                ahead = _Ahead(message, extents, nbytes, layers, link.moves_device_memory)
                self._plans.setdefault(message.key, []).append(ahead)

    def forget(self, key: HandoffKey) -> None:
        """The order is over."""
        if self._lender:
            self._lender.forget(key)
        with self._lock:
            self._plans.pop(key, None)
            left = [message for message in self._gathered if message.key == key]
            gathered = [self._gathered.pop(message) for message in left]
        for slot, ticket in gathered:
            self.poller.when(ticket, partial(self._release_unsent, slot))

    def _release_unsent(self, slot: Slot, _digest: int) -> None:
        self._stager.release(slot)
        self._feed()

    def send(
        self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done, on_digest: OnDigest
    ) -> None:
        if self._lender and (lending := self._lending_of(link)):
            self._lender.send(link, lending, (message, extents, nbytes), done, on_digest)
            return
        send = _Send(link, message, extents, nbytes, done, on_digest)
        with self._lock:
            if plans := self._plans.get(message.key):
                self._plans[message.key] = [ahead for ahead in plans if ahead.message != message]
            gathered = self._gathered.pop(message, None)
        if gathered is None:
            self._sends.setdefault(link, deque()).append(send)
            self._feed_sends(link)
            return
        send.slot, ticket = gathered
        self._hold(link, nbytes)
        self._follow(send, ticket)

    def start(self, key: HandoffKey, layers: frozenset[int]) -> None:
        if self._lender:
            self._lender.start(key, layers)

    def skip(self, message: MessageId) -> None:
        if self._lender:
            self._lender.skip(message)

    def _follow(self, send: _Send, ticket: Ticket) -> None:
        self._sending.append(send)
        self.poller.when(ticket, partial(self._on_gathered, send))

    def _on_gathered(self, send: _Send, digest: int) -> None:
        self._sending.remove(send)
        slot = send.slot
        assert slot
        if send.is_dropped:
            self.give_back(send.link, slot, send.nbytes)
        else:
            try:
                send.link.post_send(tag_of(send.message), [slot.buffer], partial(self._on_sent, send))
            except LinkLost as error:
                self._on_sent(send, error)
        send.on_digest(digest)

    def _on_sent(self, send: _Send, error: BaseException | None) -> None:
        assert send.slot
        self.give_back(send.link, send.slot, send.nbytes)
        send.done(error)

    def receive(self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        if self._lender and (lending := self._lending_of(link)):
            self._lender.borrow(lending, message, extents, nbytes, done)
            return
        slots: list[Slot] = []

        def take() -> list[Buffer] | None:
            slot = self.take(link, nbytes)
            if slot is None:
                self._hungry[link] = None
                return None
            slots.append(slot)
            return [slot.buffer]

        def received(error: BaseException | None) -> None:
            if slots and error is None:
                self._arrived[message] = (link, slots[0])
            elif slots:
                self.give_back(link, slots[0], nbytes)
            done(error)

        try:
            link.post_receive(tag_of(message), Place(nbytes, take), received)
        except LinkLost as error:
            done(error)

    def digest(self, message: MessageId, extents: Extents, on_digest: OnDigest) -> None:
        if self._lender and (borrowed := self._lender.borrowed_digest(message)) is not None:
            on_digest(borrowed)
            return
        link, slot = self._arrived.pop(message)

        def scattered(digest: int) -> None:
            self.give_back(link, slot, slot.buffer.nbytes)
            on_digest(digest)

        self.poller.when(self._stager.scatter(extents, slot), scattered)

    def drop(self, link: Link) -> None:
        waiting = self._sends.pop(link, ())
        self._hungry.pop(link, None)
        self._lending.pop(link, None)
        if self._lender:
            self._lender.drop(link)
        error = LinkLost(f"{link.peer} is gone")
        for send in waiting:
            send.done(error)
            send.on_digest(0)
        for send in self._sending:
            if send.link is link and not send.is_dropped:
                send.is_dropped = True
                send.done(error)

    def close(self) -> None:
        for key in list(self._plans):
            self.forget(key)
        self.poller.drain()
        self._stager.close()

    def _lending_of(self, link: Link) -> LendingLink | None:
        if link not in self._lending:
            self._lending[link] = link if isinstance(link, LendingLink) else None
        return self._lending[link]

    def _is_on_device(self, link: Link) -> bool:
        """What memory the link wants; only a device's slots are lent."""
        return link.moves_device_memory or self._lending_of(link) is not None

    # Slots.

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        return None if nbytes > self._stager.staging_bytes else self._stager.reserve(nbytes, on_device=on_device)

    def release(self, slot: Slot) -> None:
        self._stager.release(slot)
        self._loop.call_soon(self._feed)

    def take(self, link: Link, nbytes: int) -> Slot | None:
        """A slot, if that leaves the others who want one their share."""
        wanting = {*self._hungry, *self._held, *self._sends, link, *(self._lender.waiting if self._lender else ())}
        share = self._stager.staging_bytes // max(2, len(wanting))  # Never all: a peer that hangs keeps what it has.
        held = self._held.get(link, 0)
        if held and held + nbytes > share:
            return None
        slot = self._stager.reserve(nbytes, on_device=self._is_on_device(link))
        if slot is not None:
            self._hold(link, nbytes)
        return slot

    def _hold(self, link: Link, nbytes: int) -> None:
        self._held[link] = self._held.get(link, 0) + nbytes

    def give_back(self, link: Link, slot: Slot, nbytes: int) -> None:
        self._stager.release(slot)
        left = self._held[link] - nbytes
        if left:
            self._held[link] = left
        else:
            del self._held[link]
        self._loop.call_soon(self._feed)

    def _feed(self) -> None:
        """There may be room: first come, first served, but for those who have their share."""
        for link in list(self._sends):
            self._feed_sends(link)
        if self._lender:
            for link in list(self._lender.waiting):
                self._lender.feed(link)
        hungry, self._hungry = self._hungry, {}
        for link in hungry:
            link.retry_receives()

    def _feed_sends(self, link: Link) -> None:
        """Gather what there is room for."""
        while waiting := self._sends.get(link):
            send = waiting[0]
            slot = self.take(link, send.nbytes)
            if slot is None:
                return
            waiting.popleft()
            if not waiting:
                del self._sends[link]
            send.slot = slot
            self._follow(send, self._stager.gather(send.extents, slot))


class HostStager:
    """Blocks in host memory, or cuts of them, copied at once (`HostKvPool.pack`)."""

    def __init__(self, pool: HostKvPool, staging_bytes: int) -> None:
        self._pool = pool
        self._staging_bytes = staging_bytes
        self._free_bytes = staging_bytes
        # By size: memory that was touched. A first touch takes longer than all else that is done with a message.
        self._kept: dict[int, list[HostBuffer]] = {}
        self._kept_bytes = 0
        self._lock = Lock()

    @property
    def message_bytes_max(self) -> int:
        return self._staging_bytes // 2

    @property
    def staging_bytes(self) -> int:
        return self._staging_bytes

    def reserve(self, nbytes: int, *, on_device: bool) -> HostSlot | None:
        with self._lock:
            if nbytes > self._free_bytes:
                return None
            self._free_bytes -= nbytes
            if kept := self._kept.get(nbytes):
                self._kept_bytes -= nbytes
                return HostSlot(kept.pop())
            if self._kept_bytes > self._free_bytes:
                self._kept.clear()
                self._kept_bytes = 0
        return HostSlot(np.empty(nbytes, np.uint8))

    def release(self, slot: Slot) -> None:
        buffer = slot.buffer
        assert not isinstance(buffer, DeviceBuffer)
        with self._lock:
            self._free_bytes += buffer.nbytes
            self._kept.setdefault(buffer.nbytes, []).append(buffer)
            self._kept_bytes += buffer.nbytes

    def prepare(self, extents: Iterable[Extent]) -> None:
        pass

    def gather(self, extents: Iterable[Extent], slot: Slot, *, stream: object | None = None) -> _Moved:
        assert isinstance(slot, HostSlot)
        self._pool.pack(extents, slot.buffer)
        return _Moved(digest_of([slot.buffer]))

    def scatter(self, extents: Iterable[Extent], slot: Slot) -> _Moved:
        assert isinstance(slot, HostSlot)
        self._pool.unpack(extents, slot.buffer)
        return _Moved(digest_of([slot.buffer]))

    def bind_thread(self) -> None:
        pass

    def fence(self) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _Moved:
    """Done when it was asked for."""

    _digest: int

    def poll(self) -> int:
        return self._digest
