"""A link is measured beside hand-offs: plausibly, bounded, and without a trace."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from transport_rig import DECODE_EPOCH, MakePair, Pair, differing_blocks, make_layout, make_transport, until

from hocket.transport import HandoffRefused, Link, LinkLost, frames
from hocket.transport.frames import PROBE_TRANSFER, TRANSFERS_MAX
from hocket.transport.handoff import LinkId, MessageId
from hocket.transport.links.inproc import InprocTransport
from hocket.transport.mover import probe_tag, tag_of
from hocket.transport.probe import ANSWER_S, MESSAGE_BYTES, SIZE_BYTES_MAX

SCHEMES = ["inproc", "tcp", "ucx"]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scratch_of(pair: Pair) -> tuple[object, object]:
    """What is left of a probe on the prefill and on the decode side: (busy, session)."""
    return pair.prefill._probes._prober._is_probing, pair.decode._probes._target._session


async def nothing_left(pair: Pair) -> None:
    await until(lambda: scratch_of(pair) == (False, None), 3 * ANSWER_S)


async def test_a_probe_reports_the_link_that_an_order_would_take(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    first = await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH)
    assert first.peer == pair.decode.addresses[0]
    assert first.transport.partition("(")[0] == scheme
    assert first.kv_memory == "host"
    assert not first.moves_device_memory
    assert first.dial_s is not None
    assert first.dial_s > 0
    assert 0 < first.round_trip_s < 1
    assert [rate.message_bytes for rate in first.rates] == list(MESSAGE_BYTES)
    assert all(rate.bytes_per_s > 0 for rate in first.rates)
    assert sum(MESSAGE_BYTES) <= first.probe_bytes <= 2 * SIZE_BYTES_MAX * len(MESSAGE_BYTES)
    again = await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH)
    assert again.dial_s is None, "the link was there"
    await nothing_left(pair)
    assert not pair.target.buffers([])
    assert not any(view.any() for layer in pair.target._layers for view in layer), "KV blocks were written"
    stats = pair.decode.stats
    assert (stats.kv_bytes_received, stats.received, stats.links_lost) == (0, {}, 0)


async def test_a_hand_off_beside_a_probe_is_exact(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme, layout=make_layout(layers=4, block_bytes=64 << 10), blocks=64)
    probing = asyncio.create_task(pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH))
    await until(lambda: scratch_of(pair)[1] is not None or probing.done())
    from_ids, to_ids = list(range(60)), list(reversed(range(60)))
    rounds = 0
    while rounds < 3 or not probing.done():
        pair.ends.received.clear()
        pair.ends.sent.clear()
        for layer in pair.target._layers:
            layer[:] = 0
        key = pair.key()
        pair.expect(key, to_ids)
        pair.open(key, 60)
        pair.push(key, from_ids)
        await pair.both_ended()
        assert pair.ends.received[0].is_landed
        assert differing_blocks(pair.source, from_ids, pair.target, to_ids) == []
        rounds += 1
    assert len((await probing).rates) == len(MESSAGE_BYTES)
    await nothing_left(pair)


async def test_an_endpoint_measures_one_link_at_a_time(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    probing = asyncio.create_task(pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH))
    await asyncio.sleep(0)
    with pytest.raises(HandoffRefused, match="busy"):
        await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH)
    assert (await probing).rates


async def test_a_decode_worker_that_is_measured_refuses_another_one(make_pair: MakePair) -> None:
    one, other = await make_pair("tcp"), await make_pair("tcp")
    probing = asyncio.create_task(one.prefill.probe(one.decode.addresses, decode_epoch=DECODE_EPOCH))
    await until(lambda: scratch_of(one)[1] is not None or probing.done())
    assert not probing.done()
    with pytest.raises(HandoffRefused, match="busy"):
        await other.prefill.probe(one.decode.addresses, decode_epoch=DECODE_EPOCH)
    assert (await probing).rates
    await nothing_left(one)
    assert (await other.prefill.probe(one.decode.addresses, decode_epoch=DECODE_EPOCH)).rates


async def test_another_incarnation_at_the_address_is_not_measured(make_pair: MakePair) -> None:
    pair = await make_pair("tcp")
    with pytest.raises(HandoffRefused, match="wrong_epoch"):
        await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH + 1)
    await nothing_left(pair)


async def test_nobody_at_the_address_is_link_lost(make_pair: MakePair) -> None:
    pair = await make_pair("tcp")
    with pytest.raises(LinkLost):
        await pair.prefill.probe(("tcp://127.0.0.1:1",), decode_epoch=DECODE_EPOCH)
    assert (await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH)).rates


async def test_a_peer_that_falls_silent_ends_the_probe_and_frees_both_sides(make_pair: MakePair) -> None:
    pair = await make_pair("inproc")
    assert isinstance(pair.decode_transport, InprocTransport)
    probing = asyncio.create_task(pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH))
    await until(lambda: (session := pair.decode._probes._target._session) and session.left)
    pair.decode_transport.faults.stall()
    async with asyncio.timeout(2 * ANSWER_S):
        with pytest.raises(LinkLost, match=r"no answer to a probe within 2 s|lost"):
            await probing
    await nothing_left(pair)
    assert pair.prefill.stats.links == {}


async def test_a_cancelled_probe_frees_both_sides_and_keeps_the_link(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    for wait_turns in range(0, 40, 3):
        probing = asyncio.create_task(pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH))
        await until(lambda: scratch_of(pair)[1] is not None)
        for _ in range(wait_turns):
            await asyncio.sleep(0)
        probing.cancel()
        await asyncio.wait([probing])
        await nothing_left(pair)
    report = await pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH)
    assert report.dial_s is None
    assert pair.decode.stats.links_lost == pair.prefill.stats.links_lost == 0


async def test_closing_either_side_ends_a_probe(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    probing = asyncio.create_task(pair.prefill.probe(pair.decode.addresses, decode_epoch=DECODE_EPOCH))
    await until(lambda: scratch_of(pair)[1] is not None or probing.done())
    await pair.decode.aclose()
    with pytest.raises(LinkLost):
        await probing
    await nothing_left(pair)


class RawPeer:
    """A prefill side that says whatever frames a test wants."""

    def __init__(self, link: Link, pair: Pair) -> None:
        self.link = link
        self.answers: list[frames.Frame] = []
        link.start(lambda payload: self.answers.append(frames.decode(payload)), lambda _: None)
        layout = pair.source.layout
        hello = frames.Hello(layout.protocol, "raw", bytes(16), layout.fingerprint(), 1, layout.shape)
        self.say(hello)

    def say(self, frame: frames.Frame) -> None:
        self.link.send_control(frames.encode(frame))

    async def answer(self, count: int) -> frames.Frame:
        await until(lambda: len(self.answers) >= count)
        return self.answers[count - 1]


@pytest_asyncio.fixture
async def raw(make_pair: MakePair) -> AsyncIterator[tuple[RawPeer, Pair]]:
    pair = await make_pair("tcp")
    transport = make_transport("tcp")
    link = await transport.connect(pair.decode.addresses[0], timeout_s=2.0)
    peer = RawPeer(link, pair)
    await peer.answer(1)  # its hello
    yield peer, pair
    await link.abort()


async def test_a_probe_of_too_many_bytes_is_refused(raw: tuple[RawPeer, Pair]) -> None:
    peer, pair = raw
    for number, (messages, message_bytes) in enumerate([(5, 16 << 20), (1024, 1 << 20), (1, 0), (0, 1)]):
        peer.say(frames.Probe(number, DECODE_EPOCH, messages, message_bytes))
        assert await peer.answer(2 + number) == frames.ProbeRefused(number, "bad_probe")
    assert scratch_of(pair) == (False, None)


async def test_a_second_batch_before_the_first_has_come_is_refused(raw: tuple[RawPeer, Pair]) -> None:
    peer, _ = raw
    peer.say(frames.Probe(1, DECODE_EPOCH, 4, 1 << 16))
    assert await peer.answer(2) == frames.ProbeReady(1)
    peer.say(frames.Probe(2, DECODE_EPOCH, 4, 1 << 16))
    assert await peer.answer(3) == frames.ProbeRefused(2, "busy")


async def test_a_peer_that_never_sends_what_it_announced_is_dropped(raw: tuple[RawPeer, Pair]) -> None:
    peer, pair = raw
    peer.say(frames.Probe(1, DECODE_EPOCH, 4, 1 << 16))
    assert await peer.answer(2) == frames.ProbeReady(1)
    await until(lambda: pair.decode.stats.links == {}, 3 * ANSWER_S)
    await nothing_left(pair)


async def test_a_peer_that_forgets_to_end_its_probe_is_forgotten(raw: tuple[RawPeer, Pair]) -> None:
    peer, pair = raw
    peer.say(frames.Probe(1, DECODE_EPOCH, 0, 0))
    assert await peer.answer(2) == frames.ProbeReady(1)
    assert scratch_of(pair)[1] is not None
    await nothing_left(pair)
    assert len(pair.decode.stats.links) == 1


async def test_short_messages_are_not_called_done(raw: tuple[RawPeer, Pair]) -> None:
    peer, pair = raw
    peer.say(frames.Probe(1, DECODE_EPOCH, 2, 1 << 16))
    await peer.answer(2)
    for number in range(2):
        peer.link.post_send(probe_tag(number), (), lambda _: None)
    peer.say(frames.ProbeEnd())
    await nothing_left(pair)
    assert len(peer.answers) == 2


def test_no_transfer_has_the_tags_of_probes() -> None:
    def tags(transfer: int) -> Iterator[int]:
        for chunk, number in ((0, 0), (4095, 1023)):
            key = None  # A tag does not depend on it.
            yield tag_of(MessageId(key, LinkId(1), transfer, chunk, number))  # type: ignore[arg-type]

    assert max(tags(TRANSFERS_MAX - 1)) < probe_tag(0) < probe_tag(1023) < 1 << frames.TAG_BITS
    assert PROBE_TRANSFER == TRANSFERS_MAX
    with pytest.raises(frames.BadFrame):
        frames.decode(frames.encode(frames.Done(PROBE_TRANSFER)))
