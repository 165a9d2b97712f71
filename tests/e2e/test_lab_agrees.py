"""The lab against real processes: the same small workload, the same choices, and waits that differ by less than a tenth."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec
import pytest
from pool import Pool

from hocket.lab.measure import ttft_s
from hocket.lab.replay import Replay
from hocket.lab.scenario import Engine, Scenario
from hocket.lab.timing import Coefficients, Profile
from hocket.lab.traces import Span, Trace, Turn, own_id
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

BLOCK, SLOTS, KV_BLOCKS, CHUNK = 32, 8, 400, 512
PREFILL_MS, ITL_MS, OUTPUT = 1.0, 10.0, 12
PREFIX, OWN = 512, 160


@dataclass(frozen=True)
class Ask:
    """When it comes, and which of two conversations it goes on with."""

    at_s: float
    topic: int


# Two topics find their workers; later turns follow their prefix, one of them past a queue and one where it is too long.
ASKS = [
    Ask(0.0, 1),
    Ask(0.15, 2),
    Ask(2.0, 1),
    Ask(2.1, 2),
    Ask(3.0, 2),
    Ask(3.05, 1),
    Ask(4.0, 1),
    Ask(4.05, 1),
    Ask(5.5, 2),
]


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    yield built
    built.stop()


def simulated(tmp_path: Path) -> tuple[list[str], list[float]]:
    """Who got each request, and how long it waited, in the lab; the profile is the simulated engine's timing."""
    costs = Coefficients(0.0, PREFILL_MS * 1e3, 0.0, 0.0, 0.0, decode_step_us=ITL_MS * 1e3)
    sizes = {"kv_bytes_per_token": 128, "kv_tokens": KV_BLOCKS * BLOCK, "layers": 4, "hidden": 1, "weight_bytes": 0}
    profile = tmp_path / "sim.json"
    profile.write_bytes(msgspec.json.encode(Profile(name="sim", gpus=1, coefficients=costs, **sizes)))
    turns = []
    for number, ask in enumerate(ASKS):
        spans = (Span(0, 1 << 62, (own_id(1, ask.topic),)), Span(PREFIX, 1 << 62, (own_id(2, number),)))
        turns.append(Turn(ask.at_s, PREFIX + OWN, OUTPUT, spans, own_id(3, number)))
    engine = Engine(
        profile=str(profile), block_tokens=BLOCK, kv_blocks=KV_BLOCKS, slots=SLOTS, max_batched_tokens=CHUNK
    )
    replayed = Replay(Trace("small", tuple(turns)), Scenario(decode=2, policy="kv", engine=engine)).run()
    workers = [request.worker.worker_id for request in replayed.requests if request.worker is not None]
    return workers, [ttft_s(request) for request in replayed.requests]


async def measured(pool: Pool) -> tuple[list[str], list[float]]:
    """The same in real processes."""
    rng, vocabulary = random.Random(5), sim_vocabulary(str(pool.model), 32000)
    topics = {topic: rng.choices(vocabulary, k=PREFIX) for topic in (1, 2)}
    prompts = [topics[ask.topic] + rng.choices(vocabulary, k=OWN) for ask in ASKS]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=pool.base_url, timeout=60, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(client.get("/ready") for _ in ASKS))  # Connections, before the clock starts.
        begin_s = time.monotonic()
        tasks = [
            asyncio.create_task(ask_one(client, prompt, begin_s + a.at_s))
            for prompt, a in zip(prompts, ASKS, strict=True)
        ]
        found = [await task for task in tasks]
    return [worker for worker, _ in found], [wait_s for _, wait_s in found]


async def ask_one(client: httpx.AsyncClient, prompt: list[int], at_s: float) -> tuple[str, float]:
    await asyncio.sleep(at_s - time.monotonic())
    body = {"model": "test-model", "prompt": prompt, "max_tokens": OUTPUT, "temperature": 0, "stream": True}
    begin_s = time.monotonic()
    first_s = None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and first_s is None:
                first_s = time.monotonic()
    assert first_s is not None
    return response.headers["x-hocket-decode-worker"], first_s - begin_s


def relabelled(workers: Sequence[str]) -> list[int]:
    """Which of two idle workers gets the very first request is left to chance: 0 is whoever did."""
    order = list(dict.fromkeys(workers))
    return [order.index(worker) for worker in workers]


def test_the_lab_chooses_and_waits_like_real_processes(pool: Pool, tmp_path: Path):
    timing = {"sim_prefill_ms_per_token": PREFILL_MS, "sim_itl_ms": ITL_MS}
    sizes = {"block_tokens": BLOCK, "kv_blocks": KV_BLOCKS, "slots": SLOTS, "chunk_tokens": CHUNK}
    pool.worker("decode", **timing, **sizes)
    pool.worker("decode", **timing, **sizes)
    pool.router(policy="kv")
    pool.wait_workers(prefill=0, decode=2)
    lab_workers, lab_waits = simulated(tmp_path)
    real_workers, real_waits = asyncio.run(measured(pool))
    assert relabelled(real_workers) == relabelled(lab_workers)
    assert len(set(lab_workers)) == 2
    assert real_waits == pytest.approx(lab_waits, rel=0.1)
