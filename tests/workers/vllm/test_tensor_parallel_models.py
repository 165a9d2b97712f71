"""Tensor-parallel ranks of models whose heads or layers are special: a KV head that both ranks have, sliding windows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from tp_rig import SAMPLING, Engines, assert_same, prompt_of
from vllm_rig import BLOCK_TOKENS

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


async def test_windows_whose_kv_is_lost_are_computed_here(engines: Engines) -> None:
    pair = await engines.pair(1, 2, model="ministral")
    prompt = prompt_of(200, 2)
    reference = await pair.reference(prompt, SAMPLING)
    answer = await pair.decode(prompt, bytes(16), SAMPLING, timeout_s=0.5)
    assert_same(answer, reference)
    assert answer.computed_tokens == 200
    await pair.wait_blocks_free()
