"""Decode from KV that another engine made is the same answer, whatever the lengths, the link and the caches."""

from __future__ import annotations

import asyncio
import os

import pytest
from vllm_rig import BLOCK_TOKENS, DECODE_EPOCH, GREEDY, EnginePair, random_prompt

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.messages import FINISH_LENGTH, FINISH_STOP, BlockStored, KvEvent, SamplingParams
from hocket.workers.engines.base import BadTask, HandoffFailed

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),  # The first test waits for both engines.
    # vLLM and what it imports, in this process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LENGTHS = (5, 31, 32, 33, 127, 128, 129, 700, 1500)
SCHEMES = ("tcp", "ucx")


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_greedy_tokens_after_a_hand_off_are_those_of_one_engine(
    pair: EnginePair, scheme: str, tokens: int
) -> None:
    prompt = random_prompt(tokens, 1)
    reference = await pair.reference(prompt)
    outcome, answer = await pair.hand_off(prompt, scheme=scheme)
    assert answer.tokens == reference.tokens
    assert answer.steps[-1].finish == FINISH_LENGTH
    assert (outcome.computed_tokens, outcome.cached_tokens) == (tokens, 0)
    assert (answer.computed_tokens, answer.cached_tokens) == (1, 0)
    assert outcome.kv_bytes > 0


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_eight_hand_offs_at_once_do_not_mix(pair: EnginePair, scheme: str) -> None:
    prompts = [random_prompt(tokens, 2) for tokens in (5, 32, 33, 127, 128, 129, 400, 700)]
    references = [await pair.reference(prompt) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(pair.hand_off(prompt, scheme=scheme)) for prompt in prompts]
    for task, reference in zip(tasks, references, strict=True):
        outcome, answer = task.result()
        assert answer.tokens == reference.tokens
        assert answer.computed_tokens == 1
        assert outcome.cached_tokens == 0


async def test_a_hand_off_is_counted_on_both_sides_with_its_bytes(pair: EnginePair) -> None:
    sender, receiver = pair.prefill_engine, pair.decode_engine
    sent, received = sender.handoff_counts(), receiver.handoff_counts()
    landed = (sent.sent.get("landed", 0), received.received.get("landed", 0))
    outcome, _ = await pair.hand_off(random_prompt(300, 6))
    sent_after, received_after = sender.handoff_counts(), receiver.handoff_counts()
    assert (sent_after.sent["landed"], received_after.received["landed"]) == (landed[0] + 1, landed[1] + 1)
    assert sent_after.kv_bytes_sent - sent.kv_bytes_sent == outcome.kv_bytes
    assert received_after.kv_bytes_received - received.kv_bytes_received == outcome.kv_bytes


async def test_only_what_the_decode_engine_lacks_travels(pair: EnginePair) -> None:
    prompt = random_prompt(300, 3)
    reference = await pair.reference(prompt)
    first, _ = await pair.hand_off(prompt)
    again, answer = await pair.hand_off(prompt)
    cached = (300 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert answer.tokens == reference.tokens
    assert (again.cached_tokens, answer.cached_tokens, answer.computed_tokens) == (cached, cached, 1)
    assert again.kv_bytes * 5 < first.kv_bytes


async def test_a_prefix_that_only_the_prefill_engine_has_travels_whole(pair: EnginePair) -> None:
    prompt = random_prompt(300, 4)
    reference = await pair.reference(prompt)
    first, _ = await pair.hand_off(prompt)
    assert await pair.decode_engine.clear_prefix_cache()
    again, answer = await pair.hand_off(prompt)
    assert answer.tokens == reference.tokens
    assert again.cached_tokens > 0
    assert again.kv_bytes == first.kv_bytes
    assert (answer.computed_tokens, answer.cached_tokens) == (1, 0)


async def test_a_prefix_that_only_the_decode_engine_has_stays(pair: EnginePair) -> None:
    prompt = random_prompt(256, 5)  # Whole blocks: the last one still travels, for the last token runs again.
    reference = await pair.reference(prompt)
    await pair.hand_off(prompt)
    async with asyncio.timeout(5):
        while not await pair.prefill_engine.clear_prefix_cache():
            await asyncio.sleep(0.02)
    outcome, answer = await pair.hand_off(prompt)
    assert answer.tokens == reference.tokens
    assert outcome.computed_tokens == 256
    assert answer.cached_tokens == 256 - BLOCK_TOKENS


async def test_prefill_may_come_first(pair: EnginePair) -> None:
    prompt = random_prompt(150, 6)
    reference = await pair.reference(prompt)
    token = os.urandom(16)
    async with asyncio.TaskGroup() as group:
        prefill = group.create_task(pair.prefill(prompt, token))
        async with asyncio.timeout(20):
            while pair.prefill_engine.load().running or pair.prefill_engine.load().kv_blocks_free == (
                pair.prefill_info.kv_blocks
            ):
                await asyncio.sleep(0.02)
        assert not prefill.done()
        answer = await pair.decode(prompt, token)
    assert answer.tokens == reference.tokens
    assert answer.computed_tokens == 1


async def test_seeded_sampling_and_logprobs_are_those_of_one_engine(pair: EnginePair) -> None:
    prompt = random_prompt(400, 7)
    sampling = SamplingParams(max_tokens=8, temperature=0.9, seed=7, logprobs=3, top_k=50, ignore_eos=True)
    reference = await pair.reference(prompt, sampling)
    _, answer = await pair.hand_off(prompt, sampling)
    assert answer.tokens == reference.tokens
    assert len(answer.logprobs) == 8
    for entry, wanted in zip(answer.logprobs, reference.logprobs, strict=True):
        # A matrix product of one row differs from the same row's in a product of many, in the last bits.
        assert entry.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert [token for token, _ in entry.top] == [token for token, _ in wanted.top]
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in wanted.top], abs=1e-3)
        assert len(entry.top) == 3
        assert list(entry.top) == sorted(entry.top, key=lambda item: -item[1])


