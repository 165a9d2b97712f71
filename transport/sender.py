"""The prefill side of every hand-off: claim, send each layer of each chunk as it is computed, wait until it has landed.

An order's source blocks are held until its end, so a lost link or a wrong digest is repaired by claiming again: the decode
side keeps what was good and grants the rest. Every announced message is sent, an empty one if there is nothing to send any
more: that is how posted receives of a given-up transfer come free without dropping the link.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from . import frames
from .base import Chunk, HandoffKey, SendEnd, SendOrder, SendReleased
from .handoff import (
    DRAIN_S,
    AbortLink,
    AbortOrder,
    Announce,
    Close,
    ComputeDigest,
    Dial,
    DialFailed,
    Digested,
    Emit,
    FrameReceived,
    Instruction,
    LayerReady,
    LinkActive,
    LinkId,
    LinkLost,
    LinkUp,
    LinkWatch,
    MessageDone,
    MessageId,
    OpenOrder,
    PostSend,
    SenderEvent,
    SendFrame,
    Tick,
)

TRIES_MAX = 3  # claims of one order: the first, and two after a lost link or a wrong digest


@dataclass(slots=True)
class _Part:
    """A chunk as the engine announced it."""

    chunk: Chunk
    ready: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Sending:
    """The wanted blocks of a part, on one grant."""

    number: int
    part: _Part
    first_block: int
    block_ids: tuple[int, ...]
    posted: set[int] = field(default_factory=set)
    given_up: set[int] = field(default_factory=set)  # sent empty
    digests: dict[int, int] = field(default_factory=dict)
    is_announced_done: bool = False


@dataclass(slots=True)
class _Grant:
    link: LinkId
    transfer: int
    skip_block: int
    end_block: int
    parts_begun: int = 0
    chunks: list[_Sending] = field(default_factory=list)
    is_done: bool = False
    stop_at: float | None = None  # stopping; the link is aborted then
    cancel_reason: str = ""  # why the decode side wants it stopped


@dataclass(slots=True)
class _Order:
    order: SendOrder
    deadline: float
    tries: int = 1
    link: LinkId | None = None  # claimed on
    grant: _Grant | None = None
    parts: list[_Part] = field(default_factory=list)
    next_block: int = 0
    is_last_announced: bool = False
    reading: int = 0  # sends and digests that read the source blocks, of all grants
    kv_bytes: int = 0
    ending: str | None = None  # reason; "" has landed

    @property
    def key(self) -> HandoffKey:
        return self.order.key


class Sender:
    """Tell it events with the time; do what it says, in order."""

    def __init__(self, *, layer_block_bytes: tuple[int, ...]) -> None:
        self._layer_block_bytes = layer_block_bytes
        self._layers = len(layer_block_bytes)
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
            case LayerReady():
                self._on_layer_ready(event.key, event.layer)
            case MessageDone():
                self._on_read(event.message, now, event.error)
            case Digested():
                self._on_digest(event.message, event.digest, now)
            case FrameReceived():
                self._on_frame(event.link, event.frame, now)
            case Announce():
                self._on_announce(event.key, event.chunk)
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
        if not order.addresses or order.blocks < 0:
            raise ValueError("an order names at least one address and no negative number of blocks")
        self._orders[order.key] = _Order(order, now + order.timeout_s, is_last_announced=order.blocks == 0)
        self._out.append(Dial(order.key, order.addresses))

    def _on_announce(self, key: HandoffKey, chunk: Chunk) -> None:
        order = self._orders.get(key)
        if order is None:
            return  # It has ended, and the engine does not know yet.
        end = chunk.first_block + len(chunk.block_ids)
        if order.is_last_announced or chunk.first_block != order.next_block or end > order.order.blocks:
            raise ValueError(
                f"chunk of blocks {chunk.first_block}..{end} after {order.next_block} of {order.order.blocks}"
            )
        if chunk.is_last != (end == order.order.blocks):
            raise ValueError(f"the last chunk ends at block {order.order.blocks}, this one at {end}")
        if len(order.parts) == frames.CHUNKS_MAX:
            raise ValueError(f"a hand-off has at most {frames.CHUNKS_MAX} chunks")
        order.parts.append(_Part(chunk))
        order.next_block = end
        order.is_last_announced = chunk.is_last
        self._advance(order)

    def _on_layer_ready(self, key: HandoffKey, layer: int) -> None:
        order = self._orders.get(key)
        if order is None:
            return
        part = next((part for part in order.parts if layer not in part.ready), None)
        if part is None or not 0 <= layer < self._layers:
            raise ValueError(f"layer {layer} of no announced chunk")
        part.ready.add(layer)
        grant = order.grant
        if grant is None or grant.stop_at is not None:
            return
        sending = next((sending for sending in grant.chunks if sending.part is part), None)
        if sending is not None:
            self._send_layer(order, grant, sending, layer)

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
        if not frame.skip_blocks <= frame.end_block <= order.order.blocks:
            self._out.append(AbortLink(link, "grant out of bounds"))
            return
        order.grant = _Grant(link, frame.transfer, frame.skip_blocks, frame.end_block)
        self._granted[link, frame.transfer] = order
        self._advance(order)

    # Sending.

    def _advance(self, order: _Order) -> None:
        """Begin what was announced since, and say Done when all is sent."""
        grant = order.grant
        if grant is None or grant.stop_at is not None:
            return
        for part in order.parts[grant.parts_begun :]:
            grant.parts_begun += 1
            self._begin(order, grant, part)
        all_done = all(sending.is_announced_done for sending in grant.chunks)
        if order.is_last_announced and all_done and not grant.is_done:
            grant.is_done = True
            self._out.append(SendFrame(grant.link, frames.Done(grant.transfer)))

    def _begin(self, order: _Order, grant: _Grant, part: _Part) -> None:
        chunk = part.chunk
        first = max(chunk.first_block, grant.skip_block)
        end = min(chunk.first_block + len(chunk.block_ids), grant.end_block)
        if first >= end:
            return
        block_ids = chunk.block_ids[first - chunk.first_block : end - chunk.first_block]
        sending = _Sending(len(grant.chunks), part, first, block_ids)
        grant.chunks.append(sending)
        start = frames.ChunkStart(grant.transfer, sending.number, first, len(block_ids))
        self._out.append(SendFrame(grant.link, start))
        for layer in sorted(part.ready):
            self._send_layer(order, grant, sending, layer)

    def _send_layer(self, order: _Order, grant: _Grant, sending: _Sending, layer: int) -> None:
        message = MessageId(order.key, grant.link, grant.transfer, sending.number, layer)
        sending.posted.add(layer)
        order.reading += 2
        self._out.append(PostSend(message, sending.block_ids))
        self._out.append(ComputeDigest(message, sending.block_ids, is_received=False))

    def _on_read(self, message: MessageId, now: float, error: BaseException | None) -> None:
        order = self._orders[message.key]
        order.reading -= 1
        grant = order.grant
        if error is None and grant and (grant.link, grant.transfer) == (message.link, message.transfer):
            sending = grant.chunks[message.chunk]
            if message.layer not in sending.given_up:
                order.kv_bytes += self._layer_block_bytes[message.layer] * len(sending.block_ids)
        self._settle(order, now)

    def _on_digest(self, message: MessageId, digest: int, now: float) -> None:
        order = self._orders[message.key]
        order.reading -= 1
        grant = order.grant
        if grant and (grant.link, grant.transfer) == (message.link, message.transfer) and grant.stop_at is None:
            sending = grant.chunks[message.chunk]
            sending.digests[message.layer] = digest
            if len(sending.digests) == self._layers:
                sending.is_announced_done = True
                digests = b"".join(sending.digests[layer].to_bytes(8, "little") for layer in range(self._layers))
                done = frames.ChunkDone(grant.transfer, sending.number, digests)
                self._out.append(SendFrame(grant.link, done))
                self._advance(order)
        self._settle(order, now)

    # What happens to links.

    def _on_link(self, event: LinkUp | DialFailed | LinkActive | LinkLost, now: float) -> None:
        match event:
            case LinkActive():
                self._watch.hear(event.link, now)
            case LinkUp():
                order = self._orders.get(event.key)
                if order and order.ending is None and order.link is None:
                    order.link = event.link
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
        self._out.append(SendFrame(link, frames.Claim(key, wanted.blocks, wanted.fingerprint, wanted.decode_epoch)))

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
            for layer in range(self._layers):
                if layer not in sending.posted:
                    sending.posted.add(layer)
                    sending.given_up.add(layer)
                    order.reading += 1
                    message = MessageId(order.key, grant.link, grant.transfer, sending.number, layer)
                    self._out.append(PostSend(message, ()))

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
