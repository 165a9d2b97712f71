"""Every bad request is refused with a 4xx in OpenAI's shape that names the parameter; none hangs, none is a 500."""

from __future__ import annotations

import json

import pytest

from hocket.router.generation import NoWorker, Overloaded, Rejected

HUGE = "9" * 400
WRONG = {
    "int": ["true", '"1"', "1.5", "[]", "{}", HUGE, "-" + HUGE, "NaN", "1e400"],
    "number": ["true", '"1"', "[]", "{}", "NaN", "Infinity", "-Infinity", "1e999", HUGE],
    "bool": ["1", "0", '"true"', "[]", "{}"],
    "text": ["1", "true", "[]", "{}", '"\\ud800"', '"' + "x" * 257 + '"'],
}
# Field: (kind, values out of range).
COMMON = {
    "model": ("text", ['""', '"\\udc00x"']),
    "n": ("int", ["0", "9", "-1"]),
    "max_tokens": ("int", ["0", "-1", "4294967296"]),
    "min_tokens": ("int", ["-1"]),
    "seed": ("int", ["9223372036854775808", "-9223372036854775809"]),
    "top_k": ("int", ["-2", "4294967296"]),
    "temperature": ("number", ["-0.1", "2.1"]),
    "top_p": ("number", ["0", "1.1", "-1"]),
    "min_p": ("number", ["-0.1", "1.1"]),
    "frequency_penalty": ("number", ["-2.1", "2.1"]),
    "presence_penalty": ("number", ["-2.1", "2.1"]),
    "repetition_penalty": ("number", ["0", "-1", "11"]),
    "stream": ("bool", []),
    "ignore_eos": ("bool", []),
    "store": ("bool", []),
    "service_tier": ("text", []),
    "user": ("", ["1", "{}", '"\\ud800"']),
    "metadata": ("", ["1", '"x"', '{"a": 1}', '{"a": {"b": {}}}', "[]"]),
    "stop": (
        "",
        ["1", "true", "{}", '""', '[""]', "[1]", "[null]", '["' + "x" * 257 + '"]', json.dumps(["x"] * 17), '[["a"]]'],
    ),
    "logit_bias": (
        "",
        [
            "1",
            "[]",
            '{"a": 1}',
            '{"1": 101}',
            '{"1": -101}',
            '{"1": true}',
            '{"1": "2"}',
            '{"-1": 1}',
            '{"1.5": 1}',
            '{"999999": 1}',
            '{"' + HUGE + '": 1}',
            '{"1": NaN}',
            json.dumps({str(i): 1 for i in range(1025)}),
        ],
    ),
    "stop_token_ids": (
        "",
        ["1", "{}", "[true]", "[-1]", '["1"]', "[999999]", "[1.5]", f"[{HUGE}]", json.dumps([1] * 129)],
    ),
    "stream_options": ("", ["1", "[]", '{"include_usage": 1}', '{"foo": true}', '{"include_usage": true}']),
}
CHAT = {
    **COMMON,
    "messages": (
        "",
        [
            "1",
            '"hi"',
            "{}",
            "[]",
            "null",
            "[1]",
            "[null]",
            "[[]]",
            "[{}]",
            '[{"role": "user"}]',
            '[{"content": "x"}]',
            '[{"role": "wizard", "content": "x"}]',
            '[{"role": "user", "content": null}]',
            '[{"role": "user", "content": 1}]',
            '[{"role": "user", "content": {}}]',
            '[{"role": "user", "content": []}]',
            '[{"role": "user", "content": ["x"]}]',
            '[{"role": "user", "content": [{"type": "text"}]}]',
            '[{"role": "user", "content": [{"type": "text", "text": 1}]}]',
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]',
            '[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]',
            '[{"role": "user", "content": "x", "foo": 1}]',
            '[{"role": "user", "content": "\\ud83d"}]',
            '[{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]',
            json.dumps([{"role": "user", "content": "x"}] * 2049),
        ],
    ),
    "max_completion_tokens": ("int", ["0", "-1"]),
    "logprobs": ("bool", []),
    "top_logprobs": ("int", ["-1", "21", "1"]),
    "tools": ("", ["1", '[{"type": "function"}]', "[[[[1]]]]"]),
    "tool_choice": ("", ['"auto"', '{"type": "function"}', "1"]),
    "response_format": ("", ['{"type": "json_object"}', '{"type": "json_schema", "json_schema": {}}', "1", "{}"]),
    "modalities": ("", ['["audio"]', "1"]),
    "audio": ("", ["{}", "1"]),
    "functions": ("", ['[{"name": "f"}]']),
    "reasoning_effort": ("", ['"low"']),
    "prompt": ("", ['"x"']),
}
COMPLETION = {
    **COMMON,
    "prompt": (
        "",
        [
            "1",
            "{}",
            "null",
            "[]",
            '""',
            '[""]',
            "[[]]",
            "[true]",
            "[1.5]",
            "[-1]",
            "[999999]",
            "[[-1]]",
            '[1, "a"]',
            '["a", 1]',
            "[[1], 1]",
            '[["a"]]',
            "[null]",
            "[[[1]]]",
            f"[{HUGE}]",
            '"\\ud800"',
            '["a\\ud800"]',
            json.dumps(["a"] * 129),
        ],
    ),
    "logprobs": ("int", ["-1", "6"]),
    "echo": ("bool", []),
    "best_of": ("int", ["0", "2", "21"]),
    "suffix": ("", ['"x"', "1"]),
    "messages": ("", ["[]"]),
}
INTERNAL = [
    "kv_transfer_params",
    "cache_salt",
    "priority",
    "request_id",
    "prompt_embeds",
    "chat_template",
    "vllm_xargs",
    "logits_processors",
]
VALID = {
    "/v1/chat/completions": {"model": '"tiny"', "messages": '[{"role": "user", "content": "hi"}]'},
    "/v1/completions": {"model": '"tiny"', "prompt": '"hi"'},
}


