"""`x-hocket-explain: 1`: the receipt comes with the answer, and no client stumbles over it."""

from __future__ import annotations

import json

from hocket.router.generation import Failure

EXPLAIN = {"x-hocket-explain": "1"}


async def test_a_whole_answer_has_its_receipt_in_a_field_of_ours(serve, says) -> None:
    api = await serve(await says("hello world"))
    answer = await api.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}, headers=EXPLAIN
    )
    [found] = answer.json()["hocket"]["receipts"]
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["attempts"][0]["worker"] == answer.headers["x-hocket-decode-worker"]


async def test_each_choice_has_a_receipt(serve, says) -> None:
    api = await serve(await says("hello world"))
    answer = await api.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "n": 3}, headers=EXPLAIN)
    assert len({found["request_id"] for found in answer.json()["hocket"]["receipts"]}) == 3


async def test_a_stream_has_its_receipt_in_a_comment_before_its_end(serve, says) -> None:
    api = await serve(await says("hello world"))
    answer = await api.http.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}, headers=EXPLAIN
    )
    *_, comment, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]"
    assert comment.startswith(": hocket {")
    [found] = json.loads(comment.removeprefix(": hocket "))["receipts"]
    assert found["request_id"] == answer.headers["x-request-id"]


async def test_a_stream_that_fails_has_it_too(serve) -> None:
    api = await serve()
    async with api.http.stream(
        "POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}, headers=EXPLAIN
    ) as answer:
        [stream_id] = api.core.generations
        api.core.send(stream_id, [70])
        lines = answer.aiter_lines()
        first = await anext(lines)
        api.path.fail(stream_id, Failure("decode_worker_lost", "gone", is_retryable=True))
        rest = [line async for line in lines if line]
    assert first.startswith("data: {")
    assert [line[:10] for line in rest] == [": hocket {", 'data: {"er', "data: [DON"]


async def test_the_openai_client_reads_explained_answers_like_any_other(serve, says) -> None:
    api = await serve(await says("hello world"))
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "extra_headers": EXPLAIN}
    whole = await api.openai.chat.completions.create(**asked)
    assert whole.model_extra["hocket"]["receipts"][0]["request_id"] == whole.id.removeprefix("chatcmpl-")
    stream = await api.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens > 0
    completion = await api.openai.completions.create(model="tiny", prompt="a", stream=True, extra_headers=EXPLAIN)
    assert [chunk.choices[0].finish_reason async for chunk in completion][-1] is not None


async def test_nobody_is_told_who_did_not_ask_or_may_not(serve, says) -> None:
    closed = await serve(await says("hi"), explains_to_clients=False)
    for api, headers in ((closed, EXPLAIN), (closed, {})):
        body = {"model": "tiny", "prompt": "a"}
        assert "hocket" not in (await api.http.post("/v1/completions", json=body, headers=headers)).json()
    asked = await serve(await says("hi"))
    assert "hocket" not in (await asked.complete()).json()
    assert not any(generation.explains for generation in asked.core.generations.values())
