"""OpenAI's request bodies, checked field by field into plain typed requests. Every refusal names the parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from ...bus.messages import SamplingParams
from .errors import ApiError
from .fields import Check, array, boolean, ignored, integer, number, only, out_of_range, refused, string, wrong_type

N_MAX = 8
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
MESSAGES_MAX = 2048
PROMPTS_MAX = 64
TEXT_CHARACTERS_MAX = 4 << 20
TOKENS_MAX = 1 << 22
LOGIT_BIAS_MAX = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(slots=True)
class GenerateRequest:
    """What a client asks for, before templating and tokenizing."""

    model: str = ""
    messages: list[dict[str, object]] = field(default_factory=list)  # chat
    prompts: list[str | list[int]] = field(default_factory=list)  # completions
    n: int = 1
    is_streamed: bool = False
    includes_usage: bool = False
    echoes: bool = False
    max_tokens: int | None = None  # None: what is left of the context
    stops: tuple[str, ...] = ()
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely ones
    sampling: dict[str, object] = field(default_factory=dict)  # fields of SamplingParams that were given

    def sampling_params(self, *, max_tokens: int, choice: int, eos_ids: tuple[int, ...]) -> SamplingParams:
        """For one of `n` choices: a seed that was given grows by one with each."""
        given = dict(self.sampling)
        if isinstance(seed := given.get("seed"), int):
            given["seed"] = (seed + choice) & ((1 << 63) - 1)
        stop_ids = given.get("stop_token_ids", ())
        assert isinstance(stop_ids, tuple)
        ends = () if given.get("ignore_eos") else eos_ids
        given |= {
            "max_tokens": max_tokens,
            "logprobs": self.logprobs,
            "stop_token_ids": tuple(dict.fromkeys((*stop_ids, *ends))),
        }
        return msgspec.convert(given, SamplingParams)


def _stop(value: object, name: str) -> tuple[str, ...]:
    check = string(STOP_CHARACTERS_MAX, length_min=1)
    if isinstance(value, str):
        return (check(value, name),)
    if not isinstance(value, list):
        raise wrong_type(value, name, "a string or an array of strings")
    items = array(value, name, length_min=0, length_max=STOPS_MAX)
    return tuple(check(item, f"{name}[{position}]") for position, item in enumerate(items))


def _logit_bias(value: object, name: str) -> dict[int, float] | None:
    if not isinstance(value, dict):
        raise wrong_type(value, name, "an object")
    if len(value) > LOGIT_BIAS_MAX:
        raise out_of_range(name, f"must have at most {LOGIT_BIAS_MAX} entries, got {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not key.isascii() or not key.isdigit() or len(key) > 9:
            raise out_of_range(name, f"keys are token ids, got {key[:32]!r}")
        biases[int(key)] = number(-100, 100)(bias, f"{name}.{key}")
    return biases or None


def _token_ids(value: object, name: str) -> tuple[int, ...]:
    check = integer(0, (1 << 31) - 1)
    items = array(value, name, length_min=0, length_max=128)
    return tuple(check(item, f"{name}[{position}]") for position, item in enumerate(items))


def _stream_options(value: object, name: str) -> bool:
    if not isinstance(value, dict):
        raise wrong_type(value, name, "an object")
    for key, option in value.items():
        if key not in ("include_usage", "include_obfuscation"):
            raise ApiError(f"unknown parameter: '{name}.{key}'", param=f"{name}.{key}", code="unknown_parameter")
        boolean(option, f"{name}.{key}")
    return value.get("include_usage") is True


def _text_of(value: object, name: str) -> str:
    """A message's content: a string or a list of text parts."""
    check = string(TEXT_CHARACTERS_MAX)
    if isinstance(value, str):
        return check(value, name)
    if not isinstance(value, list):
        raise wrong_type(value, name, "a string or an array of text parts")
    texts = []
    for position, part in enumerate(array(value, name, length_min=1, length_max=MESSAGES_MAX)):
        where = f"{name}[{position}]"
        if not isinstance(part, dict):
            raise wrong_type(part, where, "an object")
        if part.get("type") != "text":
            raise ApiError(f"'{where}.type' must be 'text'; other parts are not supported", param=f"{where}.type",
                           code="unsupported_parameter")  # fmt: skip
        if unknown := next((key for key in part if key not in ("type", "text")), None):
            raise ApiError(
                f"unknown parameter: '{where}.{unknown}'", param=f"{where}.{unknown}", code="unknown_parameter"
            )
        texts.append(check(part.get("text"), f"{where}.text"))
    return "".join(texts)


