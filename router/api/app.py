"""The Starlette application: OpenAI's paths in front of the router core and the token path."""

from __future__ import annotations

import time

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..config import RouterConfig
from ..generation import RouterCore
from ..text.model_text import ModelText
from .errors import ApiError, error_response
from .generate import Generator
from .stream import TokenPath


def build_app(
    core: RouterCore, path: TokenPath, text: ModelText, config: RouterConfig, *, registry: CollectorRegistry
) -> Starlette:
    """The application of one router."""
    generator = Generator(core, path, text, config)
    info = _Info(core, registry)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _Asgi(generator.chat), methods=["POST"]),
            Route("/v1/completions", _Asgi(generator.completions), methods=["POST"]),
            Route("/v1/models", info.models, methods=["GET"]),
            Route("/v1/models/{model:path}", info.models, methods=["GET"]),
            Route("/health", info.health, methods=["GET"]),
            Route("/ready", info.ready, methods=["GET"]),
            Route("/metrics", info.metrics, methods=["GET"]),
        ],
        exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug},
    )
    app.router.redirect_slashes = False
    return app


class _Asgi:
    """Makes Starlette's Route take a bound method as an ASGI application and not as a function of a Request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


class _Info:
    """Everything that only reads."""

    def __init__(self, core: RouterCore, registry: CollectorRegistry) -> None:
        self._core = core
        self._registry = registry
        self._started_unix_s = int(time.time())

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/{id}."""
        cards = {name: self._card(name) for name in self._core.models()}
        wanted = request.path_params.get("model")
        if wanted is None:
            return _json_response({"object": "list", "data": list(cards.values())})
        if wanted not in cards:
            raise ApiError(f"the model {wanted!r} does not exist", param="model", status=404, code="model_not_found")
        return _json_response(cards[wanted])

    def _card(self, name: str) -> dict[str, object]:
        card: dict[str, object] = {"id": name, "object": "model", "created": self._started_unix_s, "owned_by": "hocket"}
        if (limit := self._core.prompt_tokens_max()) is not None:
            card["max_model_len"] = limit
        return card

    async def health(self, request: Request) -> Response:
        """GET /health: the process runs."""
        return _json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: requests can be served now."""
        reason = self._core.not_ready_reason()
        if reason is None:
            return _json_response({"status": "ready"})
        return _json_response({"status": "not ready", "reason": reason}, 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: Prometheus."""
        return Response(generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})


def _json_response(body: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message, code = error.detail, "http_error"
    if error.status_code == 404:
        message, code = f"no such path: {request.method} {request.url.path}", "unknown_path"
    elif error.status_code == 405:
        message, code = f"{request.method} is not allowed here", "method_not_allowed"
    response = error_response(ApiError(message, status=error.status_code, code=code))
    response.headers.update(error.headers or {})
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    return error_response(ApiError("internal error", status=500, code="internal_error"))
