"""The Starlette application: OpenAI's paths in front of the router core and the token path."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ...bus.ids import RequestId
from ...bus.messages import pack_tokens
from ..config import RouterConfig
from ..generation import Generation, RouterCore, RouterError, Started
from ..text.model_text import ModelText
from ..text.template import TemplateFailed
from ..text.tokenize import TokenizerBusy
from .answers import AnswerShape, EventStream, WholeAnswer
from .errors import ApiError, error_response, from_failure, from_router, on_api_error
from .requests import GenerateRequest, parse_chat, parse_completion
from .sink import Sink
from .stream import Stream, TokenPath

log = logging.getLogger(__name__)


class _Prompt:
    """One tokenized prompt and, with `echo`, its text."""

    __slots__ = ("echo", "token_ids")

    def __init__(self, token_ids: list[int], echo: str) -> None:
        self.token_ids = token_ids
        self.echo = echo


class Api:
    """The handlers, and what they need."""

    def __init__(
        self,
        core: RouterCore,
        path: TokenPath,
        text: ModelText,
        config: RouterConfig,
        *,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = core
        self._path = path
        self._text = text
        self._config = config
        self._registry = registry
        self._clock = clock
        self._eos_ids = tuple(sorted(text.eos_ids))
        self._started_unix_s = int(time.time())

    # ---- generating

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        asked = parse_chat(await self._body(request))
        self._check_model(asked.model)
        try:
            rendered = self._text.render_chat(asked.messages)
        except TemplateFailed as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from error
        self._check_length(rendered, "messages")
        [token_ids] = await self._encode([rendered], add_special_tokens=False)
        return await self._generate(asked, [_Prompt(token_ids, "")], "messages")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        asked = parse_completion(await self._body(request))
        self._check_model(asked.model)
        texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
        for text in texts:
            self._check_length(text, "prompt")
        encoded = iter(await self._encode(texts, add_special_tokens=True))
        prompts = []
        for prompt in asked.prompts:
            if isinstance(prompt, str):
                prompts.append(_Prompt(next(encoded), prompt if asked.echoes else ""))
                continue
            if max(prompt) >= self._text.vocab_size:
                raise ApiError(f"token id {max(prompt)} is not in the model's vocabulary of {self._text.vocab_size}",
                               param="prompt", code="invalid_value")  # fmt: skip
            prompts.append(_Prompt(prompt, self._text.decode(prompt) if asked.echoes else ""))
        return await self._generate(asked, prompts, "prompt")

    async def _generate(self, asked: GenerateRequest, prompts: list[_Prompt], param: str) -> Response:
        is_chat = param == "messages"
        request_id = secrets.token_hex(16)
        shape = AnswerShape(
            ("chatcmpl-" if is_chat else "cmpl-") + request_id,
            asked.model,
            is_chat,
            asked.includes_usage,
            sum(len(prompt.token_ids) for prompt in prompts),
            self._text,
        )
        limits = [self._max_tokens(asked, len(prompt.token_ids), param) for prompt in prompts]
        choices = len(prompts) * asked.n
        run = _Run(self._core, self._path)
        answer: EventStream | WholeAnswer
        if asked.is_streamed:
            answer = EventStream(shape, choices, run.cancel)
        else:
            answer = WholeAnswer(shape, choices, run.finish)
        minimum = asked.sampling.get("min_tokens", 0)
        assert isinstance(minimum, int)
        deadline_s = self._clock() + self._config.request_timeout_s
        try:
            for index in range(choices):
                prompt, max_tokens = prompts[index // asked.n], limits[index // asked.n]
                sampling = asked.sampling_params(max_tokens=max_tokens, choice=index % asked.n, eos_ids=self._eos_ids)
                stream = Stream(
                    self._text.detokenizer(prompt.token_ids), answer.choice(index, prompt.echo), asked.stops, minimum
                )
                generation = Generation(
                    RequestId(request_id if not index else secrets.token_hex(16)),
                    asked.model,
                    pack_tokens(prompt.token_ids),
                    len(prompt.token_ids),
                    sampling,
                    deadline_s,
                )
                await run.start(generation, stream)
        except RouterError as error:
            run.cancel()
            raise from_router(error) from error
        except BaseException:
            run.cancel()
            raise
        headers = [
            (b"x-request-id", request_id.encode()),
            (b"x-hocket-plan", run.started[0].plan.encode()),
            (b"x-hocket-decode-worker", run.started[0].decode_worker.encode()),
        ]
        if isinstance(answer, EventStream):
            return EventStreamResponse(answer, run, headers, self._config.client_backlog_bytes_max)
        return WholeResponse(answer, run, headers)

    # ---- checks

    async def _body(self, request: Request) -> bytes:
        limit = self._config.body_bytes_max
        too_large = ApiError(f"the body is larger than {limit} bytes", status=413, code="body_too_large")
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check_model(self, model: str) -> None:
        if model not in self._core.models():
            known = ", ".join(self._core.models())
            raise ApiError(f"the model '{model}' does not exist; served here: {known}", param="model", status=404,
                           code="model_not_found")  # fmt: skip

    def _context_tokens(self) -> int | None:
        limits = [limit for limit in (self._text.context_tokens, self._core.prompt_tokens_max()) if limit is not None]
        return min(limits, default=None)

    def _check_length(self, text: str, param: str) -> None:
        """Refuse without tokenizing what is too long however it is cut."""
        limit = self._context_tokens()
        if limit is not None and (tokens := self._text.tokens_min(text)) >= limit:
            raise _too_long(f"at least {tokens} prompt tokens", limit, param)

    def _max_tokens(self, asked: GenerateRequest, prompt_tokens: int, param: str) -> int:
        if not prompt_tokens:
            raise ApiError(f"'{param}' has no tokens", param=param, code="invalid_value")
        limit = self._context_tokens()
        if limit is None:
            return asked.max_tokens or 16  # No worker is known: nothing will be generated anyway.
        if prompt_tokens >= limit:
            raise _too_long(f"{prompt_tokens} prompt tokens", limit, param)
        if asked.max_tokens is None:
            return limit - prompt_tokens
        if prompt_tokens + asked.max_tokens > limit:
            raise _too_long(f"{prompt_tokens} prompt tokens and {asked.max_tokens} of the answer", limit, param)
        return asked.max_tokens

    async def _encode(self, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
        try:
            return await self._text.encode(texts, add_special_tokens=add_special_tokens)
        except TokenizerBusy as error:
            raise ApiError(str(error), status=429, code="overloaded", retry_after_s=1.0) from error

    # ---- the rest

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{id}."""
        cards = [
            {"id": name, "object": "model", "created": self._started_unix_s, "owned_by": "hocket"}
            for name in self._core.models()
        ]
        wanted = request.path_params.get("model")
        if wanted is None:
            return _json_response({"object": "list", "data": cards})
        for card in cards:
            if card["id"] == wanted:
                return _json_response(card)
        raise ApiError(f"the model '{wanted[:256]}' does not exist", param="model", status=404, code="model_not_found")

    async def health(self, request: Request) -> Response:
        """GET /health: the process runs."""
        return _json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: requests can be served now."""
        reason = self._core.not_ready_reason()
        body = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
        return _json_response(body, 200 if reason is None else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus."""
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})


