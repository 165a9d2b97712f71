"""Engines of several tensor-parallel ranks on tiny models, and how their answers are compared."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_models import MAX_MODEL_LEN, VOCABULARY, make_model
from vllm_rig import DECODE_EPOCH, PREFILL_EPOCH, Answer, EnginePair, engine_config

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.base import EngineInfo
from hocket.workers.engines.vllm.engine import VllmEngine

CHUNK_TOKENS = 64
SAMPLING = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3, ignore_eos=True)
LOGPROB_TOLERANCE = 2e-3
"""Ranks add up in another order than one engine does; one head of one block that is lost shows."""


def prompt_of(tokens: int, seed: int) -> list[int]:
    source = random.Random(f"{tokens} {seed}")
    return [source.randrange(3, VOCABULARY) for _ in range(tokens)]


def assert_same(answer: Answer, reference: Answer) -> None:
    assert answer.tokens == reference.tokens
    assert len(answer.logprobs) == len(reference.logprobs) == SAMPLING.max_tokens
    for entry, wanted in zip(answer.logprobs, reference.logprobs, strict=True):
        assert entry.logprob == pytest.approx(wanted.logprob, abs=LOGPROB_TOLERANCE)


@dataclass
class Engines:
    """One of each kind, started when it is first asked for."""

    folder: Path
    stack: AsyncExitStack
    made: dict[tuple[str, str, int], tuple[VllmEngine, EngineInfo]]

    async def pair(self, prefill_ranks: int, decode_ranks: int, *, model: str = "llama") -> EnginePair:
        prefill, prefill_info = await self.engine("prefill", model, prefill_ranks)
        decode, decode_info = await self.engine("decode", model, decode_ranks)
        return EnginePair(prefill, decode, prefill_info, decode_info)

    async def engine(self, role: str, model: str, ranks: int) -> tuple[VllmEngine, EngineInfo]:
        if (role, model, ranks) not in self.made:
            self.made[role, model, ranks] = await self.stack.enter_async_context(
                started(self.folder, role, model, ranks)
            )
        return self.made[role, model, ranks]


@asynccontextmanager
async def started(folder: Path, role: str, model: str, ranks: int) -> AsyncIterator[tuple[VllmEngine, EngineInfo]]:
    path = folder / model
    if not path.exists():
        make_model(model, path)
    config = engine_config(
        role,
        path,
        max_model_len=MAX_MODEL_LEN,
        kv_gib=0.0625,
        engine_args={"skip_tokenizer_init": True},
        tp=ranks,
        chunk_tokens=CHUNK_TOKENS,
    )
    engine = VllmEngine(config, worker_id=role, epoch=PREFILL_EPOCH if role == "prefill" else DECODE_EPOCH)
    try:
        yield engine, await engine.start()
    finally:
        await engine.aclose()
