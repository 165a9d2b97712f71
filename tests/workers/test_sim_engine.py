"""The simulator as an engine: right answers, however the KV came, and nothing left behind."""

from __future__ import annotations

import asyncio

import pytest
from workers_rig import PairMaker, prompt_of, right_answer

from hocket.bus.messages import FINISH_LENGTH, FINISH_STOP, BlockStored, KvEvent, SamplingParams
from hocket.transport import Extent
from hocket.workers.engines.base import BadTask, EngineDead, HandoffFailed, StepOutput

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
TOKEN = b"t" * 16


async def test_a_prompt_computed_by_the_decode_engine_gives_the_expected_tokens(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(50, 1)
    assert await pair.answer(prompt, GREEDY) == right_answer(prompt, GREEDY)
    first = pair.outputs[b"local".hex()][0]
    assert (first.computed_tokens, first.cached_tokens) == (50, 0)
    assert pair.outputs[b"local".hex()][-1].finish == FINISH_LENGTH


async def test_who_waits_for_a_step_finds_what_was_computed_meanwhile(sim_pair: PairMaker):
    pair = await sim_pair(chunk_tokens=64)
    prompt = prompt_of(96, 1)
    cached: list[list[int | None]] = [[], []]
    async with asyncio.TaskGroup() as tasks:
        for seen in cached:
            tasks.create_task(
                pair.answer(prompt, GREEDY, on_step=lambda step, seen=seen: seen.append(step.cached_tokens))
            )
    assert [seen[0] for seen in cached] == [
        0,
        64,
    ]  # After the first step there are 32 tokens left for the second prompt.


async def test_kv_that_came_over_the_link_gives_the_expected_tokens(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(200, 1)
    assert await pair.hand_over(prompt, GREEDY, TOKEN) == right_answer(prompt, GREEDY)
    first = pair.outputs[TOKEN.hex()][0]
    assert (first.computed_tokens, first.cached_tokens) == (1, 0)
    assert pair.decode.endpoint.stats.kv_bytes_received == 25 * 3 * 8 * 8


async def test_a_hundred_hand_offs_at_once_with_shared_prefixes_are_all_right(sim_pair: PairMaker):
    pair = await sim_pair(sim_itl_ms=0.2, sim_prefill_ms_per_token=0.002)
    shared = prompt_of(64, 0)
    prompts = [shared[: 8 * (i % 9)] + prompt_of(1 + i, i) for i in range(100)]
    async with asyncio.TaskGroup() as tasks:
        answers = [
            tasks.create_task(pair.hand_over(prompt, GREEDY, i.to_bytes(16, "big"))) for i, prompt in enumerate(prompts)
        ]
    assert [answer.result() for answer in answers] == [right_answer(prompt, GREEDY) for prompt in prompts]
    assert pair.decode.endpoint.stats.received["landed"] == 100


async def test_only_what_the_decode_engine_misses_is_sent(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(64, 2)
    await pair.hand_over(prompt, GREEDY, b"a" * 16)
    before = pair.decode.endpoint.stats.kv_bytes_received
    longer = prompt + prompt_of(20, 3)
    assert await pair.hand_over(longer, GREEDY, b"b" * 16) == right_answer(longer, GREEDY)
    assert pair.decode.endpoint.stats.kv_bytes_received - before == 3 * 3 * 8 * 8
    assert pair.outputs[(b"b" * 16).hex()][0].cached_tokens == 64


async def test_a_byte_flipped_on_the_way_is_found_and_the_answer_is_right(sim_pair: PairMaker):
    pair = await sim_pair()
    pair.faults.corrupt_messages = 1
    prompt = prompt_of(100, 4)
    assert await pair.hand_over(prompt, GREEDY, TOKEN) == right_answer(prompt, GREEDY)


async def test_a_byte_flipped_after_the_check_changes_the_answer(sim_pair: PairMaker):
    pair = await sim_pair(sim_itl_ms=5)
    prompt = prompt_of(100, 4)
    started = asyncio.Event()
    answer = asyncio.create_task(pair.answer(prompt, GREEDY, on_step=lambda _: started.set()))
    await started.wait()
    for block in range(pair.decode.kv.blocks):
        pair.decode.kv.pools[0].buffers([Extent(1, (block,))])[0][5] ^= 0x10
    assert (await answer)[-1] != right_answer(prompt, GREEDY)[-1]


async def test_a_stale_block_in_the_prefix_cache_changes_the_answer(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(100, 4)
    await pair.answer(prompt, GREEDY)
    for block in range(pair.decode.kv.blocks):
        pair.decode.kv.pools[0].buffers([Extent(0, (block,))])[0][0] ^= 1
    assert await pair.answer(prompt, GREEDY) != right_answer(prompt, GREEDY)


async def test_when_nobody_brings_the_kv_the_decode_engine_computes_it(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(30, 5)
    assert await pair.answer(prompt, GREEDY, token=TOKEN, timeout_s=0.1) == right_answer(prompt, GREEDY)
    assert pair.outputs[TOKEN.hex()][0].computed_tokens == 30


async def test_a_sender_that_dies_half_way_costs_only_the_missing_blocks(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=0.5)
    prompt = prompt_of(400, 6)
    answer = asyncio.create_task(pair.answer(prompt, GREEDY, token=TOKEN, timeout_s=3.0))
    prefill = asyncio.create_task(pair.prefill.prefill(pair.prefill_task(TOKEN, prompt)))
    async with asyncio.timeout(5):
        while pair.decode.endpoint.stats.kv_bytes_received < 3 * 8 * 8 * 16:
            await asyncio.sleep(0.005)
    prefill.cancel()
    await asyncio.wait([prefill])
    assert await answer == right_answer(prompt, GREEDY)
    first = pair.outputs[TOKEN.hex()][0]
    assert first.computed_tokens is not None
    assert 0 < first.computed_tokens < 400


async def test_a_second_prefill_of_the_same_attempt_after_the_first_died_is_right(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=0.2)
    prompt = prompt_of(300, 7)
    answer = asyncio.create_task(pair.answer(prompt, GREEDY, token=TOKEN))
    first = asyncio.create_task(pair.prefill.prefill(pair.prefill_task(TOKEN, prompt)))
    async with asyncio.timeout(5):
        while not pair.decode.endpoint.stats.kv_bytes_received:
            await asyncio.sleep(0.005)
    first.cancel()
    await pair.prefill.prefill(pair.prefill_task(TOKEN, prompt, delivery=2))
    assert await answer == right_answer(prompt, GREEDY)
    assert pair.outputs[TOKEN.hex()][0].computed_tokens == 1


@pytest.mark.parametrize("at", ["waiting", "receiving", "computing", "decoding"])
async def test_a_cancelled_decode_leaves_nothing_behind(sim_pair: PairMaker, at: str):
    pair = await sim_pair(slots=1, sim_itl_ms=2, sim_prefill_ms_per_token=1)
    others = []
    started = asyncio.Event()
    if at == "waiting":
        others.append(asyncio.create_task(pair.answer(prompt_of(5, 1), GREEDY)))
    token = TOKEN if at == "receiving" else None
    task = asyncio.create_task(
        pair.answer(prompt_of(100, 2), GREEDY, token=token, on_step=lambda _: started.set(), timeout_s=5)
    )
    if at == "receiving":
        others.append(asyncio.create_task(pair.prefill.prefill(pair.prefill_task(TOKEN, prompt_of(100, 2)))))
        async with asyncio.timeout(5):
            while not pair.decode.endpoint.stats.kv_bytes_received:
                await asyncio.sleep(0.005)
    elif at == "decoding":
        await started.wait()
    else:
        await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    for other in others:
        await asyncio.wait([other])
        assert isinstance(other.exception(), HandoffFailed | None)
    prompt = prompt_of(40, 3)
    assert await pair.answer(prompt, GREEDY) == right_answer(prompt, GREEDY)
    await pair.settled()


async def test_blocks_of_a_cancelled_hand_off_stay_out_of_use_until_nobody_writes(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=0.5)
    prompt = prompt_of(300, 8)
    task = asyncio.create_task(pair.answer(prompt, GREEDY, token=TOKEN))
    prefill = asyncio.create_task(pair.prefill.prefill(pair.prefill_task(TOKEN, prompt)))
    async with asyncio.timeout(5):
        while not pair.decode.endpoint.stats.kv_bytes_received:
            await asyncio.sleep(0.005)
    pair.faults.stall()
    task.cancel()
    await asyncio.wait([task])
    assert pair.decode.load().running == 0
    assert pair.decode.load().kv_blocks_free == pair.decode.kv.blocks - 38
    pair.faults.resume()
    with pytest.raises(HandoffFailed):
        await prefill
    await pair.settled()


async def test_too_few_blocks_preempt_the_youngest_and_every_answer_is_right(sim_pair: PairMaker):
    pair = await sim_pair(kv_blocks=16, max_model_len=100)
    sampling = SamplingParams(max_tokens=60, temperature=0.0)
    prompts = [prompt_of(20, i) for i in range(6)]
    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(pair.answer(prompt, sampling)) for prompt in prompts]
    assert [answer.result() for answer in answers] == [right_answer(prompt, sampling) for prompt in prompts]


async def test_stop_tokens_minimum_length_and_logprobs(sim_pair: PairMaker):
    pair = await sim_pair()
    prompt = prompt_of(10, 9)
    answer = right_answer(prompt, GREEDY)
    stop = answer[4]
    outputs: list[StepOutput] = []
    sampling = SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=(stop,), logprobs=3)
    assert await pair.answer(prompt, sampling, on_step=outputs.append) == answer[:5] == right_answer(prompt, sampling)
    assert (outputs[-1].finish, outputs[-1].stop_token) == (FINISH_STOP, stop)
    for output in outputs:
        (logprob,) = output.logprobs
        assert logprob.top[0] == (output.token_ids[0], logprob.logprob)
        assert len(logprob.top) == 3
    longer = SamplingParams(max_tokens=20, min_tokens=6, temperature=0.0, stop_token_ids=(stop,))
    assert await pair.answer(prompt, longer) == right_answer(prompt, longer)


async def test_an_answer_ends_at_the_longest_length_of_the_model(sim_pair: PairMaker):
    pair = await sim_pair(max_model_len=32)
    assert len(await pair.answer(prompt_of(30, 1), GREEDY)) == 2
    with pytest.raises(BadTask, match="no room"):
        await pair.answer(prompt_of(32, 1), GREEDY)
    with pytest.raises(BadTask, match="empty"):
        await pair.answer([], GREEDY)


async def test_kv_events_tell_what_the_prefix_cache_holds(sim_pair: PairMaker):
    pair = await sim_pair()
    events: list[KvEvent] = []
    pair.decode.on_kv_events(events.extend)
    await pair.hand_over(prompt_of(64, 2), GREEDY, TOKEN)
    stored = [block_hash for event in events if isinstance(event, BlockStored) for block_hash in event.hashes]
    assert len(stored) == len(set(stored)) == (64 + 19) // 8


async def test_a_hand_off_to_nobody_fails_with_its_reason(sim_pair: PairMaker):
    pair = await sim_pair()
    task = pair.prefill_task(TOKEN, prompt_of(10, 1), addresses=("inproc://gone:1",))
    with pytest.raises(HandoffFailed, match="link_lost"):
        await pair.prefill.prefill(task)
    await pair.settled()


async def test_a_closed_engine_ends_every_task(sim_pair: PairMaker):
    pair = await sim_pair(sim_itl_ms=5)
    task = asyncio.create_task(pair.answer(prompt_of(10, 1), SamplingParams(max_tokens=200)))
    await asyncio.sleep(0.02)
    await pair.decode.aclose()
    with pytest.raises(EngineDead):
        await task
    with pytest.raises(EngineDead):
        await pair.answer(prompt_of(10, 1), GREEDY)
