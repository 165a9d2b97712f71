"""Whole hand-offs out of a lent ring: exact, or found out; every slot comes back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from shm_ring import ShmKvPool, make_shm_pool
from transport_rig import (
    BLOCK_TOKENS,
    DECODE_EPOCH,
    LAYERS,
    chunk,
    expectation,
    make_layout,
    send_order,
    until,
    until_granted,
)

from hocket.transport import Chunk, GroupBlocks, HandoffEndpoint, HandoffKey, ReceiveEnd, SendEnd, SendReleased
from hocket.transport.base import HostBuffer
from hocket.transport.links.cuda_ipc import CudaIpcTransport

BLOCKS = 24
STAGING_BYTES = 16 << 20


@dataclass
class Side:
    pool: ShmKvPool
    endpoint: HandoffEndpoint
    received: list[ReceiveEnd] = field(default_factory=list)
    sent: list[SendReleased | SendEnd] = field(default_factory=list)

    @property
    def has_all_slots(self) -> bool:
        return self.pool.free_bytes == STAGING_BYTES


@pytest_asyncio.fixture
async def sides() -> AsyncIterator[tuple[Side, Side]]:
    made = []
    for seed, name in ((5, "prefill"), (None, "decode")):
        pool = make_shm_pool(make_layout(), BLOCKS, seed, staging_bytes=STAGING_BYTES)
        endpoint = HandoffEndpoint(
            pool, [CudaIpcTransport()], worker_name=name, epoch=DECODE_EPOCH, listens=name == "decode"
        )
        await endpoint.start()
        made.append(Side(pool, endpoint))
    yield made[0], made[1]
    for side in made:
        side.pool.finish()
        side.pool.is_slow = False
        async with asyncio.timeout(10.0):
            await side.endpoint.aclose()


FROM, TO = tuple(range(8)), (9, 3, 20, 1, 14, 8, 17, 5)


def begin(prefill: Side, decode: Side, *, timeout_s: float = 10.0) -> HandoffKey:
    key = HandoffKey(os.urandom(16), 1, 1)
    decode.endpoint.expect(expectation(key.token, 1, 0, TO, timeout_s), decode.received.append)
    fingerprint = prefill.pool.layout.fingerprint()
    order = send_order(key, decode.endpoint.addresses, fingerprint, len(FROM), epoch=DECODE_EPOCH)
    prefill.endpoint.open(order, prefill.sent.append)
    prefill.endpoint.announce(key, chunk(0, FROM))
    return key


async def ended(prefill: Side, decode: Side) -> tuple[ReceiveEnd, SendEnd]:
    await until(lambda: decode.received and isinstance(prefill.sent[-1:][0] if prefill.sent else None, SendEnd))
    await until(lambda: prefill.has_all_slots)
    end = prefill.sent[-1]
    assert isinstance(end, SendEnd)
    return decode.received[0], end


def is_exact(prefill: Side, decode: Side) -> bool:
    pairs = zip(prefill.pool.arrays, decode.pool.arrays, strict=True)
    return all((source[list(FROM)] == target[list(TO)]).all() for source, target in pairs)


@pytest.mark.parametrize("one_by_one", [True, False])
async def test_a_hand_off_is_exact_and_gives_every_slot_back(sides: tuple[Side, Side], one_by_one: bool) -> None:
    prefill, decode = sides
    key = begin(prefill, decode)
    if one_by_one:
        for layer in range(LAYERS):
            prefill.endpoint.layer_ready(key, layer)
    else:
        prefill.endpoint.layers_ready(key, range(LAYERS))
    received, sent = await ended(prefill, decode)
    assert received.is_landed
    assert sent.is_landed
    assert is_exact(prefill, decode)
    assert sent.kv_bytes == received.kv_bytes == len(FROM) * LAYERS * prefill.pool.layout.block_bytes(0)
    assert decode.endpoint.stats.links == {"cuda_ipc://dialler": "cuda_ipc(shared memory)"}
    assert decode.has_all_slots, "a receiver of lent slots needs none"


async def test_what_was_gathered_ahead_is_lent_too(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    key = begin(prefill, decode)
    await until_granted(prefill.endpoint, key)
    for layer in range(LAYERS):
        prefill.endpoint.gather_ahead([key], range(layer + 1), None)
        prefill.endpoint.layer_ready(key, layer)
    received, _ = await ended(prefill, decode)
    assert received.is_landed
    assert is_exact(prefill, decode)


async def test_a_message_is_gathered_when_all_of_its_layers_are_computed(sides: tuple[Side, Side]) -> None:
    """Not with the last one of the layout: models of several KV groups compute their layers in another order."""
    prefill, decode = sides
    right = [array.copy() for array in prefill.pool.arrays]
    for array in prefill.pool.arrays:
        array[:] = 0
    key = begin(prefill, decode)
    await until(lambda: prefill.endpoint.stats.sending and decode.endpoint.stats.links)
    await asyncio.sleep(0.05)  # The grant comes; without it nothing is gathered ahead.
    computed: list[int] = []
    for layer in reversed(range(LAYERS)):
        prefill.pool.arrays[layer][:] = right[layer]
        computed.append(layer)
        prefill.endpoint.gather_ahead([key], computed, None)
        prefill.endpoint.layer_ready(key, layer)
    received, _ = await ended(prefill, decode)
    assert received.is_landed
    assert is_exact(prefill, decode)


@pytest.mark.parametrize("times", [1, 5])
async def test_a_slot_that_changes_under_its_reader_is_found_out(sides: tuple[Side, Side], times: int) -> None:
    """As when a sender takes it back too early: sent again, or in the end not landed."""
    prefill, decode = sides
    left = [times]

    def spoil(view: HostBuffer) -> None:
        if left[0]:
            left[0] -= 1
            view[4097] ^= 1

    prefill.pool.on_gathered = spoil
    key = begin(prefill, decode, timeout_s=4.0)
    prefill.endpoint.layers_ready(key, range(LAYERS))
    received, _ = await ended(prefill, decode)
    assert received.is_landed == (times == 1)
    if received.is_landed:
        assert is_exact(prefill, decode)
    else:
        assert received.good_token == 0


@pytest.mark.parametrize("who", ["prefill", "decode"])
async def test_an_abort_while_the_gather_runs_ends_both_sides(sides: tuple[Side, Side], who: str) -> None:
    prefill, decode = sides
    prefill.pool.is_slow = True
    key = begin(prefill, decode)
    prefill.endpoint.layers_ready(key, range(LAYERS))
    await until(lambda: prefill.pool.gathering)
    if who == "prefill":
        prefill.endpoint.abort(key, "preempted")
    else:
        decode.endpoint.cancel(key.token)
    await asyncio.sleep(0.05)
    assert not prefill.sent, "the source blocks were released under a kernel"
    prefill.pool.is_slow = False
    prefill.pool.finish()
    await until(lambda: any(isinstance(event, SendEnd) for event in prefill.sent) and prefill.has_all_slots)
    if who == "decode":
        await until(lambda: decode.received)
        assert decode.received[0].reason == "cancelled"
    later = begin(prefill, decode)
    decode.received.clear()
    prefill.endpoint.layers_ready(later, range(LAYERS))
    await until(lambda: any(end.token == later.token and end.is_landed for end in decode.received))
    assert is_exact(prefill, decode)


async def test_blocks_stay_quarantined_until_our_own_kernel_has_ended(sides: tuple[Side, Side]) -> None:
    prefill, decode = sides
    decode.pool.is_slow = True
    key = begin(prefill, decode)
    prefill.endpoint.layers_ready(key, range(LAYERS))
    await until(lambda: decode.pool.scattering)
    decode.endpoint.cancel(key.token)
    await asyncio.sleep(1.0)  # Longer than a writer is given to stop: the link is aborted.
    assert not decode.received
    decode.pool.is_slow = False
    decode.pool.finish()
    await until(lambda: decode.received)
    assert decode.received[0].reason == "cancelled"


async def test_tokens_are_cut_out_of_other_blocks(sides: tuple[Side, Side]) -> None:
    """Blocks of another size on the prefill side, by way of the ring."""
    _, decode = sides
    layout = make_layout(block_bytes=2 * 4096, block_tokens=2 * BLOCK_TOKENS)
    pool = make_shm_pool(layout, BLOCKS, 11, staging_bytes=STAGING_BYTES)
    assert layout.layers == decode.pool.layout.layers
    endpoint = HandoffEndpoint(pool, [CudaIpcTransport()], worker_name="other", epoch=1, listens=False)
    await endpoint.start()
    key = HandoffKey(os.urandom(16), 1, 1)
    decode.endpoint.expect(expectation(key.token, 1, 0, TO, 5.0), decode.received.append)
    order = send_order(key, decode.endpoint.addresses, pool.layout.fingerprint(), len(TO), epoch=DECODE_EPOCH)
    events: list[SendReleased | SendEnd] = []
    endpoint.open(order, events.append)
    endpoint.announce(key, Chunk(0, len(TO) * BLOCK_TOKENS, (GroupBlocks(0, tuple(range(len(TO) // 2))),)))
    endpoint.layers_ready(key, range(LAYERS))
    await until(lambda: decode.received)
    assert decode.received[0].is_landed
    for source, target in zip(pool.arrays, decode.pool.arrays, strict=True):
        heads = decode.pool.layout.layers[0].heads
        whole = source[: len(TO) // 2].reshape(len(TO) // 2, heads, 2 * BLOCK_TOKENS, -1)
        halves = target[list(TO)].reshape(len(TO), heads, BLOCK_TOKENS, -1)
        for index, block in enumerate(whole):
            assert (block[:, :BLOCK_TOKENS] == halves[2 * index]).all()
            assert (block[:, BLOCK_TOKENS:] == halves[2 * index + 1]).all()
    await endpoint.aclose()
