"""A link whose receiver scatters straight out of the sender's staging ring, which it has mapped.

The sender offers a slot when it knows that a message will lie there, and wakes the receiver up when the gather is launched;
the receiver watches the flag that the gather raises in shared memory, scatters out of the slot into its own blocks, and
says that the slot is free. Nobody but the receiver's own kernels writes into its memory: an abort is over as soon as
those that run have ended, whatever the peer does. A sender that takes a slot back too early (its link is lost then) is
found out by the digest.

What does not lie in the ring (host memory, empty messages) takes the stream that control frames take. Frames on it: one byte for
the kind, then a control frame of the link's user, {tag, lease}, {tag} of a message that is empty (or whose offer is taken
back) or whose slot is free, or the tags of those that are being gathered. Every offer is answered by one "free".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ..base import Buffer, DeviceBuffer, Done, Place
from ..errors import LinkLost, TransportError
from ..poller import Poller
from ..stager import Lease, MappedRing, Reader, Ring, Slot, Ticket
from .channel_link import EARLY_MAX, ChannelLink
from .tcp import TcpLink

_OFFER, _EMPTY, _FREED, _GO = 2, 3, 4, 5
_OFFER_FRAME = struct.Struct("<BQQQQQ")
_TAG_FRAME = struct.Struct("<BQ")
_NOTHING = Lease(0, 0, 0, 0)


@dataclass(slots=True)
class _Receive:
    tag: int
    nbytes: int
    reader: Reader
    done: Callable[[BaseException | None, int], None]
    is_on_stream: bool  # it may come there, too


@dataclass(slots=True)
class _Lent:
    """A slot that a receive waits for; a `Ticket` that speaks when it is filled or not wanted any more."""

    ring: MappedRing
    lease: Lease
    is_watched: bool = False
    is_dropped: bool = False

    def poll(self) -> int | None:
        return 0 if self.is_dropped or self.ring.is_filled(self.lease) else None


class _Copy:
    """Implements `stager.Reader`: into a place that is asked for when the message is there."""

    def __init__(self, ring: Ring, place: Place) -> None:
        self._ring, self._place = ring, place

    def arm(self, slot: Slot) -> None:
        self._slot = slot

    def launch(self) -> Ticket | None:
        buffers = self._place.take()
        return None if buffers is None else self._ring.copy(self._slot, buffers)

    def cancel(self) -> None:
        pass


class RingLink(ChannelLink):
    """One connected stream, and a mapped ring. Implements `base.Link` and `stager.LendingLink`."""

    def __init__(
        self, channel: TcpLink, ring: Ring, mapped: MappedRing, poller: Poller, on_over: Callable[[RingLink], None]
    ) -> None:
        super().__init__(channel)
        self._ring, self._mapped = ring, mapped
        self._poller = poller
        self._on_over = on_over
        self._sends: dict[int, Done] = {}  # offered
        self._waiting: dict[int, _Receive] = {}  # no offer has come yet
        self._early: dict[int, Lease] = {}  # no receive was posted yet
        self._gone: set[int] = set()  # of those: they are being gathered
        self._matched: dict[int, _Receive] = {}  # an offer has come; nothing reads it yet
        self._lent: dict[int, _Lent] = {}  # of those: perhaps not filled yet
        self._held: dict[int, _Receive] = {}  # of those: there was no room
        self._reading: dict[int, _Receive] = {}  # our own kernel reads the slot
        self._read_bytes = 0

    @property
    def transport(self) -> str:
        return self._ring.name

    @property
    def moves_device_memory(self) -> bool:
        return self._ring.is_on_device

    @property
    def _is_sending(self) -> bool:
        return bool(self._sends)

    @property
    def _is_reading(self) -> bool:
        return bool(self._reading)

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received + self._read_bytes

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        """Also raises TypeError for device memory outside of the ring, or in several pieces."""
        self._check_alive()
        if not sum(buffer.nbytes for buffer in buffers):
            self._channel.send_control(_TAG_FRAME.pack(_EMPTY, tag))
            self._loop.call_soon(done, None)
        elif isinstance(buffers[0], DeviceBuffer) and len(buffers) == 1:
            self._offer(tag, self._ring.lease(buffers[0], None), done)
            self.go([tag])
        else:
            self._channel.post_send(tag, buffers, done)

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        self._check_alive()

        def came_on_stream(error: BaseException | None) -> None:
            self._waiting.pop(tag, None)
            done(error)

        self._channel.post_receive(tag, place, came_on_stream)
        reader = _Copy(self._ring, place)
        self._expect(_Receive(tag, place.nbytes, reader, lambda error, _: done(error), is_on_stream=True))

    def retry_receives(self) -> None:
        self._channel.retry_receives()
        held, self._held = self._held, {}
        for receive in held.values():
            self._read(receive)

    # Slots.

    def lend(self, tag: int, slot: Slot, ticket: Ticket, done: Done) -> None:
        """See `stager.LendingLink`."""
        self._check_alive()
        self._offer(tag, self._ring.lease(slot.buffer, ticket), done)

    def borrow(
        self,
        tag: int,
        nbytes: int,
        reader: Reader,
        done: Callable[[BaseException | None, int], None],
    ) -> None:
        """See `stager.LendingLink`."""
        self._check_alive()
        self._expect(_Receive(tag, nbytes, reader, done, is_on_stream=False))

    def _offer(self, tag: int, lease: Lease, done: Done) -> None:
        assert tag not in self._sends, f"tag {tag} is being sent already"
        self._channel.send_control(_OFFER_FRAME.pack(_OFFER, tag, *lease))
        self._sends[tag] = done

    def go(self, tags: Sequence[int]) -> None:
        """See `stager.LendingLink`. Written at once: the peer wakes up while we go on."""
        self._check_alive()
        self._channel.send_control(struct.pack(f"<B{len(tags)}Q", _GO, *tags))
        self._channel.flush()

    def _expect(self, receive: _Receive) -> None:
        assert receive.tag not in self._waiting, f"tag {receive.tag} is posted already"
        self._waiting[receive.tag] = receive
        if (lease := self._early.pop(receive.tag, None)) is not None:
            # Not within the call that posts it.
            self._loop.call_soon(self._match, receive.tag, lease)

    # What the peer says.

    def _on_frame(self, kind: int, frame: bytes) -> bool:
        if kind == _OFFER and len(frame) == _OFFER_FRAME.size:
            _, tag, *lease = _OFFER_FRAME.unpack(frame)
            self._on_offer(tag, Lease(*lease))
        elif kind in (_EMPTY, _FREED) and len(frame) == _TAG_FRAME.size:
            tag = _TAG_FRAME.unpack(frame)[1]
            if kind == _EMPTY:
                self._on_empty(tag)
            else:
                self._on_freed(tag)
        elif kind == _GO and len(frame) % 8 == 1:
            self._on_go(struct.unpack_from(f"<{len(frame) // 8}Q", frame, 1))
        else:
            return False
        return True

    def _on_offer(self, tag: int, lease: Lease) -> None:
        is_known = tag in self._early or tag in self._matched or tag in self._reading
        if is_known or len(self._early) == EARLY_MAX:
            self._lose(LinkLost(f"{self.peer} offered messages that nobody expects"))
        elif tag in self._waiting:
            self._match(tag, lease)
        else:
            self._early[tag] = lease

    def _on_empty(self, tag: int) -> None:
        """Of an offer that is taken back, only what nobody reads yet is given up."""
        if self._early.get(tag, _NOTHING).nbytes:
            del self._early[tag]
            self._gone.discard(tag)
            self._free(tag)
        elif receive := self._matched.pop(tag, None):
            self._held.pop(tag, None)
            if lent := self._lent.pop(tag, None):
                lent.is_dropped = True
            receive.reader.cancel()
            self._free(tag)
            receive.done(TransportError(f"{self.peer} took message {tag:#x} back"), 0)
        elif tag not in self._reading:
            self._on_offer(tag, _NOTHING)

    def _on_go(self, tags: Sequence[int]) -> None:
        is_cold = self._poller.is_cold
        for tag in tags:
            if lent := self._lent.get(tag):
                self._watch(tag, lent)
            elif tag in self._early:
                self._gone.add(tag)
        if is_cold:  # Their gathers take as long as this.
            self._poller.when(self._ring.warm_up(), lambda _: None)

    def _on_freed(self, tag: int) -> None:
        done = self._sends.pop(tag, None)
        if done is None:
            self._lose(LinkLost(f"{self.peer} has read message {tag:#x}, which was not offered"))
            return
        done(None)
        self._is_idle.set()

    # Reading.

    def _match(self, tag: int, lease: Lease) -> None:
        receive = self._waiting.pop(tag, None)
        if receive is None:
            return  # Lost meanwhile, or it came on the stream after all.
        if receive.is_on_stream:
            self._channel.withdraw(tag)
        if lease.nbytes != receive.nbytes or not lease.nbytes:
            self._end_at_once(receive, lease)
            return
        try:
            receive.reader.arm(self._mapped.slot(lease))
        except (ValueError, TransportError) as error:
            self._waiting[tag] = receive
            self._lose(LinkLost(f"cannot read what {self.peer} offered: {error}"))
            return
        self._matched[tag] = receive
        lent = self._lent[tag] = _Lent(self._mapped, lease)
        if tag in self._gone:
            self._gone.discard(tag)
            self._watch(tag, lent)

    def _watch(self, tag: int, lent: _Lent) -> None:
        if not lent.is_watched:
            lent.is_watched = True
            self._poller.when(lent, lambda _: self._on_filled(tag, lent))

    def _end_at_once(self, receive: _Receive, lease: Lease) -> None:
        """Nothing is to be read, or what is offered has another length."""
        error = f"{self.peer} sent {lease.nbytes} B for a receive of {receive.nbytes} B"
        if lease.nbytes > receive.nbytes:
            self._waiting[receive.tag] = receive
            self._lose(LinkLost(error))
            return
        if lease.nbytes:
            self._free(receive.tag)
        receive.done(None if lease.nbytes == receive.nbytes else TransportError(error), 0)

    def _on_filled(self, tag: int, lent: _Lent) -> None:
        if not lent.is_dropped:
            del self._lent[tag]
            self._read(self._matched[tag])

    def _read(self, receive: _Receive) -> None:
        """Start our kernel, or hold the message until there is room."""
        if self._error:
            return
        try:
            ticket = receive.reader.launch()
        except (TransportError, RuntimeError) as error:  # A pool that is closed, a device that fails.
            self._waiting[receive.tag] = self._matched.pop(receive.tag)
            self._lose(LinkLost(f"cannot read what {self.peer} offered: {error}"))
            return
        if ticket is None:
            self._held[receive.tag] = receive
            return
        del self._matched[receive.tag]
        self._reading[receive.tag] = receive
        self._poller.when(ticket, partial(self._on_read, receive))

    def _on_read(self, receive: _Receive, digest: int) -> None:
        del self._reading[receive.tag]
        if self._error:
            receive.done(self._error, 0)
            self._check_over()
            return
        self._read_bytes += receive.nbytes
        receive.done(None, digest)
        if self._error is None:
            self._free(receive.tag)

    def _free(self, tag: int) -> None:
        """Written in the loop's next turn, together with others and with what was just said."""
        self._channel.send_control(_TAG_FRAME.pack(_FREED, tag))

    # The end.

    def _let_go(self, error: LinkLost) -> None:
        """What was posted on the channel, also of `_waiting`, has ended."""
        for lent in self._lent.values():
            lent.is_dropped = True
        for receive in self._matched.values():
            receive.reader.cancel()
        sends = list(self._sends.values())
        receives = [*self._waiting.values(), *self._matched.values()]
        for record in (self._sends, self._waiting, self._early, self._lent, self._held, self._matched):
            record.clear()
        self._gone.clear()
        for done in sends:
            done(error)
        for receive in receives:
            receive.done(error, 0)

    def _end(self) -> None:
        self._mapped.close()
        self._on_over(self)
