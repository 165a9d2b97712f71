"""The decode side of every hand-off: who may write which blocks, when they may be used, when they may be freed.

A token is expected once, then granted to one writer at a time, the newest (attempt, delivery); it lands when every block of
every layer is here with the digest that its sender computed. Blocks are given back only when no writer can reach them:
all posted receives are done and the sender said that no more will come, or its link is gone.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from itertools import islice

from . import errors, frames
from .base import Expectation, Extent, HandoffKey, ReceiveEnd
from .handoff import (
    DRAIN_S,
    HOLD_S,
    LOST_S,
    RECLAIM_S,
    AbortLink,
    CancelExpectation,
    Close,
    ComputeDigest,
    Digested,
    Emit,
    Expect,
    FrameReceived,
    Instruction,
    LinkActive,
    LinkGreeted,
    LinkId,
    LinkLost,
    LinkWatch,
    MessageDone,
    MessageId,
    PostReceive,
    ReceiverEvent,
    SendFrame,
    Tick,
)
from .layout import KvLayout
from .reception import Claim, Grant, ReceivedChunk, Reception
from .wire import Wire

log = logging.getLogger(__name__)
SPENT_TOKENS_MAX = 1 << 14
HELD_CLAIMS_MAX = 1 << 10


class Receiver:
    """Tell it events with the time; do what it says, in order."""

    def __init__(self, layout: KvLayout, *, epoch: int) -> None:
        self._block_tokens = layout.shape.block_tokens
        self._fingerprint = layout.fingerprint()
        self._epoch = epoch
        self._wires: dict[LinkId, Wire] = {}
        self._receptions: dict[bytes, Reception] = {}
        self._transfers: dict[int, Reception] = {}
        self._extents: dict[MessageId, tuple[Extent, ...]] = {}  # of messages on their way
        self._held: dict[bytes, Claim] = {}
        self._spent: OrderedDict[bytes, bool] = OrderedDict()  # token -> has it landed
        self._watch = LinkWatch()
        self._last_transfer = 0
        self._out: list[Instruction] = []
        self.refusals: dict[str, int] = {}

    @property
    def is_idle(self) -> bool:
        """Nothing to time out: it needs no ticks."""
        return not self._receptions and not self._held

    @property
    def open_tokens(self) -> int:
        return len(self._receptions)

    def on(self, event: ReceiverEvent, now: float) -> list[Instruction]:
        """Raises ValueError for an Expect that is wrong in itself; nothing has changed then."""
        match event:
            case FrameReceived():
                self._on_frame(event.link, event.frame, now)
            case MessageDone():
                self._on_message(event, now)
            case Digested():
                self._on_digest(event.message, event.digest, now)
            case LinkActive():
                self._watch.hear(event.link, now)
            case LinkGreeted():
                self._wires[event.link] = event.wire
            case LinkLost():
                self._on_lost(event.link, now)
            case Tick():
                self._on_tick(now)
            case Expect():
                self._expect(event.expectation, now)
            case CancelExpectation():
                if reception := self._receptions.get(event.token):
                    self._finish(reception, "cancelled", now)
            case Close():
                self._close(now)
        out, self._out = self._out, []
        return out

    # What the engine asks for.

    def _expect(self, expectation: Expectation, now: float) -> None:
        if expectation.token in self._receptions or expectation.token in self._spent:
            raise ValueError("this token was expected before")
        if len(expectation.token) != 16:
            raise ValueError("a token has 16 bytes")
        firsts = self._firsts(expectation)
        deadline = now + expectation.timeout_s
        good = min(expectation.end_token, *firsts)
        reception = Reception(expectation, firsts, deadline, reclaim_by=deadline, good=good)
        self._receptions[expectation.token] = reception
        claim = self._held.pop(expectation.token, None)
        if good == expectation.end_token:
            # Nothing is wanted: whoever claims it, now or later, need not even compute the rest.
            if claim:
                self._out.append(SendFrame(claim.link, frames.Landed(frames.WireKey.of(claim.key))))
            self._end(reception, is_landed=True)
        elif claim:
            self._offer(reception, claim, now)

    def _firsts(self, expectation: Expectation) -> tuple[int, ...]:
        """The first wanted token of each group. Raises ValueError when its blocks are not those of the wanted tokens."""
        if len(expectation.groups) != len(self._block_tokens):
            raise ValueError(f"{len(expectation.groups)} groups of blocks for {len(self._block_tokens)} KV groups")
        firsts = []
        for (first_block, block_ids), block_tokens in zip(expectation.groups, self._block_tokens, strict=True):
            wanted = max(0, -(-expectation.end_token // block_tokens) - first_block)
            if first_block < 0 or len(block_ids) != wanted:
                raise ValueError(f"{len(block_ids)} blocks from {first_block} up to token {expectation.end_token}")
            if len(set(block_ids)) != len(block_ids):
                raise ValueError("a block is named twice")
            firsts.append(first_block * block_tokens)
        return tuple(firsts)

    def _finish(self, reception: Reception, reason: str, now: float) -> None:
        """End it unlanded, as soon as its blocks are safe."""
        if reception.ending:
            return
        reception.ending = reason
        if successor := reception.successor:
            self._refuse(successor.link, successor.key, "spent_token")
            reception.successor = None
        if reception.grant:
            reason_on_wire: frames.CancelReason = "timeout" if reason == "timeout" else "cancelled"
            self._stop(reception.grant, reason_on_wire, now)
        self._settle(reception, now)

    def _close(self, now: float) -> None:
        for claim in self._held.values():
            self._refuse(claim.link, claim.key, "closing")
        self._held.clear()
        for reception in list(self._receptions.values()):
            if grant := reception.grant:
                self._out.append(AbortLink(grant.link, "closing"))
                grant.stop_at = float("inf")
            self._finish(reception, "closing", now)

    # What a peer says.

    def _on_frame(self, link: LinkId, frame: frames.Frame, now: float) -> None:
        self._watch.hear(link, now)
        match frame:
            case frames.Claim():
                self._on_claim(link, frame, now)
            case frames.ChunkStart():
                if found := self._granted(link, frame.transfer):
                    self._on_chunk_start(*found, frame)
            case frames.ChunkDone():
                if found := self._granted(link, frame.transfer):
                    self._on_chunk_done(*found, frame, now)
            case frames.Done():
                if found := self._granted(link, frame.transfer):
                    self._on_done(*found, now)
            case frames.Drained():
                if found := self._granted(link, frame.transfer):
                    found[1].is_drained = True
                    self._settle(found[0], now)
            case frames.Failed():
                self._on_failed(link, frame.key.key, now)
            case _:
                pass

    def _granted(self, link: LinkId, transfer: int) -> tuple[Reception, Grant] | None:
        """The live grant a frame speaks of; None for one that is over (its frames may still be on the way)."""
        reception = self._transfers.get(transfer)
        if reception is None or reception.grant is None or reception.grant.link != link:
            return None
        return reception, reception.grant

    def _on_claim(self, link: LinkId, frame: frames.Claim, now: float) -> None:
        key = frame.key.key
        if frame.fingerprint != self._fingerprint:
            return self._refuse(link, key, "fingerprint")
        if frame.decode_epoch != self._epoch:
            return self._refuse(link, key, "wrong_epoch")
        if key.token in self._spent:
            if not self._spent[key.token]:
                return self._refuse(link, key, "spent_token")
            # Its sender died, or the link, between our Landed and its ack: the job is done all the same.
            self._out.append(SendFrame(link, frames.Landed(frame.key)))
            return None
        claim = Claim(link, key, frame.tokens, now + HOLD_S)
        if reception := self._receptions.get(key.token):
            return self._offer(reception, claim, now)
        return self._hold(claim)

    def _hold(self, claim: Claim) -> None:
        held = self._held.get(claim.key.token)
        if held is None and len(self._held) >= HELD_CLAIMS_MAX:
            return self._refuse(claim.link, claim.key, "busy")
        if held is not None:
            if _order(claim.key) < _order(held.key):
                return self._refuse(claim.link, claim.key, "stale_attempt")
            if (held.link, held.key) != (claim.link, claim.key):
                self._refuse(held.link, held.key, "stale_attempt")
        self._held[claim.key.token] = claim
        return None

    def _offer(self, reception: Reception, claim: Claim, now: float) -> None:
        """Grant a claim now, after the older writer has stopped, or never."""
        grant, successor = reception.grant, reception.successor
        if reception.ending:
            return self._refuse(claim.link, claim.key, "spent_token")
        if claim.tokens < reception.expectation.end_token:
            return self._refuse(claim.link, claim.key, "bad_claim")
        floor = max(reception.newest, (reception.expectation.attempt, 0))
        if _order(claim.key) < floor or (successor and _order(claim.key) < _order(successor.key)):
            return self._refuse(claim.link, claim.key, "stale_attempt")
        if grant is None:
            return self._grant(reception, claim, now)
        if (grant.link, grant.key) == (claim.link, claim.key) and grant.stop_at is None:
            return None  # Said twice; it holds the grant.
        if successor and (successor.link, successor.key) != (claim.link, claim.key):
            self._refuse(successor.link, successor.key, "stale_attempt")
        reception.successor = claim
        self._stop(grant, "replaced", now)
        return self._settle(reception, now)

    def _grant(self, reception: Reception, claim: Claim, now: float) -> None:
        self._last_transfer = (self._last_transfer + 1) % frames.TRANSFERS_MAX
        while self._last_transfer in self._transfers:
            self._last_transfer = (self._last_transfer + 1) % frames.TRANSFERS_MAX
        firsts = tuple(max(first, reception.good) for first in reception.firsts)
        end_token = reception.expectation.end_token
        reception.grant = Grant(
            claim.link,
            self._wires[claim.link],
            claim.key,
            self._last_transfer,
            firsts,
            next_token=min(end_token, *firsts),
        )
        reception.newest = _order(claim.key)
        reception.reclaim_by = reception.deadline
        self._transfers[self._last_transfer] = reception
        self._watch.hear(claim.link, now)
        wire_key = frames.WireKey.of(claim.key)
        self._out.append(SendFrame(claim.link, frames.Grant(wire_key, self._last_transfer, firsts, end_token)))

    def _on_chunk_start(self, reception: Reception, grant: Grant, frame: frames.ChunkStart) -> None:
        start, end = frame.first_token, frame.end_token
        wanted_end = reception.expectation.end_token
        is_next = frame.chunk == len(grant.chunks) and start == grant.next_token < end <= wanted_end
        if not is_next or not grant.wire.is_border(end, wanted_end) or grant.is_done or grant.is_drained:
            self._drop(grant, f"chunk {frame.chunk} of tokens {start}..{end} is out of place")
            return
        messages = grant.wire.messages(grant.firsts, start, end, frame.layers_per_message)
        sizes = tuple(map(grant.wire.nbytes, messages))
        if max(sizes, default=0) > grant.wire.sizes.bytes_max:
            self._drop(grant, f"a message of {max(sizes)} B; at most {grant.wire.sizes.bytes_max} find room here")
            return
        grant.chunks.append(ReceivedChunk(end, sizes))
        grant.next_token = end
        # Also while it is being stopped: the blocks are still ours to be written, and each message must find its receive.
        for number, message in enumerate(messages):
            grant.posted += 1
            message_id = MessageId(grant.key, grant.link, grant.transfer, frame.chunk, number)
            extents = grant.wire.extents(message, reception.expectation.groups)
            self._extents[message_id] = extents
            self._out.append(PostReceive(message_id, extents, sizes[number]))

    def _on_chunk_done(self, reception: Reception, grant: Grant, frame: frames.ChunkDone, now: float) -> None:
        is_awaited = frame.chunk < len(grant.chunks) and grant.chunks[frame.chunk].sent is None
        if not is_awaited or len(frame.digests) != 8 * len(grant.chunks[frame.chunk].message_bytes):
            self._drop(grant, f"digests of chunk {frame.chunk} are out of place")
            return
        digests = (frame.digests[start : start + 8] for start in range(0, len(frame.digests), 8))
        grant.chunks[frame.chunk].sent = tuple(int.from_bytes(digest, "little") for digest in digests)
        self._settle(reception, now)

    def _on_done(self, reception: Reception, grant: Grant, now: float) -> None:
        end_token = reception.expectation.end_token
        if grant.next_token != end_token or any(chunk.sent is None for chunk in grant.chunks):
            self._drop(grant, f"done at token {grant.next_token} of {end_token}")
            return
        grant.is_done = True
        self._settle(reception, now)

    def _on_failed(self, link: LinkId, key: HandoffKey, now: float) -> None:
        held = self._held.get(key.token)
        if held and (held.link, held.key) == (link, key):
            del self._held[key.token]
        reception = self._receptions.get(key.token)
        if reception is None:
            return
        successor, grant = reception.successor, reception.grant
        if successor and (successor.link, successor.key) == (link, key):
            reception.successor = None
        if grant and (grant.link, grant.key) == (link, key):
            grant.is_drained = True
            grant.failure = grant.failure or "sender_failed"
            self._settle(reception, now)

    # What the link and the digests report.

    def _on_message(self, event: MessageDone, now: float) -> None:
        message = event.message
        reception = self._receptions.get(message.key.token)
        grant = reception.grant if reception else None
        if reception is None or grant is None or grant.transfer != message.transfer:
            raise AssertionError(f"a receive outlived its grant: {message}")
        grant.posted -= 1
        chunk = grant.chunks[message.chunk]
        extents = self._extents.pop(message)
        if event.error is not None:
            chunk.is_broken, chunk.is_cut = True, isinstance(event.error, errors.LinkLost)
        else:
            self._watch.hear(message.link, now)
            reception.kv_bytes += chunk.message_bytes[message.number]
            grant.hashing += 1
            self._out.append(ComputeDigest(message, extents))
        self._settle(reception, now)

    def _on_digest(self, message: MessageId, digest: int, now: float) -> None:
        reception = self._receptions[message.key.token]
        grant = reception.grant
        assert grant is not None
        assert grant.transfer == message.transfer, "a digest outlived its grant"
        grant.hashing -= 1
        grant.chunks[message.chunk].here[message.number] = digest
        self._settle(reception, now)

    def _on_lost(self, link: LinkId, now: float) -> None:
        self._wires.pop(link, None)
        for token in [token for token, claim in self._held.items() if claim.link == link]:
            del self._held[token]
        for reception in list(self._receptions.values()):
            if reception.successor and reception.successor.link == link:
                reception.successor = None
            grant = reception.grant
            if grant and grant.link == link:
                assert not grant.posted, "a link was lost before its receives were done"
                grant.is_drained = True
                grant.failure = grant.failure or "link_lost"
                self._settle(reception, now)
        self._watch.forget(link)

    # Time.

    def _on_tick(self, now: float) -> None:
        self._watch.note_tick(now)
        for claim in [claim for claim in self._held.values() if now >= claim.expires_at]:
            del self._held[claim.key.token]
            self._refuse(claim.link, claim.key, "unknown_token")
        for reception in list(self._receptions.values()):
            grant = reception.grant
            if now >= reception.deadline:
                self._finish(reception, reception.failure if grant is None else "timeout", now)
            elif grant is None and now >= reception.reclaim_by:
                self._finish(reception, reception.failure, now)
            if grant and grant.stop_at is not None and now >= grant.stop_at:
                grant.stop_at = float("inf")
                self._out.append(AbortLink(grant.link, "did not drain"))
        granted = {r.grant.link: r.grant for r in self._receptions.values() if r.grant}
        waiting = {claim.link for claim in self._held.values()}
        waiting |= {r.successor.link for r in self._receptions.values() if r.successor}
        for link in self._watch.due([*granted, *sorted(waiting - granted.keys())], now):
            self._out.append(SendFrame(link, frames.Keepalive()))
        for link in self._watch.silent(granted, now):
            for reception in self._receptions.values():
                if reception.grant and reception.grant.link == link:
                    reception.grant.failure = reception.grant.failure or "stalled"
            self._out.append(AbortLink(link, "stalled"))

    # How a grant and a reception end.

    def _stop(self, grant: Grant, reason: frames.CancelReason, now: float) -> None:
        if grant.stop_at is not None or grant.is_drained:
            return
        grant.stop_at = now + DRAIN_S
        self._out.append(SendFrame(grant.link, frames.CancelTransfer(grant.transfer, reason)))

    def _drop(self, grant: Grant, why: str) -> None:
        """A peer broke the protocol: no word of its is worth waiting for."""
        log.warning("dropped a link: %s", why)
        grant.failure = grant.failure or "sender_failed"
        if grant.stop_at != float("inf"):
            grant.stop_at = float("inf")
            self._out.append(AbortLink(grant.link, why))

    def _settle(self, reception: Reception, now: float) -> None:
        """Draw the conclusions of whatever has just changed."""
        if grant := reception.grant:
            self._count_good(reception, grant)
            is_complete = reception.good == reception.expectation.end_token and grant.is_done
            if is_complete and not reception.ending and not grant.posted and not grant.hashing:
                self._land(reception, grant)
                return
            if any(chunk.is_wrong for chunk in islice(grant.chunks, grant.good_chunks, None)) and not grant.failure:
                grant.failure = "digest"
                self._stop(grant, "digest", now)
            if not grant.is_over:
                return
            self._release(reception, grant, now)
        if reception.ending:
            self._end(reception, is_landed=False, reason=reception.ending)
        elif successor := reception.successor:
            reception.successor = None
            self._offer(reception, successor, now)

    def _count_good(self, reception: Reception, grant: Grant) -> None:
        while grant.good_chunks < len(grant.chunks) and (chunk := grant.chunks[grant.good_chunks]).is_good:
            reception.good = chunk.end_token
            grant.good_chunks += 1

    def _release(self, reception: Reception, grant: Grant, now: float) -> None:
        """No writer can reach the blocks any more; they wait for the next claim."""
        del self._transfers[grant.transfer]
        reception.grant = None
        reception.failure = grant.failure or "sender_failed"
        reclaim_by = now + RECLAIM_S
        if reception.failure == "link_lost":  # One that stalled was silent for long enough before.
            reclaim_by = max(reclaim_by, self._watch.heard_at(grant.link, now) + LOST_S)
        reception.reclaim_by = min(reception.deadline, reclaim_by)

    def _land(self, reception: Reception, grant: Grant) -> None:
        del self._transfers[grant.transfer]
        reception.grant = None
        self._out.append(SendFrame(grant.link, frames.Landed(frames.WireKey.of(grant.key))))
        if successor := reception.successor:
            self._out.append(SendFrame(successor.link, frames.Landed(frames.WireKey.of(successor.key))))
        self._end(reception, is_landed=True)

    def _end(self, reception: Reception, *, is_landed: bool, reason: str = "") -> None:
        token = reception.expectation.token
        del self._receptions[token]
        self._spent[token] = is_landed
        if len(self._spent) > SPENT_TOKENS_MAX:
            self._spent.popitem(last=False)
        self._out.append(Emit(ReceiveEnd(token, is_landed, reception.good, reception.kv_bytes, reason)))

    def _refuse(self, link: LinkId, key: HandoffKey, reason: frames.RefuseReason) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self._out.append(SendFrame(link, frames.Refuse(frames.WireKey.of(key), reason)))


def _order(key: HandoffKey) -> tuple[int, int]:
    return key.attempt, key.delivery
