"""OpenAI's request bodies, and what is left of them once they are valid.

A body is decoded once, straight into its struct; only when that fails does `explain.py` look for words. A field that no struct
here has is refused by name. Accepted and ignored: user, metadata, store, service_tier, safety_identifier, prompt_cache_key,
and parallel_tool_calls and tool_choice "none" (there are no tools). A field typed `None` may be present, as SDKs send it, but
must be null: the feature does not exist yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from msgspec.structs import replace

from ...bus.messages import SamplingParams
from .errors import bad_request
from .explain import explain

Meta = msgspec.Meta

CHOICES_MAX = 128  # n times the number of prompts
_INT64_MAX = 2**63 - 1
_Text = Annotated[str, Meta(max_length=256)]
_Name = Annotated[str, Meta(min_length=1, max_length=256)]
_Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
_TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
_Stop = Annotated[str, Meta(min_length=1, max_length=256)]
_Limit = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Nothing = Annotated[list[None], Meta(max_length=0)] | None


class _Body(msgspec.Struct, forbid_unknown_fields=True):
    """A struct of a request; `kw_only=True` must be repeated on each subclass."""


class StreamOptions(_Body, kw_only=True):
    """How a stream is dressed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored: padding that OpenAI adds against traffic analysis


class ResponseFormat(_Body, kw_only=True):
    """Only plain text yet."""

    type: Literal["text"]


class TextPart(_Body, kw_only=True):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body, kw_only=True):
    """One turn of a chat; the null fields are what SDKs send back of an answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=1024)]
    name: _Text | None = None
    tool_call_id: _Text | None = None
    tool_calls: _Nothing = None
    annotations: _Nothing = None
    function_call: None = None
    refusal: None = None
    audio: None = None
    reasoning: None = None
    reasoning_content: None = None

    def for_template(self) -> dict[str, object]:
        """As chat templates take it: text parts as lines, like vLLM."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        message: dict[str, object] = {"role": self.role, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class _GenerateBody(_Body, kw_only=True):
    """What both endpoints take."""

    model: _Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    max_tokens: _Limit | None = None
    stop: _Stop | Annotated[list[_Stop], Meta(max_length=16)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=_INT64_MAX)] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: Annotated[dict[_TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] | None = None
    # Beyond OpenAI's, as in vLLM.
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=10.0)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_TokenId], Meta(max_length=128)] | None = None
    # Ignored.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: _Text | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ChatBody(_GenerateBody, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=2048)]
    max_completion_tokens: _Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    tools: _Nothing = None
    functions: _Nothing = None
    function_call: Literal["none"] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None


