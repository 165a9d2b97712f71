"""Four ranks of a model with two KV heads: each head is in two of them, and two of four prefill ranks have nothing to send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from tp_rig import SAMPLING, Engines, assert_same, prompt_of
from vllm_rig import EnginePair

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(600),  # The first test of a pair waits for its engines.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[(2, 4), (4, 2)], ids=str)
async def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnginePair]:
    async with AsyncExitStack() as stack:
        yield await Engines(tmp_path_factory.mktemp("models"), stack, {}).pair(*request.param)


@pytest.mark.parametrize("tokens", [33, 200])
async def test_heads_that_several_ranks_have_are_handed_to_all_of_them(pair: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 1)
    reference = await pair.reference(prompt, SAMPLING)
    outcome, answer = await pair.hand_off(prompt, SAMPLING)
    assert_same(answer, reference)
    assert (answer.computed_tokens, outcome.computed_tokens) == (1, tokens)
    await pair.wait_blocks_free()
