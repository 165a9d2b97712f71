"""Staged messages: little room shared by many, given back whatever happens, gathered ahead of time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest
import pytest_asyncio
from transport_rig import DECODE_EPOCH, Ends, make_transport, until, until_granted

from hocket.transport import (
    Chunk,
    Expectation,
    Extent,
    GroupBlocks,
    HandoffEndpoint,
    HandoffKey,
    HostKvPool,
    KvLayer,
    KvLayout,
    KvShape,
    SendOrder,
    Transport,
)
from hocket.transport.movers import CUT_BYTES

LAYERS, HEADS, HEAD_BYTES = 3, 2, 1024
TOKENS = 1024  # of a prompt: two messages a layer


def pool_of(block_tokens: int, blocks: int, seed: int | None) -> HostKvPool:
    layers = tuple(KvLayer(str(index), HEADS, HEAD_BYTES) for index in range(LAYERS))
    layout = KvLayout("m", "r", "u8", "u8", layers, KvShape((block_tokens,)))
    rng = np.random.default_rng(seed)
    shape = (blocks, layout.block_bytes(0))
    return HostKvPool(
        layout,
        [np.zeros(shape, np.uint8) if seed is None else rng.integers(0, 256, shape, np.uint8) for _ in range(LAYERS)],
    )


def tokens_of(pool: HostKvPool, layer: int, block_ids: range) -> np.ndarray:
    """(tokens, heads, bytes), by the definition of HND."""
    size = pool.layout.block_tokens(layer)
    blocks = [pool.buffers([Extent(layer, (block,))])[0].reshape(HEADS, size, HEAD_BYTES) for block in block_ids]
    return np.concatenate([block.swapaxes(0, 1) for block in blocks])


class Side:
    """An endpoint, its pool and what it reported."""

    def __init__(self, block_tokens: int, prompts: int, *, seed: int | None, staging_bytes: int, scheme: str) -> None:
        self.block_tokens = block_tokens
        self.pool = pool_of(block_tokens, prompts * TOKENS // block_tokens, seed)
        self.transport: Transport = make_transport(scheme)
        is_decode = seed is None
        self.endpoint = HandoffEndpoint(
            self.pool,
            [self.transport],
            worker_name="decode" if is_decode else "prefill",
            epoch=DECODE_EPOCH,
            listens=is_decode,
            staging_bytes=staging_bytes,
        )
        self.ends = Ends()

    def blocks(self, prompt: int) -> range:
        count = TOKENS // self.block_tokens
        return range(prompt * count, (prompt + 1) * count)

    def expect(self, key: HandoffKey, prompt: int, tokens: int = TOKENS) -> None:
        groups = (self._group(prompt, tokens),)
        self.endpoint.expect(Expectation(key.token, 1, groups, tokens, 10.0), self.ends.received.append)

    def open(self, key: HandoffKey, prompt: int, addresses: tuple[str, ...], tokens: int = TOKENS) -> None:
        order = SendOrder(key, addresses, DECODE_EPOCH, self.pool.layout.fingerprint(), tokens, 10.0)
        self.endpoint.open(order, self.ends.sent.append)
        self.endpoint.announce(key, Chunk(0, tokens, (self._group(prompt, tokens),)))

    def _group(self, prompt: int, tokens: int) -> GroupBlocks:
        return GroupBlocks(0, tuple(self.blocks(prompt))[: tokens // self.block_tokens])

    def compute(self, key: HandoffKey) -> None:
        for layer in range(LAYERS):
            self.endpoint.layer_ready(key, layer)


MakeSide = Callable[..., Awaitable[Side]]


@pytest_asyncio.fixture
async def make_side() -> AsyncIterator[MakeSide]:
    sides: list[Side] = []

    async def make(
        block_tokens: int, prompts: int, *, seed: int | None = None, staging: int = 2, scheme: str = "inproc"
    ) -> Side:
        side = Side(block_tokens, prompts, seed=seed, staging_bytes=staging * CUT_BYTES, scheme=scheme)
        sides.append(side)
        await side.endpoint.start()
        return side

    yield make
    for side in reversed(sides):
        async with asyncio.timeout(10.0):
            await side.endpoint.aclose()


def key_of(number: int) -> HandoffKey:
    return HandoffKey(number.to_bytes(16, "little"), 1, 1)


def assert_equal(source: Side, target: Side, prompt: int, to_prompt: int) -> None:
    for layer in range(LAYERS):
        sent = tokens_of(source.pool, layer, source.blocks(prompt))
        assert np.array_equal(sent, tokens_of(target.pool, layer, target.blocks(to_prompt)))


@pytest.mark.parametrize("scheme", ["inproc", "tcp", "ucx"])
async def test_many_hand_offs_through_room_for_two_messages(make_side: MakeSide, scheme: str) -> None:
    decode = await make_side(32, 8, scheme=scheme)
    sources = [await make_side(16, 4, seed=seed, scheme=scheme) for seed in (1, 2)]
    for number in range(8):
        decode.expect(key_of(number), number)
        sources[number % 2].open(key_of(number), number // 2, decode.endpoint.addresses)
    for number in range(8):
        sources[number % 2].compute(key_of(number))
    await until(lambda: len(decode.ends.received) == 8)
    assert all(end.is_landed for end in decode.ends.received)
    for number in range(8):
        assert_equal(sources[number % 2], decode, number // 2, number)


async def test_a_decode_worker_that_hangs_leaves_room_for_the_others(make_side: MakeSide) -> None:
    prefill = await make_side(16, 3, seed=1, staging=4)
    hanging, good = await make_side(32, 1, staging=4), await make_side(32, 2, staging=4)
    hanging.expect(key_of(0), 0)
    prefill.open(key_of(0), 0, hanging.endpoint.addresses)
    await until_granted(prefill.endpoint, key_of(0))
    hanging.transport.faults.stall()  # type: ignore[attr-defined]  # inproc's
    prefill.compute(key_of(0))
    for number in (1, 2):
        good.expect(key_of(number), number - 1)
        prefill.open(key_of(number), number, good.endpoint.addresses)
        prefill.compute(key_of(number))
    await until(lambda: len(good.ends.received) == 2)
    assert all(end.is_landed for end in good.ends.received)
    assert not hanging.ends.received, "it still hangs"
    for number in (1, 2):
        assert_equal(prefill, good, number, number - 1)


async def test_room_comes_back_from_hand_offs_that_were_given_up(make_side: MakeSide) -> None:
    decode, prefill = await make_side(32, 6), await make_side(16, 6, seed=1)
    for number in range(5):
        decode.expect(key_of(number), number)
        prefill.open(key_of(number), number, decode.endpoint.addresses)
    await until(lambda: prefill.endpoint.stats.links)
    for number in range(5):
        prefill.compute(key_of(number))
    decode.endpoint.cancel(key_of(0).token)
    prefill.endpoint.abort(key_of(1), "aborted")
    prefill.transport.faults.corrupt_messages = 1  # type: ignore[attr-defined]  # inproc's
    await until(lambda: len(decode.ends.received) >= 2)
    decode.transport.faults.cut()  # type: ignore[attr-defined]  # inproc's
    await until(lambda: len(decode.ends.received) == 5 and len(prefill.ends.sent) == 10)
    decode.expect(key_of(9), 5)
    prefill.open(key_of(9), 5, decode.endpoint.addresses)
    prefill.compute(key_of(9))
    await until(lambda: len(decode.ends.received) == 6)
    assert decode.ends.received[-1].is_landed, "all of the room is needed for this one"
    assert_equal(prefill, decode, 5, 5)
    for end in decode.ends.received[:-1]:
        if end.is_landed:
            prompt = int.from_bytes(end.token, "little")
            assert_equal(prefill, decode, prompt, prompt)


async def test_what_was_gathered_ahead_is_sent_as_it_was_then(make_side: MakeSide) -> None:
    decode, prefill = await make_side(32, 2, staging=16), await make_side(16, 2, seed=1, staging=16)
    key = key_of(0)
    decode.expect(key, 0)
    prefill.open(key, 0, decode.endpoint.addresses)
    await until_granted(prefill.endpoint, key)
    prefill.endpoint.gather_ahead([key], [0], None)
    right = tokens_of(prefill.pool, 0, prefill.blocks(0)).copy()
    for block in prefill.blocks(0):
        prefill.pool.buffers([Extent(0, (block,))])[0][:] = 0
    prefill.compute(key)
    await until(lambda: decode.ends.received)
    assert decode.ends.received[0].is_landed
    assert np.array_equal(tokens_of(decode.pool, 0, decode.blocks(0)), right)


async def test_a_message_is_gathered_ahead_when_all_of_its_layers_are_computed(make_side: MakeSide) -> None:
    """Not with the last one of the layout: models of several KV groups compute their layers in another order."""
    tokens = 128  # all layers in one message
    decode, prefill = await make_side(32, 1, staging=16), await make_side(16, 1, seed=1, staging=16)
    memory = [prefill.pool.buffers([Extent(layer, tuple(prefill.blocks(0)))])[0] for layer in range(LAYERS)]
    right = [part.copy() for part in memory]
    for part in memory:
        part[:] = 0
    key = key_of(0)
    decode.expect(key, 0, tokens)
    prefill.open(key, 0, decode.endpoint.addresses, tokens)
    await until(lambda: prefill.endpoint.stats.links)
    await asyncio.sleep(0.05)  # The grant comes; without it nothing is gathered ahead.
    computed: list[int] = []
    for layer in reversed(range(LAYERS)):
        memory[layer][:] = right[layer]
        computed.append(layer)
        prefill.endpoint.gather_ahead([key], computed, None)
        prefill.endpoint.layer_ready(key, layer)
    await until(lambda: decode.ends.received)
    assert decode.ends.received[0].is_landed
    for layer in range(LAYERS):
        sent, found = (tokens_of(side.pool, layer, side.blocks(0))[:tokens] for side in (prefill, decode))
        assert np.array_equal(sent, found)


async def test_room_gathered_ahead_for_an_order_that_ends_comes_back(make_side: MakeSide) -> None:
    decode, prefill = await make_side(32, 2, staging=6), await make_side(16, 2, seed=1, staging=6)
    for number in range(3):
        key = key_of(number)
        decode.expect(key, 0)
        prefill.open(key, 0, decode.endpoint.addresses)
        await until_granted(prefill.endpoint, key)
        for layer in range(LAYERS):
            prefill.endpoint.gather_ahead([key], range(layer + 1), None)
        prefill.endpoint.abort(key, "aborted")
        decode.endpoint.cancel(key.token)
        await until(lambda number=number: len(decode.ends.received) == number + 1)
    decode.expect(key_of(9), 1)
    prefill.open(key_of(9), 1, decode.endpoint.addresses)
    prefill.compute(key_of(9))
    await until(lambda: len(decode.ends.received) == 4)
    assert decode.ends.received[-1].is_landed
    assert_equal(prefill, decode, 1, 1)


async def test_too_little_staging_memory_is_refused_at_the_start(make_side: MakeSide) -> None:
    with pytest.raises(ValueError, match="two messages"):
        await make_side(16, 1, staging=1)
