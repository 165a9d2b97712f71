"""Who may not write, and what a failure leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from transport_rig import (
    BLOCK_TOKENS,
    DECODE_EPOCH,
    MakePair,
    Pair,
    blocks_bytes,
    chunk,
    differing_blocks,
    make_layout,
    make_transport,
    send_order,
    until,
)

from hocket.transport import Extent, HandoffKey, Link, SendEnd, SendReleased, frames
from hocket.transport.handoff import LinkId, MessageId
from hocket.transport.layout import HANDOFF_PROTOCOL
from hocket.transport.mover import tag_of


class Peer:
    """A prefill worker written by hand, to say what the real one never says."""

    def __init__(self, link: Link, pair: Pair) -> None:
        self.link = link
        self.pair = pair
        self.heard: list[frames.Frame] = []
        self.is_lost = False
        link.start(lambda payload: self.heard.append(frames.decode(payload)), self._on_lost)

    def _on_lost(self, _: Exception) -> None:
        self.is_lost = True

    def say(self, *said: frames.Frame) -> None:
        for frame in said:
            self.link.send_control(frames.encode(frame))

    def hello(self, protocol: int = HANDOFF_PROTOCOL) -> None:
        layout = self.pair.source.layout
        self.say(frames.Hello(protocol, "by hand", b"n" * 16, layout.fingerprint(), 3, layout.shape))

    def claim(self, key: HandoffKey, blocks: int, *, fingerprint: str = "", epoch: int = DECODE_EPOCH) -> None:
        fingerprint = fingerprint or self.pair.source.layout.fingerprint()
        self.say(frames.Claim(frames.WireKey.of(key), blocks * BLOCK_TOKENS, fingerprint, epoch))

    async def next(self, kind: type[frames.Frame]) -> frames.Frame:
        await until(lambda: any(isinstance(frame, kind) for frame in self.heard))
        return next(frame for frame in self.heard if isinstance(frame, kind))

    async def granted(self, key: HandoffKey, blocks: int) -> frames.Grant:
        self.claim(key, blocks)
        grant = await self.next(frames.Grant)
        assert isinstance(grant, frames.Grant)
        return grant

    def send(self, transfer: int, chunk: int, layer: int, block_ids: list[int]) -> None:
        buffers = self.pair.source.buffers([Extent(layer, tuple(block_ids))])
        tag = tag_of(MessageId(HandoffKey(b"", 0, 0), LinkId(0), transfer, chunk, layer))
        self.link.post_send(tag, buffers, lambda error: None)

    def start_chunk(self, transfer: int, number: int, first_block: int, blocks: int) -> None:
        """One message for each layer."""
        end_token = (first_block + blocks) * BLOCK_TOKENS
        self.say(frames.ChunkStart(transfer, number, first_block * BLOCK_TOKENS, end_token, 1))

    def digests(self, block_ids: list[int]) -> bytes:
        layers = range(len(self.pair.source.layout.layers))
        return b"".join(
            self.pair.source.digest([Extent(layer, tuple(block_ids))]).to_bytes(8, "little") for layer in layers
        )


ByHand = Callable[[Pair], Awaitable[Peer]]


@pytest_asyncio.fixture
async def by_hand() -> AsyncIterator[ByHand]:
    peers: list[Peer] = []

    async def connect(pair: Pair) -> Peer:
        transport = make_transport("inproc")
        peers.append(Peer(await transport.connect(pair.decode.addresses[0], timeout_s=2.0), pair))
        return peers[-1]

    yield connect
    for peer in peers:
        await peer.link.abort()


async def refused(pair: Pair) -> str:
    await until(lambda: pair.ends.send_end)
    assert pair.ends.send_end is not None
    assert [type(event) for event in pair.ends.sent] == [SendReleased, SendEnd]
    return pair.ends.send_end.reason


async def test_a_wrong_epoch_is_refused(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(4))
    pair.open(key, 4, epoch=DECODE_EPOCH - 1)
    assert await refused(pair) == "refused:wrong_epoch"
    assert pair.decode.stats.refusals == {"wrong_epoch": 1}
    assert not pair.ends.received, "the right writer may still come"


async def test_another_layout_is_refused(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(4))
    other = make_layout(model="another/model").fingerprint()
    order = send_order(key, pair.decode.addresses, other, 4, epoch=DECODE_EPOCH, timeout_s=5.0)
    pair.prefill.open(order, pair.ends.sent.append)
    assert await refused(pair) == "refused:fingerprint"


async def test_an_older_attempt_is_refused(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key(attempt=3)
    pair.expect(key, range(4))
    pair.open(HandoffKey(key.token, 2, 9), 4)
    assert await refused(pair) == "refused:stale_attempt"


async def test_a_claim_of_too_few_blocks_is_refused(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(4))
    pair.open(key, 3)
    assert await refused(pair) == "refused:bad_claim"


async def test_a_spent_token_is_refused_and_a_landed_one_is_landed_for_whoever_asks(make_pair: MakePair) -> None:
    pair = await make_pair()
    cancelled, landed = pair.key(), pair.key()
    pair.expect(cancelled, range(4))
    pair.decode.cancel(cancelled.token)
    pair.expect(landed, range(4))
    pair.open(landed, 4)
    pair.push(landed, range(4))
    await until(lambda: len(pair.ends.received) == 2 and pair.ends.send_end)
    pair.ends.sent.clear()
    pair.open(HandoffKey(cancelled.token, 1, 2), 4)
    assert await refused(pair) == "refused:spent_token"
    pair.ends.sent.clear()
    again = HandoffKey(landed.token, 1, 2)
    pair.open(again, 4)
    await until(lambda: pair.ends.send_end)
    assert pair.ends.send_end == SendEnd(again, True, 0)
    with pytest.raises(ValueError, match="expected before"):
        pair.expect(landed, range(4))


async def test_nobody_comes_and_the_expectation_times_out(make_pair: MakePair) -> None:
    pair = await make_pair()
    pair.expect(pair.key(), range(4), timeout_s=0.3)
    await until(lambda: pair.ends.received)
    assert (pair.ends.received[0].reason, pair.ends.received[0].good_token // BLOCK_TOKENS) == ("timeout", 0)


async def test_an_engine_that_never_finishes_times_out_on_both_sides(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(4), timeout_s=5.0)
    pair.open(key, 4, timeout_s=0.3)
    pair.prefill.announce(key, chunk(0, (0, 1, 2, 3)))
    assert await refused(pair) == "timeout"
    await until(lambda: pair.ends.received)
    assert pair.ends.received[0].reason == "sender_failed"


async def test_one_flipped_byte_is_sent_again(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.decode_transport.faults.corrupt_messages = 1
    pair.expect(key, range(10))
    pair.open(key, 10)
    pair.push(key, range(5))
    pair.push(key, range(5, 10), first_block=5)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert differing_blocks(pair.source, range(10), pair.target, range(10)) == []
    assert pair.prefill.stats.kv_bytes_sent > blocks_bytes(pair.source, 10)


async def test_a_link_that_always_corrupts_never_lands_and_keeps_the_good_prefix(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10))
    pair.open(key, 10)
    pair.push(key, range(5))
    await until(lambda: pair.decode.stats.kv_bytes_received == blocks_bytes(pair.source, 5))
    pair.decode_transport.faults.corrupt_messages = 1000
    pair.push(key, range(5, 10), first_block=5)
    await pair.both_ended()
    end = pair.ends.received[0]
    assert (end.is_landed, end.reason, end.good_token // BLOCK_TOKENS) == (False, "digest", 5)
    assert pair.ends.send_end is not None
    assert pair.ends.send_end.reason == "refused:digest"
    assert differing_blocks(pair.source, range(5), pair.target, range(5)) == []


async def test_a_lost_link_is_dialled_again_and_only_the_rest_is_sent(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10))
    pair.open(key, 10)
    pair.push(key, range(6))
    await until(lambda: pair.decode.stats.kv_bytes_received == blocks_bytes(pair.source, 6))
    await asyncio.sleep(0)
    pair.decode_transport.faults.cut()
    pair.push(key, range(6, 10), first_block=6)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert pair.prefill.stats.kv_bytes_sent == blocks_bytes(pair.source, 10)
    assert differing_blocks(pair.source, range(10), pair.target, range(10)) == []


async def test_a_newer_delivery_takes_over_while_the_old_writer_hangs(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    old_key = pair.key()
    pair.expect(old_key, range(10))
    old = await by_hand(pair)
    old.hello()
    grant = await old.granted(old_key, 10)
    old.start_chunk(grant.transfer, 0, 0, 10)
    old.send(grant.transfer, 0, 1, list(range(50, 60)))
    await until(lambda: pair.decode.stats.kv_bytes_received)
    new_key = HandoffKey(old_key.token, 1, 2)
    pair.open(new_key, 10)
    pair.push(new_key, range(10))
    await old.next(frames.CancelTransfer)
    assert not pair.ends.sent, "the old writer has neither drained nor gone"
    await pair.both_ended()
    assert old.is_lost, "it did not drain in time"
    assert pair.ends.received[0].is_landed
    assert differing_blocks(pair.source, range(10), pair.target, range(10)) == []


async def test_an_old_writer_that_drains_keeps_its_link(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    old_key = pair.key()
    pair.expect(old_key, range(10))
    old = await by_hand(pair)
    old.hello()
    grant = await old.granted(old_key, 10)
    pair.open(HandoffKey(old_key.token, 2, 1), 10)
    pair.push(HandoffKey(old_key.token, 2, 1), range(10))
    await old.next(frames.CancelTransfer)
    old.say(frames.Drained(grant.transfer))
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert not old.is_lost
    old.claim(old_key, 10)
    await old.next(frames.Landed)


async def test_a_silent_writer_is_dropped_and_its_good_blocks_stay(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10), timeout_s=3.0)
    silent = await by_hand(pair)
    silent.hello()
    grant = await silent.granted(key, 10)
    silent.start_chunk(grant.transfer, 0, 0, 4)
    for layer in range(4):
        silent.send(grant.transfer, 0, layer, [4, 5, 6, 7])
    silent.say(frames.ChunkDone(grant.transfer, 0, silent.digests([4, 5, 6, 7])))
    await until(lambda: silent.is_lost)
    await until(lambda: pair.ends.received)
    assert (pair.ends.received[0].reason, pair.ends.received[0].good_token // BLOCK_TOKENS) == ("stalled", 4)
    assert differing_blocks(pair.source, [4, 5, 6, 7], pair.target, range(4)) == []


async def test_keepalives_alone_hold_a_grant(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10), timeout_s=3.0)
    slow = await by_hand(pair)
    slow.hello()
    await slow.granted(key, 10)
    while not pair.ends.received:
        slow.say(frames.Keepalive())
        await asyncio.sleep(0.2)
    assert pair.ends.received[0].reason == "timeout"
    assert any(isinstance(frame, frames.Keepalive) for frame in slow.heard)


@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 1, 3)],
        [(1, 0, 3)],
        [(0, 0, 11)],
        [(0, 0, 3), (1, 2, 3)],
        [(0, 0, 3), (1, 4, 3)],
        [(0, 0, 3), (0, 3, 3)],
    ],
    ids=["not first", "not numbered from 0", "too long", "overlap", "gap", "number twice"],
)
async def test_a_chunk_out_of_its_place_drops_the_link(
    make_pair: MakePair, by_hand: ByHand, chunks: list[tuple[int, int, int]]
) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10))
    peer = await by_hand(pair)
    peer.hello()
    grant = await peer.granted(key, 10)
    for number, first_block, blocks in chunks:
        peer.start_chunk(grant.transfer, number, first_block, blocks)
    await until(lambda: peer.is_lost)
    await until(lambda: pair.ends.received)
    assert pair.ends.received[0].reason == "sender_failed"


async def test_done_before_all_blocks_drops_the_link(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10))
    peer = await by_hand(pair)
    peer.hello()
    grant = await peer.granted(key, 10)
    peer.say(frames.Done(grant.transfer))
    await until(lambda: peer.is_lost)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xc1", b"x" * 100, frames.encode(frames.Done(1))[:-1], frames.encode(frames.Done(1)) + b"\x00"],
)
async def test_bytes_that_are_no_frame_drop_the_link(make_pair: MakePair, by_hand: ByHand, payload: bytes) -> None:
    pair = await make_pair()
    peer = await by_hand(pair)
    peer.hello()
    peer.link.send_control(payload)
    await until(lambda: peer.is_lost)


async def test_a_peer_that_says_no_hello_or_speaks_another_protocol_is_dropped(
    make_pair: MakePair, by_hand: ByHand
) -> None:
    pair = await make_pair()
    silent, rude, future = [await by_hand(pair) for _ in range(3)]
    rude.claim(pair.key(), 1)
    future.hello(protocol=HANDOFF_PROTOCOL + 1)
    await until(lambda: rude.is_lost and future.is_lost and silent.is_lost)


async def test_frames_of_a_foreign_transfer_have_no_effect(make_pair: MakePair, by_hand: ByHand) -> None:
    pair = await make_pair()
    key = pair.key()
    pair.expect(key, range(10))
    owner, stranger = await by_hand(pair), await by_hand(pair)
    owner.hello()
    stranger.hello()
    grant = await owner.granted(key, 10)
    stranger.start_chunk(grant.transfer, 0, 0, 10)
    stranger.say(frames.Done(grant.transfer))
    stranger.say(frames.Failed(frames.WireKey.of(key), "mine now"))
    owner.start_chunk(grant.transfer, 0, 0, 10)
    for layer in range(4):
        owner.send(grant.transfer, 0, layer, list(range(10)))
    owner.say(frames.ChunkDone(grant.transfer, 0, owner.digests(list(range(10)))), frames.Done(grant.transfer))
    await until(lambda: pair.ends.received)
    assert pair.ends.received[0].is_landed
    assert not stranger.is_lost


async def test_wrong_calls_of_the_engine_are_value_errors(make_pair: MakePair) -> None:
    pair = await make_pair()
    key = pair.key()
    with pytest.raises(IndexError):
        pair.expect(key, [64])
    with pytest.raises(ValueError, match="twice"):
        pair.expect(key, [1, 1])
    pair.open(key, 4)
    with pytest.raises(ValueError, match="open already"):
        pair.open(key, 4)
    with pytest.raises(IndexError):
        pair.prefill.announce(key, chunk(0, (0, 64)))
    with pytest.raises(ValueError, match="after 0 of 64"):
        pair.prefill.announce(key, chunk(1, (0, 1)))
    with pytest.raises(ValueError, match="after 0 of 64"):
        pair.prefill.announce(key, chunk(0, (0, 1, 2, 3, 4)))
    with pytest.raises(ValueError, match="no announced chunk"):
        pair.prefill.layer_ready(key, 0)
    pair.prefill.layer_ready(pair.key(), 0)
    pair.decode.cancel(b"?" * 16)
