"""Tensor-parallel ranks of models whose heads or layers are special: a KV head that both ranks have, sliding windows."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from tp_rig import SAMPLING, Engines, assert_same, prompt_of, started, zeros_into_one_rank
from vllm_rig import BLOCK_TOKENS, EnginePair

from hocket.workers.engines.base import EngineInfo
from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),  # The first test of an engine waits for it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LENGTHS = (5, 33, 131, 200)  # With windows of 100 a load of all 131 tokens would be wrong.


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engines(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engines]:
    async with AsyncExitStack() as stack:
        yield Engines(tmp_path_factory.mktemp("models"), stack, {})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def silent(engines: Engines) -> AsyncIterator[tuple[VllmEngine, EngineInfo]]:
    """A decode engine that does without telling vLLM of KV that was lost, as with vLLM 0.26."""
    async with started(engines.folder, "decode", "ministral", 2, reports_failed_loads=False) as engine:
        yield engine


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 2)], ids=str)
async def test_a_kv_head_that_both_ranks_have_travels_once(
    engines: Engines, ranks: tuple[int, int], tokens: int
) -> None:
    pair = await engines.pair(*ranks, model="one_head")
    prompt = prompt_of(tokens, 1)
    reference = await pair.reference(prompt, SAMPLING)
    outcome, answer = await pair.hand_off(prompt, SAMPLING)
    assert_same(answer, reference)
    assert answer.computed_tokens == 1
    (layer, *_), layers = pair.decode_engine.layout.layers, len(pair.decode_engine.layout.layers)
    blocks = -(-tokens // BLOCK_TOKENS)
    copies = pair.decode_info.tp_size  # Each decode rank wants the head for itself.
    assert outcome.kv_bytes <= blocks * BLOCK_TOKENS * layers * layer.head_bytes * copies
    await pair.wait_blocks_free()


@pytest.mark.parametrize("tokens", LENGTHS)
async def test_windows_of_several_ranks_are_as_good_as_of_one(engines: Engines, tokens: int) -> None:
    pair = await engines.pair(2, 1, model="ministral")
    prompt = prompt_of(tokens, 1)
    reference = await pair.reference(prompt, SAMPLING)
    outcome, answer = await pair.hand_off(prompt, SAMPLING)
    assert_same(answer, reference)
    assert answer.computed_tokens == tokens - (tokens - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    assert (outcome.kv_bytes > 0) == (tokens > BLOCK_TOKENS)
    await pair.wait_blocks_free()


@pytest.mark.parametrize("rank", [0, 1])
async def test_windows_that_landed_in_one_rank_only_are_computed_here(engines: Engines, rank: int) -> None:
    await windows_that_one_rank_lacks(await engines.pair(2, 2, model="ministral"), rank)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_vllm_that_cannot_be_told_of_lost_windows_runs_the_request_again(
    engines: Engines, silent: tuple[VllmEngine, EngineInfo], rank: int
) -> None:
    prefill, prefill_info = await engines.engine("prefill", "ministral", 2)
    await windows_that_one_rank_lacks(EnginePair(prefill, silent[0], prefill_info, silent[1]), rank)


async def windows_that_one_rank_lacks(pair: EnginePair, rank: int) -> None:
    prompt, token = prompt_of(200, 2 + rank), os.urandom(16)
    reference = await pair.reference(prompt, SAMPLING)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        decode = group.create_task(pair.decode(prompt, token, SAMPLING, timeout_s=2.0))
        assert (await zeros_into_one_rank(pair, rank, token, len(prompt))).is_landed
    assert_same(decode.result(), reference)
    assert decode.result().computed_tokens == 200
    await pair.wait_blocks_free()
