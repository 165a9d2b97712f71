"""Request bodies, bounded in size, time and number."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope

from .errors import ApiError

BODY_TIMEOUT_S = 30.0
BODIES_MAX = 64
"""So many bodies of the largest size may be held at once; more bytes than that are refused."""


class ClientGone(Exception):
    """The client left before its request was complete: nobody reads an answer."""


class BodyReader:
    """Reads the bodies of all requests of one router."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._held_bytes_max = bytes_max * BODIES_MAX
        self._held_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body; `release` it when it is not needed any more. Raises ApiError or ClientGone."""
        self._check_headers(scope)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if not message.get("more_body"):
            whole: bytes = message.get("body", b"")
            self._hold(len(whole), len(whole))
            return whole
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    part: bytes = message.get("body", b"")
                    self._hold(len(part), len(body) + len(part))
                    body += part
                    if not message.get("more_body"):
                        return bytes(body)
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
        except BaseException as error:  # Also when it is cancelled: the bytes are counted against all clients.
            self.release(len(body))
            if isinstance(error, TimeoutError):
                raise ApiError(
                    f"the body did not come within {BODY_TIMEOUT_S:g} s", status=408, code="body_timeout",
                    closes_connection=True,
                ) from None  # fmt: skip
            raise

    def release(self, size: int) -> None:
        """A body of this size is not held any more."""
        self._held_bytes -= size

    def _hold(self, size: int, body_bytes: int) -> None:
        if body_bytes > self._bytes_max:
            raise self._too_large()
        if self._held_bytes + size > self._held_bytes_max:
            raise ApiError("too many large requests are being read", status=429, code="overloaded", retry_after_s=1.0)
        self._held_bytes += size

    def _check_headers(self, scope: Scope) -> None:
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self._bytes_max:
                raise self._too_large()
            if name == b"content-encoding" and value.lower() != b"identity":
                raise ApiError("compressed bodies are not accepted", status=415, code="unsupported_encoding")

    def _too_large(self) -> ApiError:
        return ApiError(f"the body is larger than {self._bytes_max} bytes", status=413, code="body_too_large")