async def test_a_stop_token_ends_it_also_as_the_first_one(pair: EnginePair) -> None:
    prompt = random_prompt(100, 8)
    first = (await pair.reference(prompt)).tokens[0]
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(first,))
    _, answer = await pair.hand_off(prompt, sampling)
    assert answer.tokens == [first]
    assert (answer.steps[-1].finish, answer.steps[-1].stop_token) == (FINISH_STOP, first)


async def test_a_decode_cancelled_in_mid_transfer_gives_all_blocks_back(pair: EnginePair) -> None:
    decode, prefill = await pair.under_way(random_prompt(1500, 9), 8)  # The second chunk; the first one travels.
    decode.cancel()
    with pytest.raises(asyncio.CancelledError):
        await decode
    with pytest.raises(HandoffFailed, match="cancelled|refused"):
        await prefill
    await pair.wait_blocks_free()


async def test_when_a_prefill_is_cancelled_the_decode_engine_computes_the_rest(pair: EnginePair) -> None:
    prompt = random_prompt(1200, 10)
    reference = await pair.reference(prompt)
    decode, prefill = await pair.under_way(prompt, 10, timeout_s=8.0)
    prefill.cancel()
    with pytest.raises(asyncio.CancelledError):
        await prefill
    answer = await decode
    assert answer.tokens == reference.tokens
    assert answer.computed_tokens is not None
    assert answer.computed_tokens > 1
    await pair.wait_blocks_free()


async def test_kv_that_never_comes_is_computed_here(pair: EnginePair) -> None:
    prompt = random_prompt(200, 11)
    reference = await pair.reference(prompt)
    async with asyncio.TaskGroup() as group:
        decode = group.create_task(pair.decode(prompt, os.urandom(16), timeout_s=1.0))
        with pytest.raises(HandoffFailed):
            await pair.prefill(prompt, os.urandom(16), timeout_s=2.0)  # Another token: nobody expects it.
    assert decode.result().tokens == reference.tokens
    assert decode.result().computed_tokens == 200
    await pair.wait_blocks_free()


async def test_kv_of_another_layout_is_refused_at_once(pair: EnginePair) -> None:
    prompt, token = random_prompt(200, 12), os.urandom(16)
    reference = await pair.reference(prompt)
    async with asyncio.TaskGroup() as group:
        decode = group.create_task(pair.decode(prompt, token, timeout_s=10.0))
        with pytest.raises(HandoffFailed, match="refused:"):
            await pair.prefill(prompt, token, fingerprint="0" * 32)
    assert decode.result().tokens == reference.tokens
    await pair.wait_blocks_free()


async def test_a_job_for_another_incarnation_is_refused(pair: EnginePair) -> None:
    with pytest.raises(HandoffFailed, match="refused:wrong_epoch"):
        await pair.prefill(random_prompt(50, 15), os.urandom(16), epoch=DECODE_EPOCH + 1)
    await pair.wait_blocks_free()


async def test_a_seeded_request_whose_kv_is_lost_does_not_end_the_engine(pair: EnginePair) -> None:
    prompt = random_prompt(700, 13)
    sampling = SamplingParams(max_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
    reference = await pair.reference(prompt, sampling)
    answer = await pair.decode(prompt, os.urandom(16), sampling, timeout_s=0.5)
    assert answer.tokens == reference.tokens


async def test_both_engines_tell_their_prefix_cache_in_hockets_hashes(pair: EnginePair) -> None:
    prompt = random_prompt(200, 14)
    await pair.clear()
    await pair.hand_off(prompt)
    wanted = set(block_hashes_of(prompt, BLOCK_TOKENS))
    for events in (pair.prefill_events, pair.decode_events):
        async with asyncio.timeout(5):
            while not wanted <= _stored(events):
                await asyncio.sleep(0.02)


def _stored(events: list[KvEvent]) -> set[int]:
    return {block for event in events if isinstance(event, BlockStored) for block in event.hashes}


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        ([], GREEDY),
        ([-1, 5], GREEDY),
        ([10_000_000], GREEDY),
        ([1] * 2048, GREEDY),
        ([1, 2], SamplingParams(logprobs=100)),
        ([1, 2], SamplingParams(top_p=7.0)),
    ],
    ids=["empty", "negative", "outside the vocabulary", "too long", "logprobs", "top_p"],
)
async def test_a_task_that_no_engine_can_do_is_refused(
    pair: EnginePair, prompt: list[int], sampling: SamplingParams
) -> None:
    with pytest.raises(BadTask):
        await pair.decode(prompt, None, sampling)
    await pair.wait_blocks_free()
