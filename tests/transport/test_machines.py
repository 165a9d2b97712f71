"""What the machines do with time: held claims, their own pauses, spent tokens."""

from __future__ import annotations

import pytest

from hocket.transport import errors, frames
from hocket.transport.base import Chunk, Expectation, GroupBlocks, HandoffKey, ReceiveEnd, SendEnd, SendOrder
from hocket.transport.handoff import (
    HOLD_S,
    LOST_S,
    AbortLink,
    Announce,
    Dial,
    Digested,
    Emit,
    Expect,
    FrameReceived,
    Instruction,
    LayersReady,
    LinkGreeted,
    LinkId,
    LinkLost,
    LinkUp,
    MessageDone,
    OpenOrder,
    PlanSend,
    PostReceive,
    PostSend,
    SendFrame,
    Tick,
)
from hocket.transport.layout import KvLayer, KvLayout, KvShape
from hocket.transport.receiver import HELD_CLAIMS_MAX, SPENT_TOKENS_MAX, Receiver
from hocket.transport.sender import Sender
from hocket.transport.wire import MessageSizes, Wire

LAYOUT = KvLayout("m", "r", "u8", "u8", (KvLayer("0", 1, 8), KvLayer("1", 1, 8)), KvShape((1,)))
FINGERPRINT = LAYOUT.fingerprint()
LINK = LinkId(1)


def make_receiver() -> Receiver:
    receiver = Receiver(LAYOUT, epoch=4)
    for link in (LINK, LinkId(2)):
        receiver.on(LinkGreeted(link, Wire(LAYOUT, LAYOUT.shape, i_send=False)), 0.0)
    return receiver


def claim(number: int = 0, *, delivery: int = 1, link: LinkId = LINK) -> FrameReceived:
    key = HandoffKey(number.to_bytes(16, "little"), 1, delivery)
    return FrameReceived(link, frames.Claim(frames.WireKey.of(key), 2, FINGERPRINT, 4))


def expect(number: int = 0, timeout_s: float = 30.0) -> Expect:
    return Expect(Expectation(number.to_bytes(16, "little"), 1, (GroupBlocks(0, (5, 6)),), 2, timeout_s))


def said(instructions: list[Instruction]) -> list[frames.Frame]:
    return [instruction.frame for instruction in instructions if isinstance(instruction, SendFrame)]


def test_a_claim_before_its_expectation_is_held_and_then_granted() -> None:
    receiver = make_receiver()
    assert receiver.on(claim(), 10.0) == []
    grants = said(receiver.on(expect(), 10.0 + HOLD_S / 2))
    assert [type(frame) for frame in grants] == [frames.Grant]


def test_a_claim_of_an_unknown_token_is_refused_after_a_while() -> None:
    receiver = make_receiver()
    receiver.on(claim(), 10.0)
    assert [type(frame) for frame in said(receiver.on(Tick(), 10.1))] == [frames.Keepalive]
    refusals = said(receiver.on(Tick(), 10.0 + HOLD_S))
    assert [frame.reason for frame in refusals if isinstance(frame, frames.Refuse)] == ["unknown_token"]
    assert receiver.is_idle


def test_only_so_many_claims_are_held() -> None:
    receiver = make_receiver()
    for number in range(HELD_CLAIMS_MAX):
        assert receiver.on(claim(number), 10.0) == []
    (refusal,) = said(receiver.on(claim(HELD_CLAIMS_MAX), 10.0))
    assert isinstance(refusal, frames.Refuse)
    assert refusal.reason == "busy"


def test_the_newest_of_two_held_claims_is_granted() -> None:
    receiver = make_receiver()
    receiver.on(claim(delivery=2), 10.0)
    (refusal,) = said(receiver.on(claim(delivery=1, link=LinkId(2)), 10.0))
    assert isinstance(refusal, frames.Refuse)
    assert refusal.reason == "stale_attempt"
    (grant,) = said(receiver.on(expect(), 10.0))
    assert isinstance(grant, frames.Grant)
    assert grant.key.delivery == 2


def test_a_pause_of_our_own_does_not_count_as_the_peers_silence() -> None:
    receiver = make_receiver()
    receiver.on(expect(), 10.0)
    receiver.on(claim(), 10.0)
    for tick in range(1, 10):
        receiver.on(Tick(), 10.0 + tick / 10)
    assert not [i for i in receiver.on(Tick(), 19.0) if isinstance(i, AbortLink)]
    later = [i for tick in range(25) for i in receiver.on(Tick(), 19.0 + tick / 10) if isinstance(i, AbortLink)]
    assert later == [AbortLink(LINK, "stalled")]


