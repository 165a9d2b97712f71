"""Prefill and decode engines of other shapes: block sizes, tensor parallelism, replicated heads; over every link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from workers_rig import LAYERS, VOCABULARY, prompt_of, sim_config

from hocket.bus.messages import SamplingParams
from hocket.transport import Extent, HandoffKey
from hocket.workers.engines.base import DecodeTask, EngineInfo, EngineLoad, PrefillTask, StepOutput
from hocket.workers.engines.sim.engine import SimEngine
from hocket.workers.engines.sim.kv import expected_tokens

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
EPOCH = 7


class Shapes:
    """A prefill and a decode simulator that differ in shape."""

    def __init__(self, prefill: SimEngine, decode: SimEngine, infos: tuple[EngineInfo, EngineInfo], heads: int) -> None:
        self.prefill, self.decode, self.infos, self.heads = prefill, decode, infos, heads

    async def answer(self, prompt: list[int], token: bytes) -> list[int]:
        made: list[StepOutput] = []
        prefill, decode = self.infos
        job = DecodeTask(token.hex(), 1, prompt, GREEDY, token, 5.0, prefill_ranks=prefill.tp_size)
        key = HandoffKey(token, 1, 1)
        task = PrefillTask(
            token.hex(), key, prompt, decode.handoff_addresses, EPOCH, decode.fingerprint, 5.0, decode.tp_size
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.decode.decode(job, made.append))
            tasks.create_task(self.prefill.prefill(task))
        assert made[0].computed_tokens == 1, "the KV did not come over the link"
        return [token_id for output in made for token_id in output.token_ids]

    def right(self, prompt: list[int]) -> list[int]:
        return expected_tokens(prompt, GREEDY, planes=LAYERS * self.heads, vocabulary=VOCABULARY)

    async def settled(self) -> None:
        async with asyncio.timeout(3):
            for engine in (self.prefill, self.decode):
                while engine.load() != EngineLoad(0, 0, engine.kv.blocks) or engine.endpoint.stats.receiving:
                    await asyncio.sleep(0.01)


MakeShapes = Callable[..., Awaitable[Shapes]]


@pytest_asyncio.fixture
async def make_shapes() -> AsyncIterator[MakeShapes]:
    engines: list[SimEngine] = []

    async def make(
        scheme: str, *, heads: int, ranks: tuple[int, int] = (1, 1), block_tokens: tuple[int, int] = (8, 8)
    ) -> Shapes:
        infos = []
        for role, tp, tokens in zip(("prefill", "decode"), ranks, block_tokens, strict=True):
            config = sim_config(role, transports=scheme, tp=tp, block_tokens=tokens, sim_heads=heads, kv_blocks=512)
            engines.append(SimEngine(config, worker_id=role, epoch=EPOCH))
            infos.append(await engines[-1].start())
        return Shapes(engines[-2], engines[-1], (infos[0], infos[1]), heads)

    yield make
    for engine in reversed(engines):
        await engine.aclose()


@pytest.fixture(params=["inproc", "tcp", "ucx"])
def scheme(request: pytest.FixtureRequest) -> str:
    if request.param == "ucx":
        pytest.importorskip("ucxx")
    return str(request.param)


@pytest.mark.parametrize(
    ("heads", "ranks"),
    [
        (4, (1, 2)),
        (4, (2, 1)),
        (4, (2, 4)),
        (4, (4, 2)),
        (2, (2, 4)),
        (2, (4, 1)),
        (1, (2, 4)),
        (1, (4, 2)),
        (2, (2, 2)),
    ],
)
async def test_any_two_tensor_parallel_sizes_understand_each_other(
    make_shapes: MakeShapes, scheme: str, heads: int, ranks: tuple[int, int]
) -> None:
    shapes = await make_shapes(scheme, heads=heads, ranks=ranks)
    assert shapes.infos[0].fingerprint == shapes.infos[1].fingerprint
    for length in (1, 7, 8, 9, 150):
        prompt = prompt_of(length, length)
        assert await shapes.answer(prompt, length.to_bytes(16, "big")) == shapes.right(prompt)
    await shapes.settled()


@pytest.mark.parametrize("block_tokens", [(8, 16), (16, 8), (8, 12), (5, 7)])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (1, 2)])
async def test_block_sizes_may_differ(
    make_shapes: MakeShapes, scheme: str, block_tokens: tuple[int, int], ranks: tuple[int, int]
) -> None:
    shapes = await make_shapes(scheme, heads=2, ranks=ranks, block_tokens=block_tokens)
    for length in (1, 7, 8, 12, 16, 17, 150):
        prompt = prompt_of(length, length)
        assert await shapes.answer(prompt, length.to_bytes(16, "big")) == shapes.right(prompt)
    longer = prompt_of(150, 150)[:100] + prompt_of(40, 3)  # Both sides have a part of it, of their own length.
    assert await shapes.answer(longer, b"l" * 16) == shapes.right(longer)
    await shapes.settled()


async def test_a_wrong_byte_in_any_rank_shows(make_shapes: MakeShapes) -> None:
    for rank in range(2):
        shapes = await make_shapes("inproc", heads=1, ranks=(1, 2))
        prompt = prompt_of(40, 1)
        assert await shapes.answer(prompt, b"a" * 16) == shapes.right(prompt)
        pool = shapes.decode.kv.pools[rank]
        for block in range(pool.blocks):
            pool.buffers([Extent(1, (block,))])[0][3] ^= 1
        assert await shapes.answer([*prompt, 5], b"b" * 16) != shapes.right([*prompt, 5]), "its first blocks are reused"
