"""The official `openai` client, unmodified, against a pool of simulators; and the examples, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from pool import Pool

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    try:
        built.router(policy=f"{EXAMPLES / 'prefix_affinity.py'}:PrefixAffinity")
        built.worker("prefill")
        built.worker("decode", sim_itl_ms=1)
        built.wait_workers(prefill=1, decode=1)
        yield built
    finally:
        built.stop()


@pytest.fixture(scope="module")
def client(pool: Pool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{pool.base_url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client: openai.OpenAI, **more: object):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, world"}]
    return client.chat.completions.create(
        **{"model": "test-model", "messages": messages, "max_tokens": 12, "temperature": 0, **more}
    )


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["test-model"]
    assert client.models.retrieve("test-model").owned_by == "hocket"


def test_chat_streams_what_it_says_whole(client: openai.OpenAI):
    whole = chat(client)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stream=True))
    assert streamed == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12


def test_several_choices_with_log_probabilities(client: openai.OpenAI):
    answer = chat(client, n=2, logprobs=True, top_logprobs=3, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content != answer.choices[1].message.content
    for choice in answer.choices:
        assert len(choice.logprobs.content) == 12
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_completions_of_several_prompts(client: openai.OpenAI):
    answer = client.completions.create(
        model="test-model", prompt=["one", "two"], max_tokens=6, temperature=0, echo=True, n=2
    )
    assert [choice.text[:3] for choice in answer.choices] == ["one", "one", "two", "two"]
    stream = client.completions.create(model="test-model", prompt="one", max_tokens=6, temperature=0, stream=True)
    assert "one" + "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI):
    text = chat(client).choices[0].message.content
    stop = text[len(text) // 2 : len(text) // 2 + 4]
    cut = chat(client, stop=[stop])
    assert cut.choices[0].message.content == text.partition(stop)[0]
    assert cut.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chat(client, stop=stop, stream=True))
    assert streamed == text.partition(stop)[0]


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        chat(client, model="other")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        chat(client, max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"


def test_the_streaming_example_runs_as_a_user_runs_it(pool: Pool):
    done = subprocess.run(
        [
            sys.executable,
            str(EXAMPLES / "streaming_chat.py"),
            "Hello",
            "--base-url",
            f"{pool.base_url}/v1",
            "--max-tokens",
            "6",
        ],
        env={**os.environ, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "6 of the answer]" in done.stdout
