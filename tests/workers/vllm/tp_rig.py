"""Engines of several tensor-parallel ranks on tiny models, and how their answers are compared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_models import MAX_MODEL_LEN, VOCABULARY, make_model
from vllm_rig import BLOCK_TOKENS, DECODE_EPOCH, PREFILL_EPOCH, Answer, EnginePair, engine_config

from hocket.bus.messages import SamplingParams
from hocket.transport.base import Chunk, GroupBlocks, HandoffKey, SendEnd, SendOrder, SendReleased
from hocket.transport.endpoint import HandoffEndpoint
from hocket.transport.layout import KvLayout
from hocket.transport.links.tcp import TcpTransport
from hocket.transport.pool import HostKvPool
from hocket.transport.ranks import RankedEndpoint
from hocket.workers.engines.base import EngineInfo
from hocket.workers.engines.vllm.engine import VllmEngine
from hocket.workers.engines.vllm.kv_groups import KvGroups

CHUNK_TOKENS = 64
RELAY_EPOCH = 33
RELAY_BLOCKS = 8
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
async def started(
    folder: Path, role: str, model: str, ranks: int, *, reports_failed_loads: bool = True
) -> AsyncIterator[tuple[VllmEngine, EngineInfo]]:
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
    epoch = PREFILL_EPOCH if role == "prefill" else DECODE_EPOCH
    engine = VllmEngine(config, worker_id=role, epoch=epoch, reports_failed_loads=reports_failed_loads)
    try:
        yield engine, await engine.start()
    finally:
        await engine.aclose()


# The test's own process as one rank of the other side.


def rank_pool(layout: KvLayout, rank: int) -> HostKvPool:
    layout = msgspec.structs.replace(layout, shape=msgspec.structs.replace(layout.shape, tp_rank=rank))
    rows = [np.zeros((RELAY_BLOCKS, layout.block_bytes(layer)), np.uint8) for layer in range(len(layout.layers))]
    return HostKvPool(layout, rows)


@asynccontextmanager
async def one_rank(layout: KvLayout, rank: int) -> AsyncIterator[RankedEndpoint]:
    """An endpoint that is one rank of a worker like `layout`'s."""
    endpoint = HandoffEndpoint(rank_pool(layout, rank), [TcpTransport()], worker_name="relay", epoch=RELAY_EPOCH)
    await endpoint.start()
    try:
        yield RankedEndpoint([endpoint])
    finally:
        await endpoint.aclose()


async def zeros_into_one_rank(pair: EnginePair, rank: int, token: bytes, tokens: int) -> SendEnd:
    """As a prefill worker with as many ranks as decode has, of which only this one is alive, and its KV is all zero."""
    layout, ranks = pair.decode_engine.layout, pair.decode_info.tp_size
    key, end_token = HandoffKey(token, 1, 1), KvGroups.of(pair.decode_engine.layout).wanted_tokens(tokens)
    ended: asyncio.Future[SendEnd] = asyncio.get_running_loop().create_future()

    def on_event(event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            ended.set_result(event)

    async with one_rank(layout, rank) as sender:
        order = SendOrder(key, pair.addresses("tcp"), DECODE_EPOCH, pair.decode_info.fingerprint, end_token, 10.0)
        sender.open(order, on_event, decode_ranks=ranks)
        blocks = tuple(range(-(-end_token // BLOCK_TOKENS)))
        sender.announce(key, Chunk(0, end_token, tuple(GroupBlocks(0, blocks) for _ in layout.groups)))
        sender.layers_ready(key, range(len(layout.layers)))
        return await ended
