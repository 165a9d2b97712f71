"""POST /v1/chat/completions and /v1/completions: from a body to generations that can start."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable

from starlette.types import Receive, Scope, Send

from ...bus.ids import RequestId
from ...bus.messages import pack_tokens
from ..config import RouterConfig
from ..generation import Generation, RouterCore
from ..text.model_text import ModelText
from ..text.template import TemplateFailed
from ..text.tokenize import TokenizerBusy
from .answers import AnswerShape, EventStream, WholeAnswer
from .body import BodyReader, ClientGone
from .caller import Caller, caller_of
from .errors import ApiError, bad_request, error_response
from .exchange import Exchange
from .requests import GenerateRequest, parse_chat, parse_completion
from .stream import Stream, TokenPath

EXPLAIN = (b"x-hocket-explain", b"1")  # as ASGI servers give headers


class Prompt:
    """One tokenized prompt and, with `echo`, its text."""

    __slots__ = ("echo", "token_ids")

    def __init__(self, token_ids: list[int], echo: str = "") -> None:
        self.token_ids = token_ids
        self.echo = echo


class Generator:
    """What both endpoints share; one for each router."""

    def __init__(
        self,
        core: RouterCore,
        path: TokenPath,
        text: ModelText,
        config: RouterConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._path = path
        self._text = text
        self._config = config
        self._clock = clock
        self._bodies = BodyReader(config.body_bytes_max)
        self._requests = 0  # from their headers to their last byte
        self._eos_ids = tuple(sorted(text.eos_ids))

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions, as an ASGI application."""
        await self._answer(scope, receive, send, self._prepare_chat)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/completions, as an ASGI application."""
        await self._answer(scope, receive, send, self._prepare_completion)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, prepare: _Prepare) -> None:
        request_id = secrets.token_hex(16)
        headers = [(b"x-request-id", request_id.encode())]
        self._requests += 1
        try:
            caller = caller_of(scope["headers"], self._config)
            if self._requests > self._config.streams_max:
                raise ApiError(f"{self._requests - 1} requests are in flight", status=429, code="overloaded",
                               retry_after_s=1.0)  # fmt: skip
            body = await self._bodies.read(scope, receive)
            try:
                asked, prompts = await prepare(body)
            finally:
                self._bodies.release(len(body))
            del body  # A stream lives long, and the prompt is in it once more.
            exchange = Exchange(
                self._core, self._path, backlog_bytes_max=self._config.client_backlog_bytes_max, headers=headers
            )
            answer = self._shape(asked, prompts, request_id, exchange)
            generations = self._generations(asked, prompts, request_id, answer, caller)
            if self._config.explains_to_clients and EXPLAIN in scope["headers"]:
                generations = self._explain(answer, generations)
            del asked, prompts
            await exchange.run(answer, generations, scope, receive, send)
        except ApiError as error:
            await error_response(error, headers)(scope, receive, send)
        except ClientGone:
            return
        finally:
            self._requests -= 1

    # ---- from a body to prompts

    async def _prepare_chat(self, body: bytes) -> tuple[GenerateRequest, list[Prompt]]:
        asked = parse_chat(body, self._text.vocab_size)
        self._check_model(asked.model)
        assert asked.messages is not None
        try:
            rendered = self._text.render_chat(asked.messages)
        except TemplateFailed as error:
            raise bad_request(str(error), "messages") from error
        self._check_length(rendered, "messages")
        [token_ids] = await self._encode([rendered], add_special_tokens=False)
        return asked, [Prompt(token_ids)]

    async def _prepare_completion(self, body: bytes) -> tuple[GenerateRequest, list[Prompt]]:
        asked = parse_completion(body, self._text.vocab_size)
        self._check_model(asked.model)
        if asked.token_lists is not None:
            decode = self._text.decode
            return asked, [Prompt(ids, decode(ids) if asked.echoes else "") for ids in asked.token_lists]
        assert asked.texts is not None
        for text in asked.texts:
            self._check_length(text, "prompt")
        encoded = await self._encode(asked.texts, add_special_tokens=True)
        echoes = asked.texts if asked.echoes else [""] * len(encoded)
        return asked, [Prompt(ids, echo) for ids, echo in zip(encoded, echoes, strict=True)]

    def _check_model(self, model: str) -> None:
        models = self._core.models()
        if model not in models:
            raise ApiError(f"the model {model!r} does not exist; served here: {', '.join(models)}", param="model",
                           status=404, code="model_not_found")  # fmt: skip

    def _check_length(self, text: str, param: str) -> None:
        """Refuse without tokenizing what is too long however it is cut."""
        limit = self._context_tokens()
        if limit is not None and (tokens := self._text.tokens_min(text)) >= limit:
            raise _too_long(f"at least {tokens} prompt tokens", limit, param)

    def _context_tokens(self) -> int | None:
        workers, model = self._core.prompt_tokens_max(), self._text.context_tokens
        if workers is None or model is None:
            return workers or model
        return min(workers, model)

    async def _encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        try:
            return await self._text.encode(texts, add_special_tokens=add_special_tokens)
        except TokenizerBusy as error:
            raise ApiError(str(error), status=429, code="overloaded", retry_after_s=1.0) from error

    # ---- from prompts to generations

    def _shape(
        self, asked: GenerateRequest, prompts: list[Prompt], request_id: str, exchange: Exchange
    ) -> EventStream | WholeAnswer:
        shape = AnswerShape(
            request_id,
            asked.model,
            self._text,
            is_chat=asked.is_chat,
            includes_usage=asked.includes_usage,
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts),
            top_logprobs=asked.sampling.logprobs or 0,
        )
        choices = len(prompts) * asked.n
        if asked.is_streamed:
            return EventStream(shape, choices, exchange.release)
        return WholeAnswer(shape, choices, exchange.finish)

    def _generations(
        self, asked: GenerateRequest, prompts: list[Prompt], request_id: str, answer: EventStream | WholeAnswer,
        caller: Caller,
    ) -> list[tuple[Generation, Stream]]:  # fmt: skip
        deadline_s = self._clock() + caller.timeout_s
        generations: list[tuple[Generation, Stream]] = []
        for prompt in prompts:
            max_tokens = self._max_tokens(asked, len(prompt.token_ids))
            packed = pack_tokens(prompt.token_ids)
            for choice in range(asked.n):
                index = len(generations)
                generation = Generation(
                    RequestId(secrets.token_hex(16) if index else request_id),
                    asked.model,
                    packed,
                    len(prompt.token_ids),
                    asked.sampling_for(choice, max_tokens, self._eos_ids),
                    deadline_s,
                    tenant=caller.tenant,
                    priority=caller.priority,
                    session_id=caller.session_id,
                )
                detokenizer = self._text.detokenizer(prompt.token_ids)
                writer = answer.choice(index, prompt.echo)
                generations.append((generation, Stream(detokenizer, writer, asked.stops, asked.sampling.min_tokens)))
        return generations

    def _explain(
        self, answer: EventStream | WholeAnswer, generations: list[tuple[Generation, Stream]]
    ) -> list[tuple[Generation, Stream]]:
        """Let every one of them leave a receipt, and the answer end with those."""
        ids = [generation.request_id for generation, _ in generations]
        answer.shape.receipts = lambda: [found for one in ids if (found := self._core.receipt(one)) is not None]
        return [(dataclasses.replace(generation, explains=True), stream) for generation, stream in generations]

    def _max_tokens(self, asked: GenerateRequest, prompt_tokens: int) -> int:
        param = "messages" if asked.is_chat else "prompt"
        if not prompt_tokens:
            raise bad_request(f"{param!r} has no tokens", param)
        limit = self._context_tokens()
        if limit is None:
            return asked.max_tokens or 16  # No worker is known: nothing will be generated anyway.
        left = limit - prompt_tokens
        if left <= 0:
            raise _too_long(f"{prompt_tokens} prompt tokens", limit, param)
        if asked.max_tokens is None:
            return left
        if asked.max_tokens > left:
            raise _too_long(f"{prompt_tokens} prompt tokens and {asked.max_tokens} of the answer", limit, "max_tokens")
        return asked.max_tokens


_Prepare = Callable[[bytes], Awaitable[tuple[GenerateRequest, list[Prompt]]]]


def _too_long(what: str, limit: int, param: str) -> ApiError:
    return bad_request(f"{what} exceed the context of {limit} tokens", param, "context_length_exceeded")
