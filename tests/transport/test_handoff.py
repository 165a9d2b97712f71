"""Whole hand-offs over each link: every byte is compared."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from transport_rig import (
    BLOCK_TOKENS,
    DECODE_EPOCH,
    Ends,
    MakePair,
    blocks_bytes,
    chunk,
    differing_blocks,
    expectation,
    make_layout,
    make_pool,
    make_transport,
    send_order,
    until,
)

from hocket.transport import EndpointThread, Extent, HandoffEndpoint, HandoffKey, SendEnd, SendReleased

SCHEMES = ["inproc", "tcp", "ucx"]


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_every_byte_of_scattered_blocks_arrives(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    rng = np.random.default_rng(3)
    from_ids, to_ids = rng.permutation(64)[:40].tolist(), rng.permutation(64)[:40].tolist()
    key = pair.key()
    pair.expect(key, to_ids)
    pair.open(key, 40)
    pair.push(key, from_ids)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert pair.ends.received[0].good_token // BLOCK_TOKENS == 40
    assert pair.ends.sent == [SendReleased(key), SendEnd(key, True, blocks_bytes(pair.source, 40))]
    assert differing_blocks(pair.source, from_ids, pair.target, to_ids) == []
    untouched = sorted(set(range(64)) - set(to_ids))
    for layer in range(4):
        rest = pair.target.buffers([Extent(layer, tuple(untouched))])
        assert not any(view.any() for view in rest), "a foreign block was written"


async def test_large_blocks_are_digested_on_a_thread(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme, layout=make_layout(layers=2, block_bytes=256 << 10), blocks=24)
    key = pair.key()
    pair.expect(key, range(20))
    pair.open(key, 20)
    pair.push(key, list(reversed(range(20))))
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert differing_blocks(pair.source, list(reversed(range(20))), pair.target, list(range(20))) == []


async def test_chunks_layers_and_announcements_may_come_before_the_grant(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.open(key, 10)
    pair.push(key, [1, 2, 3], first_block=0)
    pair.push(key, [9], first_block=3)
    await asyncio.sleep(0)
    pair.expect(key, range(20, 30))
    pair.prefill.announce(key, chunk(4, (4, 5, 6, 7, 8, 10)))
    for layer in (3, 1, 0, 2):
        await asyncio.sleep(0)
        pair.prefill.layer_ready(key, layer)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    source_ids = [1, 2, 3, 9, 4, 5, 6, 7, 8, 10]
    assert differing_blocks(pair.source, source_ids, pair.target, list(range(20, 30))) == []


async def test_a_prefix_that_decode_has_is_not_sent(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.expect(key, [30, 31], first_block=5)
    pair.open(key, 8)
    pair.push(key, [0, 1, 2], first_block=0)
    pair.push(key, [3, 4, 5, 6, 7], first_block=3)
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert pair.ends.send_end == SendEnd(key, True, blocks_bytes(pair.source, 2))
    assert differing_blocks(pair.source, [5, 6], pair.target, [30, 31]) == []


async def test_a_prompt_that_decode_has_already_lands_without_a_byte(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.expect(key, [], first_block=3)
    pair.open(key, 3)
    pair.push(key, [0, 1, 2])
    await pair.both_ended()
    assert pair.ends.received[0].is_landed
    assert pair.ends.send_end == SendEnd(key, True, 0)


async def test_of_a_prompt_that_decode_has_already_nothing_need_be_computed(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    early, late = pair.key(), pair.key()
    pair.open(early, 3)
    await until(lambda: bool(pair.prefill.stats.links))
    pair.expect(early, [], first_block=3)
    pair.expect(late, [], first_block=3)
    assert [end.is_landed for end in pair.ends.received] == [True, True]
    pair.open(late, 3)
    await until(lambda: len(pair.ends.sent) == 4)
    assert {event for event in pair.ends.sent if isinstance(event, SendEnd)} == {
        SendEnd(early, True, 0),
        SendEnd(late, True, 0),
    }


async def test_many_hand_offs_share_one_link(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme, blocks=128)
    keys = [pair.key() for _ in range(16)]
    for index, key in enumerate(keys):
        pair.expect(key, range(8 * index, 8 * index + 8))
        pair.open(key, 8)
    for index, key in reversed(list(enumerate(keys))):
        pair.push(key, range(8 * (15 - index), 8 * (15 - index) + 8))
    await until(lambda: len(pair.ends.received) == 16 and len(pair.ends.sent) == 32)
    assert all(end.is_landed for end in pair.ends.received)
    from_ids = [block for index in range(16) for block in range(8 * (15 - index), 8 * (15 - index) + 8)]
    assert differing_blocks(pair.source, from_ids, pair.target, list(range(128))) == []
    assert len(pair.decode.stats.links) == 1
    assert pair.decode.stats.received["landed"] == 16
    assert pair.decode.stats.kv_bytes_received == pair.prefill.stats.kv_bytes_sent == blocks_bytes(pair.source, 128)


async def test_abort_before_the_last_chunk_frees_both_sides_and_keeps_the_link(
    make_pair: MakePair, scheme: str
) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.expect(key, range(10))
    pair.open(key, 10)
    pair.push(key, [0, 1, 2, 3])
    pair.prefill.announce(key, chunk(4, (4, 5, 6, 7, 8, 9)))
    pair.prefill.layer_ready(key, 2)
    await until(lambda: pair.prefill.stats.kv_bytes_sent >= blocks_bytes(pair.source, 4))
    pair.prefill.abort(key, "aborted")
    await pair.both_ended()
    assert pair.ends.send_end is not None
    assert (pair.ends.send_end.is_landed, pair.ends.send_end.reason) == (False, "aborted")
    end = pair.ends.received[0]
    assert (end.is_landed, end.reason, end.good_token // BLOCK_TOKENS) == (False, "sender_failed", 4)
    assert differing_blocks(pair.source, range(4), pair.target, range(4)) == []
    assert pair.decode.stats.links_lost == 0


async def test_cancel_stops_the_sender_and_keeps_the_link(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.expect(key, range(10))
    pair.open(key, 10)
    pair.push(key, [0, 1, 2, 3])
    pair.prefill.announce(key, chunk(4, (4, 5, 6, 7, 8, 9)))
    await until(lambda: pair.decode.stats.kv_bytes_received)
    pair.decode.cancel(key.token)
    await pair.both_ended()
    assert pair.ends.received[0].reason == "cancelled"
    assert pair.ends.send_end is not None
    assert pair.ends.send_end.reason == "cancelled"
    assert pair.decode.stats.links_lost == 0
    pair.prefill.layer_ready(key, 0)  # The engine may not know yet.
    other = pair.key()
    pair.expect(other, range(10, 12))
    pair.open(other, 2)
    pair.push(other, [1, 2])
    await until(lambda: len(pair.ends.received) == 2)
    assert pair.ends.received[1].is_landed


async def test_closing_an_endpoint_ends_everything_on_both_sides(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    waiting, running = pair.key(), pair.key()
    pair.expect(waiting, range(10, 20))
    pair.expect(running, range(10))
    pair.open(running, 10)
    pair.push(running, [0, 1, 2, 3])
    await until(lambda: pair.decode.stats.kv_bytes_received)
    async with asyncio.timeout(5.0):
        await pair.decode.aclose()
    assert sorted(end.reason for end in pair.ends.received) == ["closing", "closing"]
    await until(lambda: pair.ends.send_end, timeout_s=10.0)
    assert pair.ends.send_end is not None
    assert not pair.ends.send_end.is_landed


async def test_the_next_address_is_tried_when_the_first_does_not_answer(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    pair.expect(key, range(2))
    addresses = ("pigeon://10.0.0.1:1", f"{scheme}://127.0.0.1:1", *pair.decode.addresses)
    order = send_order(key, addresses, pair.source.layout.fingerprint(), 2, epoch=DECODE_EPOCH, timeout_s=10.0)
    pair.prefill.open(order, pair.ends.sent.append)
    pair.push(key, [4, 5])
    await pair.both_ended()
    assert pair.ends.received[0].is_landed


async def test_an_order_to_nobody_ends_as_link_lost(make_pair: MakePair, scheme: str) -> None:
    pair = await make_pair(scheme)
    key = pair.key()
    order = send_order(
        key, (f"{scheme}://127.0.0.1:1",), pair.source.layout.fingerprint(), 2, epoch=DECODE_EPOCH, timeout_s=10.0
    )
    pair.prefill.open(order, pair.ends.sent.append)
    pair.push(key, [4, 5])
    await until(lambda: pair.ends.send_end)
    assert pair.ends.sent == [SendReleased(key), SendEnd(key, False, 0, "link_lost")]


@pytest.mark.parametrize("scheme", ["tcp", "ucx"])
def test_two_endpoints_on_threads_of_their_own(scheme: str) -> None:
    layout = make_layout()
    source, target = make_pool(layout, 16, seed=1), make_pool(layout, 16)
    ends, both = Ends(), threading.Semaphore(0)

    def decode() -> HandoffEndpoint:
        return HandoffEndpoint(target, [make_transport(scheme)], worker_name="d", epoch=DECODE_EPOCH)

    def prefill() -> HandoffEndpoint:
        return HandoffEndpoint(source, [make_transport(scheme)], worker_name="p", epoch=1, listens=False)

    receiver, sender = EndpointThread(decode), EndpointThread(prefill)
    addresses = receiver.start()
    assert sender.start() == ()
    key = HandoffKey(b"t" * 16, 1, 1)
    expected = expectation(key.token, 1, 0, tuple(range(16)), 10.0)
    receiver.call(receiver.endpoint.expect, expected, lambda end: (ends.received.append(end), both.release()))
    order = send_order(key, addresses, layout.fingerprint(), 16, epoch=DECODE_EPOCH, timeout_s=10.0)
    sender.call(sender.endpoint.open, order, lambda event: (ends.sent.append(event), both.release()))
    sender.call(sender.endpoint.announce, key, chunk(0, tuple(range(16))))
    for layer in range(4):
        sender.call(sender.endpoint.layer_ready, key, layer)
    for _ in range(3):
        assert both.acquire(timeout=10.0)
    sender.stop()
    receiver.stop()
    receiver.stop()
    assert ends.received[0].is_landed
    assert differing_blocks(source, range(16), target, range(16)) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


def test_a_thread_whose_endpoint_cannot_start_says_why() -> None:
    def broken() -> HandoffEndpoint:
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        EndpointThread(broken).start()
