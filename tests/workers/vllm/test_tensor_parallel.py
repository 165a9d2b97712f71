"""Engines of several tensor-parallel ranks: what decode makes from their KV is what one engine of one rank makes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from tiny_models import MAX_MODEL_LEN, VOCABULARY, make_model
from vllm_rig import DECODE_EPOCH, PREFILL_EPOCH, EnginePair, engine_config

from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),  # The first test of a pair waits for its engines.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
CHUNK_TOKENS = 64


def prompt_of(tokens: int, seed: int) -> list[int]:
    import random

    source = random.Random(f"{tokens} {seed}")
    return [source.randrange(3, VOCABULARY) for _ in range(tokens)]


@asynccontextmanager
async def engines(folder: Path, model: str, ranks: tuple[int, int]) -> AsyncIterator[EnginePair]:
    path = make_model(model, folder)
    changes = {"max_model_len": MAX_MODEL_LEN, "kv_gib": 0.0625, "engine_args": {"skip_tokenizer_init": True}}
    prefill, decode = (
        VllmEngine(engine_config(role, path, **changes, tp=tp, chunk_tokens=CHUNK_TOKENS), worker_id=role, epoch=epoch)
        for role, tp, epoch in zip(("prefill", "decode"), ranks, (PREFILL_EPOCH, DECODE_EPOCH), strict=True)
    )
    try:
        yield EnginePair(prefill, decode, await prefill.start(), await decode.start())
    finally:
        await prefill.aclose()
        await decode.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=[(2, 2)], ids=str)
async def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EnginePair]:
    async with engines(tmp_path_factory.mktemp("llama"), "llama", request.param) as pair:
        yield pair


@pytest.mark.parametrize("tokens", [5, 100])
async def test_first(pair: EnginePair, tokens: int) -> None:
    prompt = prompt_of(tokens, 1)
    reference = await pair.reference(prompt)
    outcome, answer = await pair.hand_off(prompt)
    assert answer.tokens == reference.tokens
    assert (answer.computed_tokens, answer.cached_tokens) == (1, 0)
    assert outcome.kv_bytes > 0
    await pair.wait_blocks_free()
