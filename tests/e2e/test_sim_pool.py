"""A pool of real processes with the verifying simulator: every answer is right, whatever dies."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pool import Pool
from tokenizers import Tokenizer

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.sim.kv import expected_tokens
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

LAYERS = 4
SLOW = {"sim_prefill_ms_per_token": 2.0, "chunk_tokens": 64}


class Reference:
    """What the pool must answer, from the prompt alone."""

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._vocabulary = sim_vocabulary(str(model), 32000)

    def prompt(self, rng: random.Random, tokens: int) -> list[int]:
        return [rng.choice(self._vocabulary) for _ in range(tokens)]

    def text(self, prompt: list[int], *, max_tokens: int, seed: int | None = None, temperature: float = 0.0) -> str:
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        tokens = expected_tokens(prompt, sampling, planes=LAYERS, vocabulary=self._vocabulary)
        return self._tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def reference(demo_model: Path) -> Reference:
    return Reference(demo_model)


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    yield built
    built.stop()


def body(prompt: list[int], max_tokens: int, **more: object) -> dict[str, object]:
    return {"model": "test-model", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}


async def complete(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> tuple[str, str]:
    """The text of a completion and the plan it was made by."""
    response = await client.post("/v1/completions", json=body(prompt, max_tokens))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"], response.headers["x-hocket-plan"]


def client_of(pool: Pool) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=pool.base_url, timeout=60, limits=limits, trust_env=False)


async def check_many(pool: Pool, reference: Reference, *, requests: int, at_once: int, seed: int) -> None:
    rng = random.Random(seed)
    shared = reference.prompt(rng, 96)
    prompts = [
        shared[: rng.choice([0, 32, 64, 96])] + reference.prompt(rng, rng.randint(1, 300)) for _ in range(requests)
    ]
    gate = asyncio.Semaphore(at_once)

    async with client_of(pool) as client:

        async def one(prompt: list[int]) -> None:
            async with gate:
                text, plan = await complete(client, prompt, 16)
            assert plan == "remote"
            assert text == reference.text(prompt, max_tokens=16)

        async with asyncio.TaskGroup() as tasks:
            for prompt in prompts:
                tasks.create_task(one(prompt))


@pytest.mark.parametrize("transports", ["ucx,tcp", "tcp"])
async def test_a_thousand_requests_64_at_once_are_all_right(pool: Pool, reference: Reference, transports: str):
    requests = 1000 if transports == "ucx,tcp" else 200
    pool.router()
    for role in ("prefill", "decode"):
        pool.worker(role, slots=64, kv_blocks=4000, sim_itl_ms=2, transports=transports)
    pool.wait_workers(prefill=1, decode=1)
    await check_many(pool, reference, requests=requests, at_once=64, seed=1)
    assert pool.metric("hocket_requests_total", outcome="finished", plan="remote") == requests


async def test_two_of_each_are_as_right_as_one(pool: Pool, reference: Reference):
    pool.router(policy="least_loaded")
    for _ in range(2):
        pool.worker("prefill", slots=16)
        pool.worker("decode", slots=32, kv_blocks=4000, sim_itl_ms=2)
    pool.wait_workers(prefill=2, decode=2)
    await check_many(pool, reference, requests=200, at_once=32, seed=2)


async def test_a_prefill_worker_killed_mid_prompt_costs_no_answer(pool: Pool, reference: Reference):
    pool.router()
    pool.worker("decode", sim_itl_ms=2)
    first = pool.worker("prefill", **SLOW)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(3), 600)  # 1.2 s of prefill
    async with client_of(pool) as client:
        answer = asyncio.create_task(complete(client, prompt, 16))
        await asyncio.sleep(0.6)  # The middle of the prompt: what is killed must be at work.
        second = pool.start_worker("prefill", **SLOW)
        first.kill()
        second.wait_ready()
        text, plan = await asyncio.wait_for(answer, 20)
    assert (text, plan) == (reference.text(prompt, max_tokens=16), "remote")


async def test_the_only_prefill_worker_killed_mid_prompt_costs_no_answer(pool: Pool, reference: Reference):
    pool.router()
    pool.worker("decode", sim_itl_ms=2)
    prefill = pool.worker("prefill", **SLOW)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(4), 600)
    async with client_of(pool) as client:
        answer = asyncio.create_task(complete(client, prompt, 16))
        await asyncio.sleep(0.6)
        prefill.kill()
        text, _ = await asyncio.wait_for(answer, 20)
        assert text == reference.text(prompt, max_tokens=16)
        text, plan = await complete(client, prompt[::-1], 4)
    assert (text, plan) == (reference.text(prompt[::-1], max_tokens=4), "local")


async def test_a_stopped_prefill_worker_is_replaced_and_its_late_writes_change_nothing(
    pool: Pool, reference: Reference
):
    pool.router()
    pool.worker("decode", sim_itl_ms=2)
    first = pool.worker("prefill", **SLOW)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(5), 600)
    async with client_of(pool) as client:
        answer = asyncio.create_task(complete(client, prompt, 64))
        await asyncio.sleep(0.6)
        first.kill(signal.SIGSTOP)
        pool.worker("prefill", **SLOW)
        try:
            text, _ = await asyncio.wait_for(answer, 30)
        finally:
            first.kill(signal.SIGCONT)
        assert text == reference.text(prompt, max_tokens=64)
        await check_many(pool, reference, requests=20, at_once=8, seed=6)


async def test_the_only_decode_worker_killed_mid_stream_ends_it_with_an_error_in_four_seconds(
    pool: Pool, reference: Reference
):
    pool.router()
    pool.worker("prefill")
    decode = pool.worker("decode", sim_itl_ms=20)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(7), 50)
    events: list[str] = []
    killed_at = 0.0
    async with (
        client_of(pool) as client,
        client.stream("POST", "/v1/completions", json=body(prompt, 2000, stream=True)) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line[6:])
            if len(events) == 5 and not killed_at:
                killed_at = time.monotonic()
                decode.kill()
    assert time.monotonic() - killed_at < 4.0
    assert events[-1] == "[DONE]"
    error = json.loads(events[-2])["error"]
    assert error["code"] == "decode_worker_lost"
    assert set(error) >= {"message", "type", "param", "code"}
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2])
    assert reference.text(prompt, max_tokens=2000).startswith(text.rstrip("\ufffd"))
    async with client_of(pool) as client:
        response = await client.post("/v1/completions", json=body(prompt, 4))
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_worker"
    assert int(response.headers["retry-after"]) >= 1


async def test_a_decode_worker_killed_before_the_first_token_is_replaced(pool: Pool, reference: Reference):
    pool.router(policy="round_robin")
    pool.worker("prefill", **SLOW)
    first, second = pool.worker("decode"), pool.worker("decode")
    pool.wait_workers(prefill=1, decode=2)
    prompt = reference.prompt(random.Random(8), 600)
    async with client_of(pool) as client:
        request = client.build_request("POST", "/v1/completions", json=body(prompt, 16, stream=True))
        response = await client.send(request, stream=True)
        holder = pool.names[response.headers["x-hocket-decode-worker"]]
        assert holder in (first, second)
        holder.kill()
        lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
        await response.aclose()
    text = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    assert text == reference.text(prompt, max_tokens=16)


async def test_without_workers_every_request_gets_503_at_once(pool: Pool, reference: Reference):
    pool.router()
    async with client_of(pool) as client:
        started = time.monotonic()
        response = await client.post("/v1/completions", json=body([1, 2, 3], 4))
        ready = await client.get("/ready")
    assert time.monotonic() - started < 2
    assert (response.status_code, ready.status_code) == (503, 503)
    assert "retry-after" in response.headers


async def test_a_full_pool_answers_429_and_recovers(pool: Pool, reference: Reference):
    pool.router()
    pool.worker("prefill")
    pool.worker("decode", slots=1, sim_itl_ms=20)
    pool.wait_workers(prefill=1, decode=1)
    rng = random.Random(9)
    async with client_of(pool) as client:
        prompts = [reference.prompt(rng, 20) for _ in range(12)]
        responses = [asyncio.create_task(client.post("/v1/completions", json=body(p, 50))) for p in prompts]
        answers = [await response for response in responses]
        codes = sorted({answer.status_code for answer in answers})
        assert codes == [200, 429]
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer.status_code == 200:
                assert answer.json()["choices"][0]["text"] == reference.text(prompt, max_tokens=50)
            else:
                assert int(answer.headers["retry-after"]) >= 1
        text, _ = await complete(client, prompts[0], 8)
    assert text == reference.text(prompts[0], max_tokens=8)


async def test_a_client_that_leaves_gives_its_slot_back(pool: Pool, reference: Reference):
    pool.router()
    pool.worker("prefill")
    pool.worker("decode", slots=1, sim_itl_ms=20)
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(10), 20)
    async with client_of(pool) as client:
        async with client.stream("POST", "/v1/completions", json=body(prompt, 2000, stream=True)) as response:
            async for _ in response.aiter_lines():
                break
        text, _ = await asyncio.wait_for(complete(client, prompt, 8), 5)
    assert text == reference.text(prompt, max_tokens=8)


async def test_seeded_sampling_and_n_choices_are_reproducible(pool: Pool, reference: Reference):
    pool.router()
    pool.worker("prefill")
    pool.worker("decode")
    pool.wait_workers(prefill=1, decode=1)
    prompt = reference.prompt(random.Random(11), 70)
    async with client_of(pool) as client:
        response = await client.post("/v1/completions", json=body(prompt, 16, temperature=0.8, seed=7, n=3))
    texts = [choice["text"] for choice in response.json()["choices"]]
    assert texts == [reference.text(prompt, max_tokens=16, seed=7 + i, temperature=0.8) for i in range(3)]


async def test_the_router_goes_on_after_the_nats_server_restarts(nats_server_of_its_own, demo_model, reference):
    pool = Pool(nats_server_of_its_own.url, demo_model)
    try:
        pool.router()
        pool.worker("prefill")
        pool.worker("decode", sim_itl_ms=20)
        pool.wait_workers(prefill=1, decode=1)
        prompt = reference.prompt(random.Random(12), 40)
        async with client_of(pool) as client:
            running = asyncio.create_task(complete(client, prompt, 100))
            await asyncio.sleep(0.5)
            await nats_server_of_its_own.restart()
            text, _ = await asyncio.wait_for(running, 20)
            assert text == reference.text(prompt, max_tokens=100)
            pool.wait_workers(prefill=1, decode=1)
            text, plan = await complete(client, prompt[::-1], 8)
        assert (text, plan) == (reference.text(prompt[::-1], max_tokens=8), "remote")
    finally:
        pool.stop()