def _messages(value: object, name: str) -> list[dict[str, object]]:
    messages: list[dict[str, object]] = []
    for position, message in enumerate(array(value, name, length_min=1, length_max=MESSAGES_MAX)):
        where = f"{name}[{position}]"
        if not isinstance(message, dict):
            raise wrong_type(message, where, "an object")
        role = string(32)(message.get("role"), f"{where}.role")
        if role not in ROLES:
            raise out_of_range(f"{where}.role", f"must be one of {', '.join(ROLES)}, got {role!r}")
        for key in message:
            if key not in ("role", "content", "name", "tool_call_id", "refusal"):
                raise ApiError(f"unknown parameter: '{where}.{key}'", param=f"{where}.{key}", code="unknown_parameter")
        checked: dict[str, object] = {"role": role, "content": _text_of(message.get("content"), f"{where}.content")}
        for key in ("name", "tool_call_id"):
            if message.get(key) is not None:
                checked[key] = string(256)(message[key], f"{where}.{key}")
        messages.append(checked)
    return messages


def _prompts(value: object, name: str) -> list[str | list[int]]:
    """A string, several strings, token ids, or several lists of token ids."""
    if isinstance(value, str):
        return [string(TEXT_CHARACTERS_MAX)(value, name)]
    if not isinstance(value, list):
        raise wrong_type(value, name, "a string or an array")
    if value and type(value[0]) is int:
        return [_prompt_ids(value, name)]
    items = array(value, name, length_min=1, length_max=PROMPTS_MAX)
    prompts: list[str | list[int]] = []
    for position, item in enumerate(items):
        where = f"{name}[{position}]"
        if isinstance(item, list):
            prompts.append(_prompt_ids(item, where))
        else:
            prompts.append(string(TEXT_CHARACTERS_MAX)(item, where))
    return prompts


def _prompt_ids(value: list[object], name: str) -> list[int]:
    ids: list[int] = []
    for position, item in enumerate(array(value, name, length_min=1, length_max=TOKENS_MAX)):
        if type(item) is not int:
            raise wrong_type(item, f"{name}[{position}]", "an integer")
        if not 0 <= item < 1 << 31:
            raise out_of_range(f"{name}[{position}]", "is no token id")
        ids.append(item)
    return ids


_INTERNAL = refused("it is the server's own")
_LATER = "not in this version"
_SAMPLING: dict[str, Check[object]] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1, above_low=True),
    "top_k": integer(0, 1 << 20),
    "min_p": number(0, 1),
    "seed": integer(0, (1 << 63) - 1),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "repetition_penalty": number(0, 2, above_low=True),
    "logit_bias": _logit_bias,
    "min_tokens": integer(0, TOKENS_MAX),
    "ignore_eos": boolean,
    "stop_token_ids": _token_ids,
}
_COMMON: dict[str, Check[object]] = {
    **_SAMPLING,
    "model": string(256, length_min=1),
    "n": integer(1, N_MAX),
    "stream": boolean,
    "stream_options": _stream_options,
    "stop": _stop,
    "max_tokens": integer(1, TOKENS_MAX),
    "user": string(4096),
    "metadata": ignored,
    "store": ignored,
    "service_tier": ignored,
    "safety_identifier": ignored,
    "prompt_cache_key": ignored,
    **dict.fromkeys(
        ("kv_transfer_params", "cache_salt", "priority", "request_id", "prompt_embeds", "chat_template", "vllm_xargs"),
        _INTERNAL,
    ),
    **dict.fromkeys(("chat_template_kwargs", "logits_processors", "lora_path", "mm_processor_kwargs"), _INTERNAL),
}
_CHAT: dict[str, Check[object]] = {
    **_COMMON,
    "messages": _messages,
    "max_completion_tokens": integer(1, TOKENS_MAX),
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "parallel_tool_calls": ignored,
    "tools": only([], _LATER),
    "tool_choice": only("none", _LATER),
    "functions": only([], _LATER),
    "function_call": only("none", _LATER),
    "response_format": only({"type": "text"}, _LATER),
    "modalities": only(["text"], "text only"),
    "audio": refused("text only"),
    "prediction": refused(_LATER),
    "reasoning_effort": refused(_LATER),
    "web_search_options": refused("there is no web search"),
}
_COMPLETION: dict[str, Check[object]] = {
    **_COMMON,
    "prompt": _prompts,
    "logprobs": integer(0, 5),
    "echo": boolean,
    "best_of": integer(1, N_MAX),
    "suffix": only("", _LATER),
}


