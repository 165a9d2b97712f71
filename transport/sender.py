"""The prefill side of every hand-off: claim, send each layer of each chunk as it is computed, wait until it has landed.

An order's source blocks are held until its end, so a lost link or a wrong digest is repaired by claiming again: the decode
side keeps what was good and grants the rest. Every announced message is sent, an empty one if there is nothing to send any
more: that is how posted receives of a given-up transfer come free without dropping the link.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from . import frames
from .base import Chunk, Extent, HandoffKey, SendEnd, SendOrder, SendReleased
from .handoff import (
    DRAIN_S,
    AbortLink,
    AbortOrder,
    Announce,
    Close,
    Dial,
    DialFailed,
    Digested,
    Emit,
    FrameReceived,
    Instruction,
    LayersReady,
    LinkActive,
    LinkId,
    LinkLost,
    LinkUp,
    LinkWatch,
    MessageDone,
    MessageId,
    OpenOrder,
    PlanSend,
    PostSend,
    SenderEvent,
    SendFrame,
    Tick,
)
from .wire import Message, Wire

TRIES_MAX = 3  # claims of one order: the first, and two after a lost link or a wrong digest


@dataclass(slots=True)
class _Part:
    """A chunk as the engine announced it."""

    chunk: Chunk
    ready: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Planned:
    """A message of a chunk."""

    extents: tuple[Extent, ...]
    nbytes: int
    missing: set[int]  # layers that are not computed yet
    is_posted: bool = False
    is_given_up: bool = False  # sent empty


@dataclass(slots=True)
class _Sending:
    """The wanted tokens of a part, or of some of its tokens, on one grant."""

    number: int
    part: _Part
    messages: list[_Planned]
    number_of: dict[int, int]  # layer -> the message that it is in
    digests: dict[int, int] = field(default_factory=dict)
    is_announced_done: bool = False


@dataclass(slots=True)
class _Grant:
    link: LinkId
    wire: Wire
    transfer: int
    firsts: tuple[int, ...]
    end_token: int
    parts_begun: int = 0
    chunks: list[_Sending] = field(default_factory=list)
    is_done: bool = False
    read_bytes: int = 0  # of messages that are through
    stop_at: float | None = None  # stopping; the link is aborted then
    cancel_reason: str = ""  # why the decode side wants it stopped


@dataclass(slots=True)
class _Order:
    order: SendOrder
    deadline: float
    tries: int = 1
    link: LinkId | None = None  # claimed on
    wire: Wire | None = None  # of that link
    grant: _Grant | None = None
    parts: list[_Part] = field(default_factory=list)
    next_token: int = 0
    reading: int = 0  # sends and digests that read the source blocks, of all grants
    kv_bytes: int = 0
    ending: str | None = None  # reason; "" has landed

    @property
    def key(self) -> HandoffKey:
        return self.order.key

    def has_announced(self, end_token: int) -> bool:
        return self.next_token >= end_token


class Sender:
    """Tell it events with the time; do what it says, in order."""

    def __init__(self, *, layers: int) -> None:
        self._layers = layers
        self._orders: dict[HandoffKey, _Order] = {}
        self._granted: dict[tuple[LinkId, int], _Order] = {}
        self._watch = LinkWatch()
        self._out: list[Instruction] = []

    @property
    def is_idle(self) -> bool:
        """Nothing to time out: it needs no ticks."""
        return not self._orders

    @property
    def open_keys(self) -> int:
        return len(self._orders)

    def on(self, event: SenderEvent, now: float) -> list[Instruction]:
        """Raises ValueError for a call of the engine that is wrong in itself; nothing has changed then."""
        match event:
            case LayersReady():
                self._on_layers_ready(event.key, event.layers)
            case MessageDone():
                self._on_read(event.message, now, event.error)
            case Digested():
                self._on_digest(event.message, event.digest, now)
            case FrameReceived():
                self._on_frame(event.link, event.frame, now)
            case Announce():
                self._on_announce(event.key, event.chunk, now)
            case OpenOrder():
                self._open(event.order, now)
            case AbortOrder():
                if order := self._orders.get(event.key):
                    self._finish(order, event.reason, now)
            case LinkUp() | DialFailed() | LinkActive() | LinkLost():
                self._on_link(event, now)
            case Tick():
                self._on_tick(now)
            case Close():
                self._close(now)
        out, self._out = self._out, []
        return out

    # What the engine asks for.

    def _open(self, order: SendOrder, now: float) -> None:
        if order.key in self._orders:
            raise ValueError("this key is open already")
        if not order.addresses or order.tokens < 0:
            raise ValueError("an order names at least one address and no negative number of tokens")
        self._orders[order.key] = _Order(order, now + order.timeout_s)
        self._out.append(Dial(order.key, order.addresses))

    def _on_announce(self, key: HandoffKey, chunk: Chunk, now: float) -> None:
        order = self._orders.get(key)
        if order is None:
            return  # It has ended, and the engine does not know yet.
        tokens = order.order.tokens
        if chunk.first_token != order.next_token or not order.next_token < chunk.end_token <= tokens:
            raise ValueError(
                f"chunk of tokens {chunk.first_token}..{chunk.end_token} after {order.next_token} of {tokens}"
            )
        order.parts.append(_Part(chunk))
        order.next_token = chunk.end_token
        self._advance(order, now)

    def _on_layers_ready(self, key: HandoffKey, layers: frozenset[int]) -> None:
        order = self._orders.get(key)
        if order is None:
            return
        part = next((part for part in order.parts if not layers <= part.ready), None)
        if part is None or min(layers) < 0 or max(layers) >= self._layers or layers & part.ready:
            raise ValueError(f"layers {sorted(layers)} of no announced chunk")
        part.ready |= layers
        grant = order.grant
        if grant is None or grant.stop_at is not None:
            return
        for sending in grant.chunks:
            if sending.part is part:
                self._send_ready(order, grant, sending, layers)

    def _close(self, now: float) -> None:
        for order in list(self._orders.values()):
            if order.link is not None:
                self._out.append(AbortLink(order.link, "closing"))
            if order.grant and order.grant.stop_at is None:
                order.grant.stop_at = float("inf")
            self._finish(order, "closing", now)

    def _finish(self, order: _Order, reason: str, now: float) -> None:
        """End it unlanded, as soon as nothing reads its blocks."""
        if order.ending is not None:
            return
        order.ending = reason
        if order.grant:
            self._stop(order, order.grant, now)
        elif order.link is not None:
            self._say_failed(order, order.link)
        self._settle(order, now)

    # What the decode side says.

    def _on_frame(self, link: LinkId, frame: frames.Frame, now: float) -> None:
        self._watch.hear(link, now)
        match frame:
            case frames.Grant():
                order = self._claimed(link, frame.key)
                if order and order.grant is None:
                    self._on_grant(order, link, frame, now)
            case frames.Refuse():
                order = self._claimed(link, frame.key)
                if order and order.grant is None and order.ending is None:
                    order.ending = f"refused:{frame.reason}"
                    self._settle(order, now)
            case frames.Landed():
                order = self._claimed(link, frame.key)
                if order and order.ending is None:
                    order.ending = ""
                    if grant := order.grant:  # All of it, also what our own link has not said to be through yet.
                        sent_bytes = sum(message.nbytes for sending in grant.chunks for message in sending.messages)
                        order.kv_bytes += sent_bytes - grant.read_bytes
                    self._drop_grant(order)
                    self._settle(order, now)
            case frames.CancelTransfer():
                order = self._granted.get((link, frame.transfer))
                if order and order.grant and not order.grant.cancel_reason:
                    order.grant.cancel_reason = frame.reason
                    self._stop(order, order.grant, now)
                    self._settle(order, now)
            case _:
                pass

    def _claimed(self, link: LinkId, key: frames.WireKey) -> _Order | None:
        order = self._orders.get(key.key)
        return order if order is not None and order.link == link else None

    def _on_grant(self, order: _Order, link: LinkId, frame: frames.Grant, now: float) -> None:
        if order.ending is not None:
            return  # Our Failed is on its way and ends the grant there.
        assert order.wire
        if frame.end_token > order.order.tokens or len(frame.first_tokens) != order.wire.groups:
            self._out.append(AbortLink(link, "grant out of bounds"))
            return
        order.grant = _Grant(link, order.wire, frame.transfer, frame.first_tokens, frame.end_token)
        self._granted[link, frame.transfer] = order
        self._advance(order, now)

    # Sending.

    def _advance(self, order: _Order, now: float) -> None:
        """Begin what was announced since, and say Done when all that is wanted is sent."""
        grant = order.grant
        if grant is None or grant.stop_at is not None:
            return
        start = min(grant.firsts)
        for part in order.parts[grant.parts_begun :]:
            grant.parts_begun += 1
            first, end = max(part.chunk.first_token, start), min(part.chunk.end_token, grant.end_token)
            if first < end and not self._begin(order, grant, part, first, end):
                self._finish(order, "missing_blocks", now)
                return
        all_done = all(sending.is_announced_done for sending in grant.chunks)
        if order.has_announced(grant.end_token) and all_done and not grant.is_done:
            grant.is_done = True
            self._out.append(SendFrame(grant.link, frames.Done(grant.transfer)))

    def _begin(self, order: _Order, grant: _Grant, part: _Part, first: int, end: int) -> bool:
        """Cut a part into messages; False when it lacks blocks that are wanted."""
        wire, sizes = grant.wire, grant.wire.sizes
        tokens_max = sizes.bytes_max // wire.token_bytes_max
        step = max(wire.unit_tokens, tokens_max - tokens_max % wire.unit_tokens)
        target_bytes = sizes.bulk_bytes if len(part.ready) == self._layers else sizes.computed_bytes
        for start in range(first, end, step):
            stop = min(start + step, end)
            rows = (
                -(-(stop - start) // wire.unit_tokens) * wire.unit_tokens
            )  # A last block that is not full counts whole.
            layer_bytes = rows * wire.token_bytes_max
            part_bytes = layer_bytes * self._layers // sizes.chunk_parts if sizes.chunk_parts else 0
            layers = max(1, min(max(target_bytes, part_bytes), sizes.bytes_max) // layer_bytes)
            layers = min(layers, self._layers)
            try:
                messages = [
                    self._plan(wire, message, part) for message in wire.messages(grant.firsts, start, stop, layers)
                ]
            except LookupError:
                return False
            number_of = {extent.layer: number for number, message in enumerate(messages) for extent in message.extents}
            sending = _Sending(len(grant.chunks), part, messages, number_of)
            self._start_chunk(order, grant, sending, (start, stop, layers))
        return True

    def _plan(self, wire: Wire, message: Message, part: _Part) -> _Planned:
        missing = {entry.layer for entry in message.parts} - part.ready
        return _Planned(wire.extents(message, part.chunk.groups), wire.nbytes(message), missing)

    def _start_chunk(self, order: _Order, grant: _Grant, sending: _Sending, span: tuple[int, int, int]) -> None:
        grant.chunks.append(sending)
        self._out.append(SendFrame(grant.link, frames.ChunkStart(grant.transfer, sending.number, *span)))
        planned = enumerate(sending.messages)
        ids = [
            (self._id(order, grant, sending, number), message.extents, message.nbytes) for number, message in planned
        ]
        self._out.append(PlanSend(order.key, tuple(ids)))
        if not sending.messages:
            self._close_chunk(grant, sending)
        self._send_ready(order, grant, sending, sending.part.ready)

    def _send_ready(self, order: _Order, grant: _Grant, sending: _Sending, layers: Set[int]) -> None:
        """Post the messages that these layers were all that was missing of."""
        for number in sorted({sending.number_of[layer] for layer in layers & sending.number_of.keys()}):
            message = sending.messages[number]
            message.missing -= layers
            if message.missing or message.is_posted:
                continue
            message.is_posted = True
            order.reading += 2
            message_id = self._id(order, grant, sending, number)
            self._out.append(PostSend(message_id, message.extents, message.nbytes))

    def _id(self, order: _Order, grant: _Grant, sending: _Sending, number: int) -> MessageId:
        return MessageId(order.key, grant.link, grant.transfer, sending.number, number)

    def _close_chunk(self, grant: _Grant, sending: _Sending) -> None:
        sending.is_announced_done = True
        digests = b"".join(sending.digests[number].to_bytes(8, "little") for number in range(len(sending.messages)))
        self._out.append(SendFrame(grant.link, frames.ChunkDone(grant.transfer, sending.number, digests)))

    def _on_read(self, message: MessageId, now: float, error: BaseException | None) -> None:
        order = self._orders[message.key]
        order.reading -= 1
        grant = order.grant
        if error is None and grant and (grant.link, grant.transfer) == (message.link, message.transfer):
            planned = grant.chunks[message.chunk].messages[message.number]
            if not planned.is_given_up:
                order.kv_bytes += planned.nbytes
                grant.read_bytes += planned.nbytes
        self._settle(order, now)

    def _on_digest(self, message: MessageId, digest: int, now: float) -> None:
        order = self._orders[message.key]
        order.reading -= 1
        grant = order.grant
        if grant and (grant.link, grant.transfer) == (message.link, message.transfer) and grant.stop_at is None:
            sending = grant.chunks[message.chunk]
            sending.digests[message.number] = digest
            if len(sending.digests) == len(sending.messages):
                self._close_chunk(grant, sending)
                self._advance(order, now)
        self._settle(order, now)

    # What happens to links.

    def _on_link(self, event: LinkUp | DialFailed | LinkActive | LinkLost, now: float) -> None:
        match event:
            case LinkActive():
                self._watch.hear(event.link, now)
            case LinkUp():
                order = self._orders.get(event.key)
                if order and order.ending is None and order.link is None:
                    order.link, order.wire = event.link, event.wire
                    self._watch.hear(event.link, now)
                    self._claim(order, event.link)
            case DialFailed():
                order = self._orders.get(event.key)
                if order and order.ending is None:
                    order.ending = "link_lost"
                    self._settle(order, now)
            case LinkLost():
                self._watch.forget(event.link)
                for order in [order for order in self._orders.values() if order.link == event.link]:
                    self._on_lost(order, now)

    def _claim(self, order: _Order, link: LinkId) -> None:
        wanted = order.order
        key = frames.WireKey.of(order.key)
        self._out.append(SendFrame(link, frames.Claim(key, wanted.tokens, wanted.fingerprint, wanted.decode_epoch)))

    def _on_lost(self, order: _Order, now: float) -> None:
        order.link = None
        self._drop_grant(order)
        if order.ending is None:
            if order.tries < TRIES_MAX:
                # Another way first: what broke this one may break it again.
                turn = order.tries % len(order.order.addresses)
                order.tries += 1
                self._out.append(Dial(order.key, order.order.addresses[turn:] + order.order.addresses[:turn]))
                return
            order.ending = "link_lost"
        self._settle(order, now)

    # Time.

    def _on_tick(self, now: float) -> None:
        self._watch.note_tick(now)
        for order in list(self._orders.values()):
            if now >= order.deadline:
                self._finish(order, "timeout", now)
            grant = order.grant
            if grant and grant.stop_at is not None and now >= grant.stop_at:
                grant.stop_at = float("inf")
                self._out.append(AbortLink(grant.link, "did not drain"))
        links = dict.fromkeys(order.link for order in self._orders.values() if order.link is not None)
        for link in self._watch.due(links, now):
            self._out.append(SendFrame(link, frames.Keepalive()))
        for link in self._watch.silent(links, now):
            self._out.append(AbortLink(link, "stalled"))

    # How a grant and an order end.

    def _stop(self, order: _Order, grant: _Grant, now: float) -> None:
        """Send no more KV, but end every receive that the other side has posted for an announced chunk."""
        if grant.stop_at is not None:
            return
        grant.stop_at = now + DRAIN_S
        for sending in grant.chunks:
            for number, message in enumerate(sending.messages):
                if not message.is_posted:
                    message.is_posted = message.is_given_up = True
                    order.reading += 1
                    self._out.append(PostSend(self._id(order, grant, sending, number), (), 0))

    def _drop_grant(self, order: _Order) -> None:
        if order.grant:
            del self._granted[order.grant.link, order.grant.transfer]
            order.grant = None

    def _say_failed(self, order: _Order, link: LinkId) -> None:
        self._out.append(SendFrame(link, frames.Failed(frames.WireKey.of(order.key), (order.ending or "")[:256])))

    def _settle(self, order: _Order, now: float) -> None:
        """Draw the conclusions of whatever has just changed."""
        if order.reading:
            return
        grant = order.grant
        if grant and grant.stop_at is not None:
            self._drop_grant(order)
            if order.ending is not None:
                self._say_failed(order, grant.link)
            else:
                self._out.append(SendFrame(grant.link, frames.Drained(grant.transfer)))
                if grant.cancel_reason == "digest" and order.tries < TRIES_MAX:
                    order.tries += 1
                    self._claim(order, grant.link)
                    return
                order.ending = "refused:digest" if grant.cancel_reason == "digest" else "cancelled"
        if order.ending is not None:
            del self._orders[order.key]
            self._out.append(Emit(SendReleased(order.key)))
            is_landed = order.ending == ""
            self._out.append(Emit(SendEnd(order.key, is_landed, order.kv_bytes, order.ending)))