def walk() -> list[tuple[str, str, str]]:
    """(path, field, bad value as JSON) for everything that must be refused."""
    cases = []
    for path, fields in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)):
        for name, (kind, values) in fields.items():
            cases += [(path, name, value) for value in (*WRONG.get(kind, ()), *values)]
        cases += [(path, name, value) for name in INTERNAL for value in ("1", '{"a": 1}', "null")]
        cases += [
            (path, "temprature", "1"),
            (path, "x" * 300, "1"),
            (path, "__proto__", "{}"),
            (path, "foo", "[" * 200 + "]" * 200),
        ]
    return cases


def check(answer, name: str) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) <= 400
    assert error["param"] is not None, error
    assert error["param"].startswith(name[:100]), error


async def test_every_field_refuses_wrong_types_ranges_and_sizes_by_name(serve, says) -> None:
    api = await serve(await says("a"))
    for path, name, value in walk():
        fields = {**VALID[path], name: value}
        body = "{" + ", ".join(f'"{key}": {item}' for key, item in fields.items()) + "}"
        answer = await api.http.post(path, content=body.encode())
        try:
            check(answer, name)
        except AssertionError as error:
            raise AssertionError(f"{path} {name}={value[:80]}: {error}") from error
    assert not api.core.generations  # Nothing of all that reached the core.
    assert (await api.chat()).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ],
)
async def test_fields_that_need_each_other_are_checked_together(serve, says, fields, param) -> None:
    api = await serve(await says("a"))
    check(await api.chat(**fields), param)


async def test_echo_with_logprobs_and_best_of_are_refused(serve, says) -> None:
    api = await serve(await says("a"))
    check(await api.complete(echo=True, logprobs=1), "echo")
    check(await api.complete(n=2, best_of=3), "best_of")
    check(await api.complete(prompt=["a"] * 17, n=8), "prompt")
    assert (await api.complete(n=2, best_of=2)).status_code == 200