def _checked(body: bytes, checks: Mapping[str, Check[object]]) -> dict[str, object]:
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise ApiError("the body must be a JSON object", code="invalid_json")
    values = {}
    for name, value in raw.items():
        check = checks.get(name)
        if check is None:
            shown = name if len(name) <= 64 else name[:64] + "..."
            raise ApiError(f"unknown parameter: '{shown}'", param=shown, code="unknown_parameter")
        if value is not None:
            values[name] = check(value, name)
    return values


def _common(values: Mapping[str, object]) -> GenerateRequest:
    request = GenerateRequest()
    if "model" not in values:
        raise ApiError("missing required parameter: 'model'", param="model", code="missing_parameter")
    request.model = str(values["model"])
    request.n = int(values.get("n", 1))  # type: ignore[call-overload]  # Checked: an integer.
    request.is_streamed = values.get("stream") is True
    if "stream_options" in values and not request.is_streamed:
        raise ApiError("'stream_options' needs 'stream': true", param="stream_options", code="invalid_value")
    request.includes_usage = values.get("stream_options") is True
    request.stops = values.get("stop", ())  # type: ignore[assignment]  # Checked: a tuple of strings.
    request.sampling = {name: values[name] for name in _SAMPLING if name in values}
    max_tokens = values.get("max_completion_tokens", values.get("max_tokens"))
    request.max_tokens = max_tokens if isinstance(max_tokens, int) else None
    minimum = request.sampling.get("min_tokens", 0)
    if isinstance(minimum, int) and request.max_tokens is not None and minimum > request.max_tokens:
        raise out_of_range("min_tokens", f"{minimum} is more than max_tokens {request.max_tokens}")
    return request


def parse_chat(body: bytes) -> GenerateRequest:
    """The body of POST /v1/chat/completions. Raises ApiError."""
    values = _checked(body, _CHAT)
    request = _common(values)
    if "messages" not in values:
        raise ApiError("missing required parameter: 'messages'", param="messages", code="missing_parameter")
    request.messages = values["messages"]  # type: ignore[assignment]  # Checked by _messages.
    top = values.get("top_logprobs")
    if values.get("logprobs") is True:
        request.logprobs = top if isinstance(top, int) else 0
    elif top is not None:
        raise ApiError("'top_logprobs' needs 'logprobs': true", param="top_logprobs", code="invalid_value")
    return request


def parse_completion(body: bytes) -> GenerateRequest:
    """The body of POST /v1/completions. Raises ApiError."""
    values = _checked(body, _COMPLETION)
    request = _common(values)
    if "prompt" not in values:
        raise ApiError("missing required parameter: 'prompt'", param="prompt", code="missing_parameter")
    request.prompts = values["prompt"]  # type: ignore[assignment]  # Checked by _prompts.
    if request.max_tokens is None:
        request.max_tokens = 16
    logprobs = values.get("logprobs")
    request.logprobs = logprobs if isinstance(logprobs, int) else None
    request.echoes = values.get("echo") is True
    if request.echoes and request.logprobs is not None:
        raise ApiError("'echo' with 'logprobs' is not supported", param="echo", code="unsupported_parameter")
    best_of = values.get("best_of")
    if best_of is not None and best_of != request.n:
        raise ApiError("'best_of' other than 'n' is not supported", param="best_of", code="unsupported_parameter")
    return request
