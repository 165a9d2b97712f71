"""Engines of several tensor-parallel ranks: each rank hands its own KV off, and the answers are those of one engine.

Four engines serve all pairs; what they are compared with is the decode engine that computes the prompt itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from relay import Rows, hand_off_spoilt
from tp_rig import RELAY_EPOCH, SAMPLING, Engines, assert_same, one_rank, prompt_of, zeros_into_one_rank
from vllm_rig import BLOCK_TOKENS, DECODE_EPOCH, EnginePair

from hocket.transport.base import Expectation, GroupBlocks, HandoffKey, ReceiveEnd, SendEnd, SendOrder, SendReleased
from hocket.workers.engines.base import HandoffFailed, PrefillTask

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),  # The first test of an engine waits for it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LENGTHS = (5, 31, 32, 33, 64, 65, 100, 200, 517)
PAIRS = ((1, 2), (2, 1), (2, 2))
SOON_S = 20.0  # far below the hand-off's own time


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        yield Engines(tmp_path_factory.mktemp("models"), stack, {})


@pytest_asyncio.fixture(
    scope="module", loop_scope="session", params=PAIRS, ids=lambda ranks: f"{ranks[0]} to {ranks[1]}"
)
async def pair(request: pytest.FixtureRequest, engines: Engines) -> EnginePair:
    return await engines.pair(*request.param)


async def test_the_ranks_are_one_worker_to_others(pair: EnginePair) -> None:
    prefill, decode = pair.prefill_info, pair.decode_info
    assert prefill.fingerprint == decode.fingerprint
    assert not prefill.handoff_addresses
    assert len(set(pair.addresses("tcp"))) == decode.tp_size
    assert prefill.kv_blocks > 0
    assert decode.kv_blocks > 0


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_what_is_made_from_other_ranks_kv_is_what_one_engine_makes(pair: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 1)
    reference = await pair.reference(prompt, SAMPLING)
    outcome, answer = await pair.hand_off(prompt, SAMPLING)
    assert_same(answer, reference)
    assert (outcome.computed_tokens, outcome.cached_tokens) == (tokens, 0)
    assert (answer.computed_tokens, answer.cached_tokens) == (1, 0)
    # Every head once, whichever ranks have it.
    layout = pair.decode_engine.layout
    assert outcome.kv_bytes >= tokens * sum(layer.heads * layer.head_bytes for layer in layout.layers)


async def test_every_rank_reads_its_own_part_of_the_kv(pair: EnginePair) -> None:
    prompt = prompt_of(150, 11)
    reference = await pair.reference(prompt, SAMPLING)
    assert_same(await hand_off_spoilt(pair, prompt, SAMPLING, lambda rows: None), reference)
    for head in range(2):
        await pair.clear()

        def spoil(rows: Rows, head: int = head) -> None:
            for row in rows:
                row.reshape(len(row), 2, -1)[-1, head] = 0  # Of the last block.

        answer = await hand_off_spoilt(pair, prompt, SAMPLING, spoil)
        with pytest.raises(AssertionError):
            assert_same(answer, reference)
    await pair.clear()


async def test_ucx_takes_it_as_well(pair: EnginePair) -> None:
    pytest.importorskip("ucxx")
    prompt = prompt_of(150, 2)
    reference = await pair.reference(prompt, SAMPLING)
    _, answer = await pair.hand_off(prompt, SAMPLING, scheme="ucx")
    assert_same(answer, reference)
    assert answer.computed_tokens == 1


async def test_six_hand_offs_at_once_do_not_mix(pair: EnginePair) -> None:
    prompts = [prompt_of(tokens, 3) for tokens in (5, 33, 64, 100, 200, 300)]
    references = [await pair.reference(prompt, SAMPLING) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pair.hand_off(prompt, SAMPLING)) for prompt in prompts]
    for task, reference in zip(tasks, references, strict=True):
        assert_same(task.result()[1], reference)
        assert task.result()[1].computed_tokens == 1
    await pair.wait_blocks_free()


async def test_only_what_decode_lacks_travels_and_it_is_counted_once(pair: EnginePair) -> None:
    prompt = prompt_of(300, 4)
    reference = await pair.reference(prompt, SAMPLING)
    received = pair.decode_engine.handoff_counts().received.get("landed", 0)
    first, _ = await pair.hand_off(prompt, SAMPLING)
    again, answer = await pair.hand_off(prompt, SAMPLING)
    cached = (300 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert_same(answer, reference)
    assert (again.cached_tokens, answer.cached_tokens, answer.computed_tokens) == (cached, cached, 1)
    assert again.kv_bytes * 5 < first.kv_bytes
    assert pair.decode_engine.handoff_counts().received["landed"] == received + 2


async def test_a_decode_cancelled_in_mid_transfer_gives_the_blocks_of_all_ranks_back(pair: EnginePair) -> None:
    prompt = prompt_of(900, 5)
    reference = await pair.reference(prompt, SAMPLING)
    decode, prefill = await pair.under_way(prompt, 3, SAMPLING)
    decode.cancel()
    with pytest.raises(asyncio.CancelledError):
        await decode
    with pytest.raises(HandoffFailed, match="cancelled|refused"):
        await prefill
    await pair.wait_blocks_free()
    await pair.clear()
    assert_same((await pair.hand_off(prompt, SAMPLING))[1], reference)


async def test_when_a_prefill_is_cancelled_decode_computes_the_rest(pair: EnginePair) -> None:
    prompt = prompt_of(900, 6)
    reference = await pair.reference(prompt, SAMPLING)
    decode, prefill = await pair.under_way(prompt, 3, SAMPLING, timeout_s=8.0)
    prefill.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prefill
    answer = await decode
    assert_same(answer, reference)
    assert answer.computed_tokens is not None
    assert answer.computed_tokens > 1
    await pair.wait_blocks_free()


async def test_kv_that_never_comes_is_computed_here(pair: EnginePair) -> None:
    prompt = prompt_of(200, 7)
    reference = await pair.reference(prompt, SAMPLING)
    answer = await pair.decode(prompt, os.urandom(16), SAMPLING, timeout_s=0.5)
    assert_same(answer, reference)
    assert answer.computed_tokens == 200
    await pair.wait_blocks_free()


async def test_every_link_of_two_ranks_is_measured(pair: EnginePair) -> None:
    decode = pair.decode_info
    probes = await pair.prefill_engine.probe_links(
        pair.addresses("tcp"), decode_epoch=DECODE_EPOCH, decode_ranks=decode.tp_size
    )
    wanted = {(1, 2): [(0, 0), (0, 1)], (2, 1): [(0, 0), (1, 0)], (2, 2): [(0, 0), (1, 1)]}
    assert [(probe.from_rank, probe.to_rank) for probe in probes] == wanted[pair.prefill_info.tp_size, decode.tp_size]


# One rank's part fails: the test's own process is the other side.


@pytest.mark.parametrize("rank", [0, 1])
async def test_when_one_rank_gets_no_kv_the_others_do_not_wait_for_it(engines: Engines, rank: int) -> None:
    pair = await engines.pair(2, 2)
    prompt, key = prompt_of(200, 9), HandoffKey(os.urandom(16), 1, 1)
    reference = await pair.reference(prompt, SAMPLING)
    order = SendOrder(key, pair.addresses("tcp"), DECODE_EPOCH, pair.decode_info.fingerprint, len(prompt), 60.0)
    ended: asyncio.Future[SendEnd] = asyncio.get_running_loop().create_future()

    def on_event(event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            ended.set_result(event)

    async with asyncio.timeout(SOON_S), one_rank(pair.decode_engine.layout, rank) as sender:
        decode = asyncio.create_task(pair.decode(prompt, key.token, SAMPLING, timeout_s=60.0))
        sender.open(order, on_event, decode_ranks=2)
        while pair.decode_engine.load().kv_blocks_free == pair.decode_info.kv_blocks:
            await asyncio.sleep(0.02)
        sender.abort(key, "broken")
        assert not (await ended).is_landed
        answer = await decode
    assert_same(answer, reference)
    assert answer.computed_tokens == 200
    await pair.wait_blocks_free()


@pytest.mark.parametrize("rank", [0, 1])
async def test_what_has_landed_in_one_rank_is_not_used_without_the_others(engines: Engines, rank: int) -> None:
    pair = await engines.pair(2, 2)
    prompt, token = prompt_of(200, 12), os.urandom(16)
    reference = await pair.reference(prompt, SAMPLING)
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
        decode = group.create_task(pair.decode(prompt, token, SAMPLING, timeout_s=2.0))
        assert (await zeros_into_one_rank(pair, rank, token, len(prompt))).is_landed
    assert_same(decode.result(), reference)
    assert decode.result().computed_tokens == 200
    await pair.wait_blocks_free()


@pytest.mark.parametrize("rank", [0, 1])
async def test_when_one_rank_cannot_send_the_others_give_up(engines: Engines, rank: int) -> None:
    prefill, info = await engines.engine("prefill", "llama", 2)
    prompt, key = prompt_of(200, 10), HandoffKey(os.urandom(16), 1, 1)
    blocks = GroupBlocks(0, tuple(range(7)))
    received: asyncio.Future[ReceiveEnd] = asyncio.get_running_loop().create_future()
    async with asyncio.timeout(SOON_S), one_rank(prefill.layout, rank) as receiver:
        receiver.expect(Expectation(key.token, 1, (blocks,), 200, 60.0), received.set_result, prefill_ranks=2)
        nowhere = "tcp://127.0.0.1:1"
        addresses = (receiver.addresses[0], nowhere) if rank == 0 else (nowhere, receiver.addresses[0])
        task = PrefillTask("r", key, prompt, addresses, RELAY_EPOCH, info.fingerprint, 60.0, decode_ranks=2)
        with pytest.raises(HandoffFailed):
            await prefill.prefill(task)
        receiver.cancel(key.token)
        await received
        while prefill.load().kv_blocks_free != info.kv_blocks or prefill.load().running:
            await asyncio.sleep(0.02)
    pair = await engines.pair(2, 2)
    reference = await pair.reference(prompt, SAMPLING)
    assert_same((await pair.hand_off(prompt, SAMPLING))[1], reference)
