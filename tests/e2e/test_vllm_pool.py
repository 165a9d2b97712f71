"""The main job through HTTP: a pool with real vLLM engines says what a plain vLLM says, token by token."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
from pool import Pool
from tokenizers import Tokenizer

LENGTHS = (5, 31, 32, 33, 127, 128, 129, 700, 1500)
OUTPUT_TOKENS = 16
AT_ONCE = 8
GREEDY: dict[str, object] = {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS}
SEEDED: dict[str, object] = {"temperature": 0.8, "seed": 7, "max_tokens": OUTPUT_TOKENS}
LOGPROB_TOLERANCE = 5e-4  # of fp32: the prefix was computed in other batches

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Case:
    """One request and what a plain vLLM answered to it."""

    prompt: list[int]
    sampling: dict[str, object]
    tokens: list[int]
    logprobs: list[float]


def random_prompt(tokens: int, variant: int = 0) -> list[int]:
    source = random.Random(f"{tokens} {variant}")
    return [source.randrange(100, 40_000) for _ in range(tokens)]


@pytest.fixture(scope="module")
def cases(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Every case of this file in one run of a plain vLLM, in a process of its own."""
    requests = [{"prompt": random_prompt(tokens), "sampling": GREEDY} for tokens in LENGTHS]
    requests += [{"prompt": random_prompt(tokens, 1), "sampling": SEEDED} for tokens in (33, 700)]
    # Others for the concurrent test: what the decode worker has cached by then it would compute without any hand-off.
    requests += [{"prompt": random_prompt(tokens, 2), "sampling": GREEDY} for tokens in LENGTHS[:AT_ONCE]]
    written = tmp_path_factory.mktemp("plain") / "answers.json"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_vllm.py")), str(written)],
        input=json.dumps({"model": str(demo_model), "requests": requests}),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(written.read_text())
    return [
        Case(request["prompt"], request["sampling"], **answer)
        for request, answer in zip(requests, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def pool(nats_url: str, demo_model: Path, cases: list[Case]) -> Iterator[Pool]:
    """One vLLM engine of each kind; started after the plain one has gone."""
    built = Pool(nats_url, demo_model, engine="vllm")
    try:
        built.router()
        options = {"max_model_len": 2048, "chunk_tokens": 256, "kv_gib": 0.5}
        cores = sorted(os.sched_getaffinity(0))
        workers = [
            built.start_worker(role, **options, cpu_cores=core, metrics_port=0)
            for role, core in (("prefill", cores[0]), ("decode", cores[-1]))
        ]
        for worker in workers:
            worker.wait_ready()
        built.wait_workers(prefill=1, decode=1)
        yield built
    finally:
        built.stop()


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


async def ask(client: httpx.AsyncClient, case: Case) -> dict[str, object]:
    body = {"model": "test-model", "prompt": case.prompt, **case.sampling, "logprobs": 2, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-hocket-plan"] == "remote"
    return response.json()


def check(answer: dict[str, object], case: Case, tokenizer: Tokenizer) -> None:
    [choice] = answer["choices"]  # type: ignore[misc]  # JSON.
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in case.tokens]
    assert choice["logprobs"]["tokens"] == words
    assert choice["text"] == tokenizer.decode(case.tokens)
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(case.logprobs, abs=LOGPROB_TOLERANCE)
    assert answer["usage"]["completion_tokens"] == OUTPUT_TOKENS  # type: ignore[index]  # JSON.
    assert answer["usage"]["prompt_tokens"] == len(case.prompt)  # type: ignore[index]  # JSON.


def client_of(pool: Pool) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=pool.base_url, timeout=240, trust_env=False)


async def test_every_answer_equals_a_plain_vllm_one_by_one(pool: Pool, cases: list[Case], tokenizer: Tokenizer):
    async with client_of(pool) as client:
        for case in cases[:-AT_ONCE]:
            check(await ask(client, case), case, tokenizer)


async def test_every_answer_equals_a_plain_vllm_eight_at_once(pool: Pool, cases: list[Case], tokenizer: Tokenizer):
    async with client_of(pool) as client, asyncio.TaskGroup() as tasks:
        answers = [(case, tasks.create_task(ask(client, case))) for case in cases[-AT_ONCE:]]
    assert len(answers) == AT_ONCE
    for case, answer in answers:
        check(answer.result(), case, tokenizer)


def test_the_openai_client_streams_chat_and_completions(pool: Pool):
    client = openai.OpenAI(base_url=f"{pool.base_url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    whole = client.chat.completions.create(model="test-model", messages=messages, max_tokens=24, temperature=0)
    stream = client.chat.completions.create(
        model="test-model",
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert re.search(r"sky|blue|light", text)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == whole.usage
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = client.completions.create(
        model="test-model", prompt="The capital of France is", max_tokens=8, temperature=0, stream=True
    )
    assert "Paris" in "".join(piece.choices[0].text for piece in pieces)


async def test_stop_strings_and_eos_end_an_answer(pool: Pool):
    chat = {"model": "test-model", "temperature": 0, "messages": [{"role": "user", "content": "Say hello."}]}
    async with client_of(pool) as client:
        free = (await client.post("/v1/chat/completions", json={**chat, "max_tokens": 200})).json()["choices"][0]
        assert free["finish_reason"] == "stop"  # Its own end of turn.
        assert "<|im_end|>" not in free["message"]["content"]
        word = free["message"]["content"].split()[1]
        cut = (await client.post("/v1/chat/completions", json={**chat, "max_tokens": 200, "stop": [word]})).json()
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["choices"][0]["message"]["content"] == free["message"]["content"].partition(word)[0]
