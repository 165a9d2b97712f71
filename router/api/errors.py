"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..generation import Failure, RouterError


class ApiError(Exception):
    """A request that is answered with an error instead of being served."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s


def error_type(status: int) -> str:
    """OpenAI's word for a class of errors."""
    if status == 429:
        return "rate_limit_error"
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_object(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """The object that clients parse."""
    return {"error": {"message": message, "type": error_type(status), "param": param, "code": code}}


def error_response(error: ApiError) -> Response:
    """The whole HTTP answer."""
    body = error_object(str(error), status=error.status, param=error.param, code=error.code)
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(msgspec.json.encode(body), error.status, headers, "application/json")


def from_router(error: RouterError) -> ApiError:
    """What the client hears when a request could not be started."""
    return ApiError(
        str(error), param=error.param, code=error.code, status=error.status, retry_after_s=error.retry_after_s
    )


def from_failure(failure: Failure) -> ApiError:
    """What the client hears when an accepted request failed before a byte was sent."""
    return ApiError(failure.message, code=failure.code, status=failure.status, retry_after_s=failure.retry_after_s)


def failure_event(failure: Failure) -> bytes:
    """The last words of a stream that failed."""
    body = error_object(failure.message, status=failure.status, code=failure.code)
    return b"data: " + msgspec.json.encode(body) + b"\n\ndata: [DONE]\n\n"


async def on_api_error(request: Request, error: Exception) -> Response:
    """Starlette's handler for ApiError."""
    assert isinstance(error, ApiError)
    return error_response(error)
