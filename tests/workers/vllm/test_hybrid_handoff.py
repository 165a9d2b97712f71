"""Models with sliding windows and attention chunks: decode from another engine's KV is the same answer, at every length.

The engines are those of `tiny_models`; what they are compared with is the decode engine that computes the prompt itself.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from relay import Rows, hand_off_spoilt
from tiny_models import FAMILIES, MAX_MODEL_LEN, VOCABULARY, make_model
from vllm_rig import DECODE_EPOCH, PREFILL_EPOCH, Answer, EnginePair, engine_config

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.messages import BlockStored, SamplingParams
from hocket.workers.engines.base import HandoffFailed
from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),  # The first test of a model waits for its engines.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BLOCK = 32
WHOLE = MAX_MODEL_LEN
LENGTHS = (5, 31, 32, 33, 64, 99, 100, 101, 128, 130, 131, 132, 133, 162, 163, 164, 192, 195, 200, 256, 300, 517)
"""Around blocks, the window of 100 and the attention chunk of 64. A load of the whole prompt would be wrong at 131, 163 and
195 with the window, at 64, 128, 192 and 256 with the chunk."""
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, ignore_eos=True)
LOGPROB_TOLERANCE = 2e-3
"""Between a prompt computed at once and one computed in chunks; a block too few moves a logprob by 0.01 and more."""


@dataclass
class Case:
    """A model and how its prompts are computed."""

    model: str
    chunk_tokens: int
    prefill_block: int = BLOCK
    decode_block: int = BLOCK

    def __str__(self) -> str:
        chunks = "whole" if self.chunk_tokens == WHOLE else f"chunks of {self.chunk_tokens}"
        sizes = "" if self.prefill_block == self.decode_block else f" {self.prefill_block} to {self.decode_block}"
        return f"{self.model} {chunks}{sizes}"


def cases(*wanted: Case, slow: tuple[Case, ...] = ()) -> list[object]:
    marked = [pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in slow]
    return [pytest.param(case, id=str(case)) for case in wanted] + marked


def prompt_of(tokens: int, seed: int) -> list[int]:
    source = random.Random(f"{tokens} {seed}")
    return [source.randrange(3, VOCABULARY) for _ in range(tokens)]


def wanted_tokens(pair: EnginePair, prompt_tokens: int) -> int:
    step = pair.decode_info.block_tokens
    return (prompt_tokens - 1) // step * step


def assert_same(answer: Answer, reference: Answer) -> None:
    assert answer.tokens == reference.tokens
    assert len(answer.logprobs) == len(reference.logprobs) == SAMPLING.max_tokens
    for entry, wanted in zip(answer.logprobs, reference.logprobs, strict=True):
        assert entry.logprob == pytest.approx(wanted.logprob, abs=LOGPROB_TOLERANCE)
        assert [value for _, value in entry.top] == pytest.approx(
            [value for _, value in wanted.top], abs=LOGPROB_TOLERANCE
        )


@pytest.fixture(scope="module")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@asynccontextmanager
async def engines(case: Case, folder: Path, environment: pytest.MonkeyPatch) -> AsyncIterator[EnginePair]:
    for name, value in FAMILIES[case.model].environment.items():
        environment.setenv(name, value)
    model = make_model(case.model, folder)
    changes = {"max_model_len": MAX_MODEL_LEN, "kv_gib": 0.125, "engine_args": {"skip_tokenizer_init": True}}
    prefill_config = engine_config(
        "prefill", model, **changes, chunk_tokens=case.chunk_tokens, block_tokens=case.prefill_block
    )
    decode_config = engine_config("decode", model, **changes, block_tokens=case.decode_block)
    prefill = VllmEngine(prefill_config, worker_id="prefill", epoch=PREFILL_EPOCH)
    decode = VllmEngine(decode_config, worker_id="decode", epoch=DECODE_EPOCH)
    try:
        pair = EnginePair(prefill, decode, await prefill.start(), await decode.start())
        decode.on_kv_events(pair.decode_events.extend)
        yield pair
    finally:
        await prefill.aclose()
        await decode.aclose()


ALL_CASES = cases(
    Case("ministral", WHOLE),
    Case("ministral", 64),
    Case("gemma3", 64),
    Case("gpt_oss", 64),
    slow=(
        Case("gemma3", WHOLE),
        Case("gpt_oss", WHOLE),
        *(Case(model, chunk) for model in ("gemma2", "llama4", "mistral") for chunk in (WHOLE, 64)),
    ),
)


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=ALL_CASES)
async def hybrid(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: pytest.MonkeyPatch
) -> AsyncIterator[EnginePair]:
    case: Case = request.param
    async with engines(case, tmp_path_factory.mktemp(case.model), environment) as pair:
        kinds = tuple(group.kind for group in pair.decode_engine.layout.groups)
        assert kinds == FAMILIES[case.model].groups
        yield pair


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_the_answer_is_that_of_one_engine(hybrid: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 1)
    reference = await hybrid.reference(prompt, SAMPLING)
    wanted = wanted_tokens(hybrid, tokens)
    for scheme in ("tcp", "ucx"):
        outcome, answer = await hybrid.hand_off(prompt, SAMPLING, scheme=scheme)
        assert_same(answer, reference)
        assert (outcome.computed_tokens, outcome.cached_tokens) == (wanted, 0)
        assert (answer.computed_tokens, answer.cached_tokens) == (tokens - wanted, 0)
        assert (outcome.kv_bytes > 0) == (wanted > 0)
        await hybrid.clear()


async def test_several_at_once_do_not_mix(hybrid: EnginePair) -> None:
    prompts = [prompt_of(tokens, 2) for tokens in (33, 131, 195, 256, 300, 517)]
    references = [await hybrid.reference(prompt, SAMPLING) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(hybrid.hand_off(prompt, SAMPLING)) for prompt in prompts]
    for task, reference in zip(tasks, references, strict=True):
        assert_same(task.result()[1], reference)


@pytest.mark.parametrize("tokens", [195, 300])
async def test_a_prefix_that_prefill_knows_is_sent_and_not_computed(hybrid: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 3)
    longer = prompt + prompt_of(70, 4)
    references = [await hybrid.reference(each, SAMPLING) for each in (prompt, longer)]
    await hybrid.hand_off(prompt, SAMPLING)
    for each, reference in zip((prompt, longer), references, strict=True):
        assert await hybrid.decode_engine.clear_prefix_cache()
        outcome, answer = await hybrid.hand_off(each, SAMPLING)
        assert_same(answer, reference)
        assert outcome.cached_tokens >= wanted_tokens(hybrid, tokens) - BLOCK
        assert answer.cached_tokens == 0


@pytest.mark.parametrize("tokens", [195, 300])
async def test_a_prefix_that_decode_knows_is_not_sent_again(hybrid: EnginePair, tokens: int) -> None:
    """Also the next turn of a conversation, whose answer decode made itself."""
    prompt = prompt_of(tokens, 5)
    reference = await hybrid.reference(prompt, SAMPLING)
    _, first = await hybrid.hand_off(prompt, SAMPLING)
    assert_same(first, reference)
    known = wanted_tokens(hybrid, tokens)
    async with asyncio.timeout(5):
        while not await hybrid.prefill_engine.clear_prefix_cache():
            await asyncio.sleep(0.02)
    outcome, again = await hybrid.hand_off(prompt, SAMPLING)
    assert_same(again, reference)
    assert (outcome.kv_bytes, again.cached_tokens, again.computed_tokens) == (0, known, tokens - known)
    turn = prompt + first.tokens + prompt_of(60, 6)
    _, answer = await hybrid.hand_off(turn, SAMPLING)
    assert answer.cached_tokens == known
    assert_same(answer, await hybrid.reference(turn, SAMPLING))


async def test_a_prefix_that_both_know(hybrid: EnginePair) -> None:
    prompt = prompt_of(300, 7)
    longer = prompt + prompt_of(50, 8)
    reference, of_longer = await hybrid.reference(prompt, SAMPLING), await hybrid.reference(longer, SAMPLING)
    first, _ = await hybrid.hand_off(prompt, SAMPLING)
    again, answer = await hybrid.hand_off(prompt, SAMPLING)
    assert_same(answer, reference)
    assert again.kv_bytes == 0
    outcome, answer = await hybrid.hand_off(longer, SAMPLING)
    assert_same(answer, of_longer)
    assert answer.cached_tokens == 288
    assert 0 < outcome.kv_bytes < first.kv_bytes


async def test_kv_that_never_comes_is_computed_here(hybrid: EnginePair) -> None:
    prompt = prompt_of(195, 9)
    reference = await hybrid.reference(prompt, SAMPLING)
    answer = await hybrid.decode(prompt, os.urandom(16), SAMPLING, timeout_s=0.3)
    assert_same(answer, reference)
    assert (answer.computed_tokens, answer.cached_tokens) == (195, 0)
    await hybrid.wait_blocks_free()


async def test_when_a_prefill_is_cancelled_decode_computes_the_prompt(hybrid: EnginePair) -> None:
    prompt, token = prompt_of(900, 10), os.urandom(16)
    reference = await hybrid.reference(prompt, SAMPLING)
    decode = asyncio.create_task(hybrid.decode(prompt, token, SAMPLING, timeout_s=3.0))
    prefill = asyncio.create_task(hybrid.prefill(prompt, token))
    async with asyncio.timeout(20):
        while hybrid.prefill_engine.load().kv_blocks_free == hybrid.prefill_info.kv_blocks and not prefill.done():
            await asyncio.sleep(0.001)
    prefill.cancel()
    await asyncio.wait({prefill})
    assert_same(await decode, reference)
    await hybrid.wait_blocks_free()


async def test_a_decode_that_is_cancelled_while_it_waits_gives_its_blocks_back(hybrid: EnginePair) -> None:
    prompt, token = prompt_of(300, 11), os.urandom(16)
    reference = await hybrid.reference(prompt, SAMPLING)
    decode = asyncio.create_task(hybrid.decode(prompt, token, SAMPLING))
    async with asyncio.timeout(10):
        while hybrid.decode_engine.load().kv_blocks_free == hybrid.decode_info.kv_blocks:
            await asyncio.sleep(0.01)
    decode.cancel()
    with pytest.raises(asyncio.CancelledError):
        await decode
    with pytest.raises(HandoffFailed, match="refused"):
        await hybrid.prefill(prompt, token)
    await hybrid.wait_blocks_free()
    assert_same((await hybrid.hand_off(prompt, SAMPLING))[1], reference)


async def test_the_prefix_cache_is_told_once_and_whole(hybrid: EnginePair) -> None:
    prompt = prompt_of(300, 12)
    await hybrid.clear()
    hybrid.decode_events.clear()
    await hybrid.hand_off(prompt, SAMPLING)
    wanted = block_hashes_of(prompt, BLOCK)
    async with asyncio.timeout(5):
        while not wanted[-1:] <= (stored := stored_hashes(hybrid)):
            await asyncio.sleep(0.02)
    assert stored == wanted


def stored_hashes(pair: EnginePair) -> list[int]:
    return [block for event in pair.decode_events if isinstance(event, BlockStored) for block in event.hashes]


# That these tests can fail.


async def test_every_wanted_block_of_every_group_counts(hybrid: EnginePair) -> None:
    prompt = prompt_of(300, 13)
    reference = await hybrid.reference(prompt, SAMPLING)
    assert_same(await hand_off_spoilt(hybrid, prompt, SAMPLING, lambda rows: None), reference)
    layout = hybrid.decode_engine.layout
    last_block = wanted_tokens(hybrid, len(prompt)) // BLOCK - 1
    for group in range(len(layout.groups)):
        await hybrid.clear()

        def spoil(rows: Rows, group: int = group) -> None:
            for row, layer in zip(rows, layout.layers, strict=True):
                if layer.group == group:
                    row[last_block] = 0

        answer = await hand_off_spoilt(hybrid, prompt, SAMPLING, spoil)
        assert answer.tokens != reference.tokens
    await hybrid.clear()


# Blocks of another size on the decode side.


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="session",
    params=cases(
        Case("ministral", 64, 32, 64),
        slow=(Case("ministral", 64, 64, 32), Case("gemma2", WHOLE, 32, 64), Case("llama4", 64, 32, 64)),
    ),
)
async def uneven(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, environment: pytest.MonkeyPatch
) -> AsyncIterator[EnginePair]:
    case: Case = request.param
    async with engines(case, tmp_path_factory.mktemp(case.model), environment) as pair:
        assert pair.prefill_info.block_tokens != pair.decode_info.block_tokens
        assert pair.prefill_info.fingerprint == pair.decode_info.fingerprint
        yield pair


@pytest.mark.parametrize("tokens", [33, 64, 65, 131, 163, 192, 195, 256, 300, 517])
async def test_blocks_of_another_size_make_no_difference(uneven: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 14)
    reference = await uneven.reference(prompt, SAMPLING)
    wanted = wanted_tokens(uneven, tokens)
    for scheme in ("tcp", "ucx"):
        outcome, answer = await uneven.hand_off(prompt, SAMPLING, scheme=scheme)
        assert_same(answer, reference)
        assert outcome.computed_tokens == wanted
        assert answer.computed_tokens == tokens - wanted
        await uneven.clear()
