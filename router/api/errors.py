"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from starlette.responses import Response

from ..generation import Failure, RouterError

MESSAGE_CHARACTERS_MAX = 400  # Messages may quote what the client sent.


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
        closes_connection: bool = False,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status
        self.retry_after_s = retry_after_s
        self.closes_connection = closes_connection  # the rest of its body is not worth reading


def bad_request(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the parameter."""
    return ApiError(message, param=param, code=code)


def error_type(status: int) -> str:
    """OpenAI's word for a class of errors."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_object(message: str, *, status: int, param: str | None = None, code: str | None = None) -> dict[str, object]:
    """The object that clients parse."""
    return {
        "error": {"message": message[:MESSAGE_CHARACTERS_MAX], "type": error_type(status), "param": param, "code": code}
    }


def error_response(error: ApiError, headers: Sequence[tuple[bytes, bytes]] = ()) -> Response:
    """The whole HTTP answer."""
    body = error_object(str(error), status=error.status, param=error.param, code=error.code)
    response = Response(msgspec.json.encode(body), error.status, media_type="application/json")
    response.raw_headers += headers
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.closes_connection:
        response.headers["connection"] = "close"
    return response


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