async def test_ignored_and_neutral_fields_are_accepted(serve, says) -> None:
    api = await serve(await says("a"))
    neutral = dict.fromkeys((*CHAT, "verbosity", "prediction"))
    for name in ("model", "messages", "prompt"):
        del neutral[name]
    assert (await api.chat(**neutral)).status_code == 200
    sent_back = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    answer = await api.chat(
        messages=[sent_back, {"role": "user", "content": "y"}], user="u", metadata={"a": "b"}, store=True, service_tier="auto",
        parallel_tool_calls=True, tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"], stop=[],
    )  # fmt: skip
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"1", b'"x"', b"null", b"\xff\xfe", b'{"model": "tiny"} {}', b"[" * 100_000, b'{"a":' * 50_000,
     b"\x00" * 10, b'{"model": "tiny\x00"}', b"-" * 1000, b'{"model": "\xed\xa0\x80"}', b"9" * 100_000],
    ids=range(15),
)  # fmt: skip
async def test_what_is_no_json_object_is_a_400(serve, says, body) -> None:
    api = await serve(await says("a"))
    answer = await api.http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_is_read_as_json_whatever_its_content_type_says(serve, says) -> None:
    api = await serve(await says("a"))
    body = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert (
            await api.http.post("/v1/chat/completions", content=body, headers={"content-type": kind})
        ).status_code == 200
    answer = await api.http.post("/v1/chat/completions", content=body, headers={"content-encoding": "gzip"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


async def test_an_unknown_model_is_a_404(serve, says) -> None:
    api = await serve(await says("a"))
    answer = await api.chat(model="gpt-4")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert answer.json()["error"]["param"] == "model"
    assert (await api.http.get("/v1/models/gpt-4")).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "fox " * 300}, "prompt"),
        ({"prompt": "x" * 1_000_000}, "prompt"),  # Refused without tokenizing.
        ({"prompt": [5] * 200}, "prompt"),
        ({"prompt": "fox", "max_tokens": 200}, "max_tokens"),
    ],
)
async def test_what_does_not_fit_the_context_is_refused_at_once(serve, says, fields, param) -> None:
    api = await serve(await says("a"))
    answer = await api.complete(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    answer = await api.chat(messages=[{"role": "user", "content": "fox " * 300}])
    assert answer.json()["error"]["param"] == "messages"
    assert not api.core.generations


async def test_a_prompt_that_just_fits_is_served(serve, says) -> None:
    api = await serve(await says("a"))
    assert (await api.complete(prompt=[5] * 199, max_tokens=1)).status_code == 200


async def test_too_large_a_body_is_a_413_said_or_unsaid(serve, says) -> None:
    api = await serve(await says("a"), body_bytes_max=2048)

    async def parts():
        for _ in range(100):
            yield b" " * 1024

    for content in (b" " * 4096, parts()):
        answer = await api.http.post("/v1/chat/completions", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert (await api.chat()).status_code == 200


async def test_wrong_methods_and_paths_are_answered_in_openais_shape(serve, says) -> None:
    api = await serve(await says("a"))
    wrong = await api.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"], wrong.json()["error"]["code"]) == (
        405,
        "POST",
        "method_not_allowed",
    )
    for path in ("/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "//v1/models", "/v1/%2e%2e/x"):
        answer = await api.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_path")


async def test_the_cores_refusals_keep_their_status_and_say_when_to_come_back(serve, says) -> None:
    api = await serve(await says("a"))
    for error, status, retry_after in (
        (NoWorker("nobody serves it", retry_after_s=2.0), 503, "2"),
        (Overloaded("full", retry_after_s=0.2), 429, "1"),
        (Rejected("too odd", param="top_k"), 400, None),
    ):
        api.core.error = error
        for fields in ({}, {"stream": True}, {"n": 3}):
            answer = await api.chat(**fields)
            assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
            assert answer.json()["error"]["message"] == str(error)
            assert "x-request-id" in answer.headers
    assert not len(api.path)


async def test_more_requests_than_streams_max_get_a_429_at_once(serve, says) -> None:
    api = await serve(None, streams_max=1)
    reader, writer = await api.raw(
        json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "x"}]}).encode()
    )
    await api.core.wait(lambda: len(api.core.generations) == 1)
    answer = await api.chat()
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    api.core.send(1, [says.eos], finish=1)
    assert b"200 OK" in await reader.readline()
    writer.close()


async def test_messages_that_the_template_refuses_are_a_400(serve, says, text, monkeypatch) -> None:
    # A template of another model, in the place of this one's: it knows no role "tool".
    from hocket.router.text.template import ChatTemplate

    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}x"
    )
    monkeypatch.setattr(text, "_template", ChatTemplate(source, {}))
    api = await serve(await says("a"))
    answer = await api.chat(messages=[{"role": "tool", "content": "x"}])
    check(answer, "messages")
    assert answer.json()["error"]["message"] == "no tools here"


async def test_health_ready_models_and_metrics(serve, says) -> None:
    api = await serve(await says("a"))
    assert (await api.http.get("/health")).json() == {"status": "ok"}
    assert (await api.http.get("/ready")).status_code == 200
    api.core.not_ready = "no connection to the message bus"
    answer = await api.http.get("/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no connection to the message bus")
    models = (await api.http.get("/v1/models")).json()
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert (await api.http.get("/v1/models/tiny")).json()["max_model_len"] == 200
    assert (await api.http.get("/metrics")).headers["content-type"].startswith("text/plain")
    assert [model.id async for model in api.openai.models.list()] == ["tiny"]