class CompletionBody(_GenerateBody, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | _TokenId | list[_TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Meta(ge=1, le=8)] | None = None
    suffix: Literal[""] | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A valid request. Exactly one of `messages`, `texts` and `token_lists` is there."""

    model: str
    sampling: SamplingParams  # complete but for what `sampling_for` adds
    n: int
    is_streamed: bool
    includes_usage: bool
    max_tokens: int | None  # None: what is left of the context
    stops: tuple[str, ...]
    messages: list[dict[str, object]] | None = None
    texts: list[str] | None = None
    token_lists: list[list[int]] | None = None
    echoes: bool = False

    @property
    def is_chat(self) -> bool:
        """Which of the two endpoints it came to."""
        return self.messages is not None

    def sampling_for(self, choice: int, max_tokens: int, eos_ids: tuple[int, ...]) -> SamplingParams:
        """For one of the `n` choices of a prompt: a seed grows by one with each."""
        sampling = self.sampling
        seed = sampling.seed
        if seed is not None and choice:
            seed = (seed + choice + 2**63) % 2**64 - 2**63  # It stays within int64.
        stop_token_ids = sampling.stop_token_ids
        if eos_ids and not sampling.ignore_eos:
            stop_token_ids = tuple(dict.fromkeys((*stop_token_ids, *eos_ids))) if stop_token_ids else eos_ids
        return replace(sampling, max_tokens=max_tokens, seed=seed, stop_token_ids=stop_token_ids)


_decode_chat = msgspec.json.Decoder(ChatBody).decode
_decode_completion = msgspec.json.Decoder(CompletionBody).decode
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's; a chat runs to the end of the context


def parse_chat(raw: bytes, vocab_size: int) -> GenerateRequest:
    """A chat request; raises ApiError."""
    try:
        body = _decode_chat(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error, raw) from None
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.max_completion_tokens is not None:
        body.max_tokens = body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return GenerateRequest(
        body.model,
        _sampling(body, logprobs, vocab_size),
        body.n or 1,
        bool(body.stream),
        _wants_usage(body),
        body.max_tokens,
        _stops(body),
        messages=[message.for_template() for message in body.messages],
    )


def parse_completion(raw: bytes, vocab_size: int) -> GenerateRequest:
    """A completion request; raises ApiError."""
    try:
        body = _decode_completion(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise explain(error, raw) from None
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise bad_request("best_of other than n is not supported yet", "best_of")
    if body.echo and body.logprobs is not None:
        raise bad_request("echo together with logprobs is not supported yet", "echo")
    texts, token_lists = _prompts(body.prompt, vocab_size)
    if n * len(texts or token_lists or ()) > CHOICES_MAX:
        raise bad_request(f"at most {CHOICES_MAX} choices (prompts times n) in one request", "prompt")
    if body.max_tokens is None:
        body.max_tokens = COMPLETION_TOKENS_DEFAULT
    return GenerateRequest(
        body.model,
        _sampling(body, body.logprobs, vocab_size),
        n,
        bool(body.stream),
        _wants_usage(body),
        body.max_tokens,
        _stops(body),
        texts=texts,
        token_lists=token_lists,
        echoes=bool(body.echo),
    )


def _prompts(
    prompt: str | list[str | int | list[int]], vocab_size: int
) -> tuple[list[str] | None, list[list[int]] | None]:
    """All texts, or all lists of token ids."""
    if isinstance(prompt, str):
        prompt = [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        if "" in texts:
            raise bad_request("a prompt must not be empty", "prompt")
        return texts, None
    token_ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(token_ids) == len(prompt):
        lists = [token_ids]
    elif len(lists) != len(prompt):
        raise bad_request(
            "prompt must be a text, a list of texts, a list of token ids or a list of such lists", "prompt"
        )
    for token_list in lists:
        if not token_list:
            raise bad_request("a prompt must not be empty", "prompt")
        _check_ids(max(token_list), vocab_size, "prompt")
    return None, lists


def _check_ids(largest: int, vocab_size: int, param: str) -> None:
    if largest >= vocab_size:
        raise bad_request(f"{param}: token id {largest} is not below the vocabulary's size, {vocab_size}", param)


def _stops(body: _GenerateBody) -> tuple[str, ...]:
    if body.stop is None:
        return ()
    return (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)


def _wants_usage(body: _GenerateBody) -> bool:
    if body.stream_options is None:
        return False
    if not body.stream:
        raise bad_request("stream_options needs stream to be true", "stream_options")
    return bool(body.stream_options.include_usage)


def _sampling(body: _GenerateBody, logprobs: int | None, vocab_size: int) -> SamplingParams:
    if body.logit_bias:
        _check_ids(max(body.logit_bias), vocab_size, "logit_bias")
    if body.stop_token_ids:
        _check_ids(max(body.stop_token_ids), vocab_size, "stop_token_ids")
    min_tokens = body.min_tokens or 0
    if body.max_tokens is not None and min_tokens > body.max_tokens:
        raise bad_request(f"min_tokens, {min_tokens}, is more than max_tokens, {body.max_tokens}", "min_tokens")
    return SamplingParams(
        max_tokens=body.max_tokens or 1,
        min_tokens=min_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        seed=body.seed,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=body.logit_bias or None,
        logprobs=logprobs,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
    )