class _Run:
    """The generations of one HTTP request."""

    def __init__(self, core: RouterCore, path: TokenPath) -> None:
        self._core = core
        self._path = path
        self._stream_ids: list[int] = []
        self.started: list[Started] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def start(self, generation: Generation, stream: Stream) -> None:
        stream_id = self._path.open(stream)
        self._stream_ids.append(stream_id)
        self.started.append(await self._core.start(generation, stream_id))

    def finish(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def cancel(self) -> None:
        """Give up whatever has not ended."""
        for stream_id in self._stream_ids:
            if self._path.close(stream_id):
                self._core.cancel(stream_id)


class EventStreamResponse(Response):
    """Its body is written by the token path; its own task only waits for the end or for the client to go."""

    def __init__(
        self, answer: EventStream, run: _Run, headers: list[tuple[bytes, bytes]], backlog_bytes_max: int
    ) -> None:
        self._answer = answer
        self._run = run
        self._backlog_bytes_max = backlog_bytes_max
        self.status_code = 200
        self.background = None
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            *headers,
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: `http.disconnect` comes when the client goes and also when the response is complete."""
        task = asyncio.current_task()
        assert task is not None
        is_gone = False

        def on_gone() -> None:
            nonlocal is_gone
            is_gone = True
            task.cancel()

        sink = Sink(send, self._backlog_bytes_max, on_gone)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._answer.attach(sink)
            while (await receive())["type"] != "http.disconnect":
                pass
        except asyncio.CancelledError:
            if not is_gone:
                raise
            task.uncancel()
        finally:
            self._run.cancel()
            await sink.aclose()


class WholeResponse(Response):
    """Waits for every choice, or for the client to go."""

    def __init__(self, answer: WholeAnswer, run: _Run, headers: list[tuple[bytes, bytes]]) -> None:
        self._answer = answer
        self._run = run
        self._more_headers = headers
        self.status_code = 200
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One body, or an error with a status of its own."""
        gone = asyncio.ensure_future(_wait_gone(receive))
        try:
            await asyncio.wait({gone, self._run.done}, return_when=asyncio.FIRST_COMPLETED)
            if not self._run.done.done():
                return
        finally:
            gone.cancel()
            self._run.cancel()
        failure = self._answer.failure
        if failure is not None:
            response = error_response(from_failure(failure))
        else:
            response = Response(self._answer.body(), media_type="application/json")
        response.raw_headers.extend(self._more_headers)
        await response(scope, receive, send)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(what: str, limit: int, param: str) -> ApiError:
    return ApiError(f"{what} exceed the context of {limit} tokens", param=param, code="context_length_exceeded")


def _json_response(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"no such path: {request.method} {request.url.path[:256]}"
    else:
        message = error.detail
    response = error_response(ApiError(message, status=error.status_code, code="http_error"))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # Nobody reads it.


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError("internal error", status=500, code="internal_error"))


def build_app(
    core: RouterCore, path: TokenPath, text: ModelText, config: RouterConfig, *, registry: CollectorRegistry
) -> Starlette:
    """The application of one router."""
    api = Api(core, path, text, config, registry=registry)
    return Starlette(
        routes=[
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
            Route("/v1/models", api.models, methods=["GET"]),
            Route("/v1/models/{model:path}", api.models, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/ready", api.ready, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: on_api_error,
            HTTPException: _on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
