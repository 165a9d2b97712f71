"""A rank's process is killed: its engine ends at once, and the engine at the other end goes on with every block back."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from tp_rig import SAMPLING, Engines, assert_same, prompt_of
from vllm_rig import EnginePair

from hocket.workers.engines.base import EngineDead, EngineError
from hocket.workers.engines.vllm import reaper
from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed context:ResourceWarning"),
]
RANKS = 2
SOON_S = 20.0  # far below the hand-off's own time


@pytest_asyncio.fixture(loop_scope="session")
async def pair(tmp_path: Path) -> AsyncIterator[EnginePair]:
    async with AsyncExitStack() as stack:
        yield await Engines(tmp_path, stack, {}).pair(RANKS, RANKS)


def rank_pid(engine: VllmEngine, rank: int) -> int:
    """vLLM names its processes; a rank was started before the next one."""
    pids = [
        pid for pid in reaper.marked(engine.mark.encode()) if b"Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(pids) == RANKS
    return sorted(pids)[rank]


async def blocks_are_free(engine: VllmEngine, kv_blocks: int) -> None:
    async with asyncio.timeout(SOON_S):
        while engine.load().kv_blocks_free != kv_blocks or engine.load().running:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("rank", range(RANKS))
async def test_a_killed_prefill_rank_costs_no_answer(pair: EnginePair, rank: int) -> None:
    prompt = prompt_of(900, 1)
    reference = await pair.reference(prompt, SAMPLING)
    decode, prefill = await pair.under_way(prompt, 3, SAMPLING)
    os.kill(rank_pid(pair.prefill_engine, rank), signal.SIGKILL)
    async with asyncio.timeout(SOON_S):
        with pytest.raises(EngineDead):
            await prefill
        assert isinstance(await pair.prefill_engine.failed(), EngineDead)
        assert_same(await decode, reference)
    await blocks_are_free(pair.decode_engine, pair.decode_info.kv_blocks)


async def test_a_killed_decode_rank_ends_its_engine_and_no_other(pair: EnginePair) -> None:
    decode, prefill = await pair.under_way(prompt_of(900, 2), 3, SAMPLING)
    os.kill(rank_pid(pair.decode_engine, 1), signal.SIGKILL)
    async with asyncio.timeout(SOON_S):
        with pytest.raises(EngineDead):
            await decode
        with pytest.raises(EngineError):
            await prefill
    await blocks_are_free(pair.prefill_engine, pair.prefill_info.kv_blocks)
    assert await pair.prefill_engine.clear_prefix_cache()