def test_a_message_that_ends_with_its_link_is_lost_and_not_wrong() -> None:
    """Its digest may be here already, where frames and KV go different ways; another writer is waited for all the same."""
    receiver = make_receiver()
    receiver.on(expect(), 10.0)
    (grant,) = said(receiver.on(claim(), 10.0))
    assert isinstance(grant, frames.Grant)
    posted = receiver.on(FrameReceived(LINK, frames.ChunkStart(grant.transfer, 0, 0, 2, 2)), 10.0)
    (message,) = [instruction.message for instruction in posted if isinstance(instruction, PostReceive)]
    receiver.on(FrameReceived(LINK, frames.ChunkDone(grant.transfer, 0, bytes(8))), 10.0)
    assert said(receiver.on(MessageDone(message, errors.LinkLost("lost")), 10.0)) == []
    receiver.on(LinkLost(LINK), 10.0)
    assert receiver.on(Tick(), 10.0 + LOST_S - 0.01) == []
    (end,) = receiver.on(Tick(), 10.0 + LOST_S)
    assert isinstance(end, Emit)
    assert isinstance(end.event, ReceiveEnd)
    assert end.event.reason == "link_lost"


def test_old_spent_tokens_are_forgotten() -> None:
    receiver = make_receiver()
    for number in range(SPENT_TOKENS_MAX + 1):
        receiver.on(expect(number, timeout_s=0.0), 10.0)
        (end,) = [i for i in receiver.on(Tick(), 10.0) if isinstance(i, Emit)]
    assert said(receiver.on(claim(0), 11.0)) == [], "held, like any unknown token"
    (refusal,) = said(receiver.on(claim(1), 11.0))
    assert isinstance(refusal, frames.Refuse)
    assert refusal.reason == "spent_token"


def test_a_decode_worker_that_never_answers_is_given_up_after_every_try() -> None:
    sender = Sender(layers=2)
    key = HandoffKey(b"k" * 16, 1, 1)
    order = SendOrder(key, ("tcp://a:1", "tcp://b:1"), 4, FINGERPRINT, 2, 60.0)
    assert sender.on(OpenOrder(order), 10.0) == [Dial(key, ("tcp://a:1", "tcp://b:1"))]
    wire = Wire(LAYOUT, LAYOUT.shape, i_send=True)
    assert [type(frame) for frame in said(sender.on(LinkUp(key, LINK, wire), 10.0))] == [frames.Claim]
    aborts = [i for tick in range(25) for i in sender.on(Tick(), 10.0 + tick / 10) if isinstance(i, AbortLink)]
    assert aborts == [AbortLink(LINK, "stalled")]


def test_frames_survive_the_wire_and_limits_hold() -> None:
    key = frames.WireKey(b"k" * 16, 1, 2)
    every: list[frames.Frame] = [
        frames.Hello(1, "w", b"n" * 16, FINGERPRINT, 2, KvShape((16, 32), "NHD", 4, 3)),
        frames.Claim(key, 3, FINGERPRINT, 4),
        frames.Grant(key, 5, (6, 0), 7),
        frames.Refuse(key, "busy"),
        frames.Landed(key),
        frames.ChunkStart(1, 2, 3, 4, 5),
        frames.ChunkDone(1, 2, b"d" * 16),
        frames.Done(1),
        frames.Failed(key, "why"),
        frames.CancelTransfer(1, "digest"),
        frames.Drained(1),
        frames.Keepalive(),
    ]
    assert [frames.decode(frames.encode(frame)) for frame in every] == every
    wrong: list[frames.Frame] = [
        frames.Hello(1, "w", b"n" * 16, FINGERPRINT, 2, KvShape((0,))),
        frames.Hello(1, "w", b"n" * 16, FINGERPRINT, 2, KvShape((16,), "NHD", 1 << 20, 3)),
        frames.Grant(key, frames.TRANSFERS_MAX, (6,), 7),
        frames.Grant(key, 1, (), 7),
        frames.Grant(key, 1, (0,) * 100, 7),
        frames.ChunkStart(1, frames.CHUNKS_MAX, 3, 4, 1),
        frames.ChunkStart(1, 0, 3, 4, 0),
        frames.ChunkStart(1, 0, -1, 1, 1),
        frames.ChunkDone(1, 2, b"d" * (8 * frames.LAYERS_MAX + 1)),
        frames.Claim(frames.WireKey(b"short", 1, 2), 3, FINGERPRINT, 4),
        frames.Failed(key, "x" * 1000),
    ]
    for frame in wrong:
        try:
            frames.decode(frames.encode(frame))
        except frames.BadFrame:
            continue
        raise AssertionError(f"accepted {frame}")


