"""Answers as clients see them: through httpx and the openai client, streamed and whole."""

from __future__ import annotations

import json

import pytest

from hocket.bus.messages import FINISH_STOP, EntryDetail, SamplingParams, TokenLogprob, unpack_tokens

WIDE = 'naïve café 世界 🎉 👩‍👩‍👧‍👦 "quoted" \\ \n done'


def events(body: str) -> list[object]:
    """The JSON of each server-sent event but the last, which must be [DONE]."""
    lines = [line for line in body.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


async def test_a_chat_is_streamed_to_the_openai_client(serve, says) -> None:
    api = await serve(await says(WIDE))
    stream = await api.openai.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == WIDE
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


async def test_a_whole_chat_has_its_text_usage_and_headers(serve, says) -> None:
    api = await serve(await says(WIDE))
    answer = await api.chat()
    body = answer.json()
    ids = await says.ids(WIDE)
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": WIDE, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    [generation] = api.core.generations.values()
    assert body["usage"] == {
        "prompt_tokens": generation.prompt_tokens,
        "completion_tokens": len(ids) + 1,  # The stop token counts, as in vLLM.
        "total_tokens": generation.prompt_tokens + len(ids) + 1,
    }
    assert answer.headers["x-request-id"] == generation.request_id
    assert body["id"] == f"chatcmpl-{generation.request_id}"
    assert answer.headers["x-hocket-plan"] == "remote"
    assert answer.headers["x-hocket-decode-worker"] == "decode-1-abc"


async def test_a_completion_works_both_ways_with_the_openai_client(serve, says) -> None:
    api = await serve(await says(WIDE))
    whole = await api.openai.completions.create(model="tiny", prompt="hello", max_tokens=100)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (WIDE, "stop")
    stream = await api.openai.completions.create(model="tiny", prompt="hello", max_tokens=100, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == WIDE
    assert {chunk.object for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_answer_that_reaches_max_tokens_ends_with_length(serve, says, is_streamed) -> None:
    api = await serve(await says("the quick brown fox jumps over the lazy dog"))
    answer = await api.chat(max_tokens=3, stream=is_streamed)
    last = events(answer.text)[-1] if is_streamed else answer.json()
    assert last["choices"][0]["finish_reason"] == "length"
    assert list(api.core.ended.values()) == [(2, 3)]


async def test_the_usage_chunk_comes_last_and_only_when_asked_for(serve, says) -> None:
    api = await serve(await says("hello world"))
    plain = events((await api.chat(stream=True)).text)
    assert all("usage" not in event and event["choices"] for event in plain)
    dressed = events((await api.chat(stream=True, stream_options={"include_usage": True})).text)
    assert [event["choices"] for event in dressed[-1:]] == [[]]
    assert dressed[-1]["usage"]["completion_tokens"] == len(await says.ids("hello world")) + 1
    assert all(event["usage"] is None for event in dressed[:-1])


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_n_choices_are_generations_with_seeds_of_their_own(serve, says, is_streamed) -> None:
    api = await serve(await says("hello", "world", "fox"))
    answer = await api.chat(n=3, seed=7, stream=is_streamed)
    assert sorted(generation.sampling.seed for generation in api.core.generations.values()) == [7, 8, 9]
    assert len({generation.request_id for generation in api.core.generations.values()}) == 3
    if is_streamed:
        texts = {0: "", 1: "", 2: ""}
        for event in events(answer.text):
            [choice] = event["choices"]
            texts[choice["index"]] += choice["delta"]["content"]
    else:
        texts = {choice["index"]: choice["message"]["content"] for choice in answer.json()["choices"]}
    assert texts == {0: "hello", 1: "world", 2: "fox"}


async def test_several_prompts_give_choices_in_their_order(serve, says) -> None:
    api = await serve(await says("a", "b", "c", "d"))
    answer = (await api.complete(prompt=["the", "quick"], n=2, seed=1)).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (3, "d"),
    ]
    generations = list(api.core.generations.values())
    assert [generation.sampling.seed for generation in generations] == [1, 2, 1, 2]
    assert answer["usage"]["prompt_tokens"] == generations[0].prompt_tokens + generations[2].prompt_tokens


async def test_prompts_can_be_token_ids(serve, says) -> None:
    api = await serve(await says("a"))
    assert (await api.complete(prompt=[5, 6, 7])).status_code == 200
    assert (await api.complete(prompt=[[5, 6], [7]])).status_code == 200
    assert [generation.prompt_tokens for generation in api.core.generations.values()] == [3, 2, 1]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_echo_puts_the_prompt_before_the_answer(serve, says, is_streamed) -> None:
    api = await serve(await says(" world"))
    answer = await api.complete(prompt="hello", echo=True, stream=is_streamed)
    bodies = events(answer.text) if is_streamed else [answer.json()]
    assert "".join(body["choices"][0]["text"] for body in bodies) == "hello world"


@pytest.mark.parametrize("step_tokens", [1, 2, 5])
@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_stop_string_across_tokens_ends_the_answer_before_it(
    serve, says, text, is_streamed, step_tokens
) -> None:
    answer_text = "the quick brown fox jumps over"
    api = await serve(await says(answer_text, step_tokens=step_tokens))
    answer = await api.chat(stop=["ck bro", "zzz"], stream=is_streamed)
    if is_streamed:
        chunks = events(answer.text)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "the qui"
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        tokens = next(iter({**api.core.stopped, **{k: v for k, (_, v) in api.core.ended.items()}}.values()))
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "the qui"
        tokens = answer.json()["usage"]["completion_tokens"]
    ids = await says.ids(answer_text)
    needed = next(n for n in range(len(ids)) if "ck bro" in text.decode(ids[:n]))
    assert tokens == needed  # Tokens after the one that completed the stop string are not counted.


async def test_text_held_back_for_a_stop_string_is_shown_at_the_end(serve, says) -> None:
    api = await serve(await says("hello wor"))
    assert (await api.chat(stop="world")).json()["choices"][0]["message"]["content"] == "hello wor"


async def test_a_stop_string_before_min_tokens_is_ordinary_text(serve, says) -> None:
    ids = await says.ids("the fox the fox the fox")
    api = await serve(await says("the fox the fox the fox"))
    answer = (await api.chat(stop="fox", min_tokens=len(ids) - 1)).json()
    assert answer["choices"][0]["message"]["content"] == "the fox the fox the "


@pytest.fixture
def with_logprobs(step):
    """A script whose every token has a log probability of -0.5 and two likely tokens."""

    def make(ids: list[int], eos: int):
        def script(generation, stream_id):
            made = [
                step([i], detail=EntryDetail(logprobs=(TokenLogprob(-0.5, ((i, -0.5), (5, float("-inf")))),)))
                for i in ids
            ]
            end = EntryDetail(stop_token=eos, logprobs=(TokenLogprob(-0.1),))
            return [*made, step([eos], finish=FINISH_STOP, detail=end)]

        return script

    return make


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_chat_logprobs_have_a_token_its_bytes_and_the_likely_ones(
    serve, says, with_logprobs, is_streamed
) -> None:
    ids = await says.ids("fox é")
    api = await serve(with_logprobs(ids, says.eos))
    answer = await api.chat(logprobs=True, top_logprobs=2, stream=is_streamed)
    bodies = events(answer.text) if is_streamed else [answer.json()]
    content = [entry for body in bodies for entry in (body["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "fox é"
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    assert next(iter(api.core.generations.values())).sampling.logprobs == 2


async def test_completion_logprobs_have_the_old_shape(serve, says, with_logprobs) -> None:
    ids = await says.ids("the fox")
    api = await serve(with_logprobs(ids, says.eos))
    whole = (await api.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    chunks = events((await api.complete(logprobs=2, stream=True)).text)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {key: [item for part in parts for item in part[key]] for key in whole} == whole
    assert "".join(whole["tokens"]) == "the fox"
    assert whole["text_offset"] == [len("".join(whole["tokens"][:n])) for n in range(len(ids))]
    assert whole["token_logprobs"] == [-0.5] * len(ids)
    assert all(top[token] == -0.5 for token, top in zip(whole["tokens"], whole["top_logprobs"], strict=True))


async def test_the_client_gets_the_ids_that_the_tokenizer_says(serve, says, text) -> None:
    api = await serve(await says("a"))
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "you"}]},
    ]
    await api.chat(messages=messages)
    [generation] = api.core.generations.values()
    rendered = "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi\nyou<|im_end|>\n<|im_start|>assistant\n"
    assert unpack_tokens(generation.packed_tokens) == (await text.encode([rendered], add_special_tokens=False))[0]


async def test_sampling_reaches_the_core_as_it_was_given(serve, says) -> None:
    api = await serve(await says("a"))
    await api.chat(temperature=0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5, presence_penalty=-1, max_tokens=9,
                   frequency_penalty=2, logit_bias={"7": -100}, min_tokens=4, stop_token_ids=[3], seed=-5)  # fmt: skip
    [generation] = api.core.generations.values()
    assert generation.sampling == SamplingParams(
        max_tokens=9, temperature=0.0, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5, presence_penalty=-1.0,
        frequency_penalty=2.0, logit_bias={7: -100.0}, min_tokens=4, stop_token_ids=(3, says.eos), seed=-5,
    )  # fmt: skip


async def test_without_max_tokens_a_chat_may_fill_the_context_and_a_completion_gets_16(serve, says) -> None:
    api = await serve(await says("a"))
    await api.chat()
    await api.complete()
    chat, completion = api.core.generations.values()
    assert chat.sampling.max_tokens == 200 - chat.prompt_tokens  # The worker's limit is below the model's.
    assert completion.sampling.max_tokens == 16