def test_no_message_is_larger_than_allowed_when_a_last_block_is_not_full() -> None:
    layout = KvLayout("m", "r", "u8", "u8", (KvLayer("0", 1, 8), KvLayer("1", 1, 8)), KvShape((16,)))
    wire = Wire(
        layout, layout.shape, i_send=True, sizes=MessageSizes(bytes_max=200, computed_bytes=100, bulk_bytes=200)
    )
    sender = Sender(layers=2)
    key = HandoffKey(b"k" * 16, 1, 1)
    sender.on(OpenOrder(SendOrder(key, ("tcp://a:1",), 4, layout.fingerprint(), 17, 60.0)), 10.0)
    sender.on(LinkUp(key, LINK, wire), 10.0)
    sender.on(Announce(key, Chunk(0, 17, (GroupBlocks(0, (3, 4)),))), 10.0)
    grant = frames.Grant(frames.WireKey.of(key), 1, (0,), 17)
    instructions = sender.on(FrameReceived(LINK, grant), 10.0)
    planned = [message for plan in instructions if isinstance(plan, PlanSend) for message in plan.messages]
    assert [nbytes for _, _, nbytes in planned] == [128, 128, 128, 128], "a whole block of each layer, one token or 16"


def test_a_large_chunk_goes_in_so_many_parts_and_a_small_one_in_messages_of_the_least_size() -> None:
    layers = tuple(KvLayer(str(index), 1, 8) for index in range(16))
    layout = KvLayout("m", "r", "u8", "u8", layers, KvShape((1,)))
    for tokens, wanted in ((100, 4), (4, 2), (1, 1), (1000, 8)):  # Of 8 B in each of 16 layers.
        sizes = MessageSizes(bytes_max=16_000, computed_bytes=256, bulk_bytes=256, chunk_parts=4)
        sender = Sender(layers=16)
        key = HandoffKey(bytes(16), 1, 1)
        sender.on(OpenOrder(SendOrder(key, ("inproc://x",), 4, layout.fingerprint(), tokens, 30.0)), 0.0)
        sender.on(LinkUp(key, LINK, Wire(layout, layout.shape, i_send=True, sizes=sizes)), 0.0)
        sender.on(FrameReceived(LINK, frames.Grant(frames.WireKey.of(key), 1, (0,), tokens)), 0.0)
        done = sender.on(Announce(key, Chunk(0, tokens, (GroupBlocks(0, tuple(range(tokens))),))), 0.0)
        planned = [plan.messages for plan in done if isinstance(plan, PlanSend)]
        assert [len(messages) for messages in planned] == [wanted]


def test_layers_of_two_chunks_are_not_ready_at_once() -> None:
    sender = Sender(layers=2)
    key = HandoffKey(bytes(16), 1, 1)
    sender.on(OpenOrder(SendOrder(key, ("inproc://x",), 4, FINGERPRINT, 4, 30.0)), 0.0)
    for first in (0, 2):
        sender.on(Announce(key, Chunk(first, first + 2, (GroupBlocks(first, (first, first + 1)),))), 0.0)
    sender.on(LayersReady(key, frozenset((0,))), 0.0)
    with pytest.raises(ValueError, match="no announced chunk"):
        sender.on(LayersReady(key, frozenset((0, 1))), 0.0)
    with pytest.raises(ValueError, match="no announced chunk"):
        sender.on(LayersReady(key, frozenset((1, 2))), 0.0)
    sender.on(LayersReady(key, frozenset((1,))), 0.0)
    sender.on(LayersReady(key, frozenset((0, 1))), 0.0)
    with pytest.raises(ValueError, match="no announced chunk"):
        sender.on(LayersReady(key, frozenset((0,))), 0.0)


@pytest.mark.parametrize("is_said_first", [True, False])
def test_what_has_landed_counts_as_sent_also_before_the_link_says_so(is_said_first: bool) -> None:
    sender = Sender(layers=2)
    key = HandoffKey(bytes(16), 1, 1)
    sender.on(OpenOrder(SendOrder(key, ("inproc://x",), 4, FINGERPRINT, 2, 30.0)), 0.0)
    sender.on(LinkUp(key, LINK, Wire(LAYOUT, LAYOUT.shape, i_send=True)), 0.0)
    sender.on(Announce(key, Chunk(0, 2, (GroupBlocks(0, (0, 1)),))), 0.0)
    sender.on(FrameReceived(LINK, frames.Grant(frames.WireKey.of(key), 1, (0,), 2)), 0.0)
    (sent,) = [said for said in sender.on(LayersReady(key, frozenset((0, 1))), 0.0) if isinstance(said, PostSend)]
    sender.on(Digested(sent.message, 7), 0.0)
    last = [MessageDone(sent.message), FrameReceived(LINK, frames.Landed(frames.WireKey.of(key)))]
    if not is_said_first:
        last.reverse()
    ends = [said.event for event in last for said in sender.on(event, 0.0) if isinstance(said, Emit)]
    (end,) = [event for event in ends if isinstance(event, SendEnd)]
    assert (end.is_landed, end.kv_bytes) == (True, 2 * 2 * 8)
