"""JetStream's API as typed calls: the few requests, answers and error codes that the work queue and the registry need.

Straight core requests, because nats-py's own context costs 40 us a publish and hides what the server answers.
Names that begin with `$` are NATS's own subjects, fixed by its protocol.
https://docs.nats.io/reference/reference-protocols/nats_api_reference
"""

from __future__ import annotations

import asyncio
from typing import Protocol, TypeVar

import msgspec

from .base import BusError, Delivery, NoResponders, QueueUnavailable, RequestTimeout

API = "$JS.API"
ADVISORY_MAX_DELIVERIES = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES"
API_TIMEOUT_S = 5.0
RETRY_WAIT_S = 0.1

STREAM_NOT_FOUND = 10059
STREAM_EXISTS_DIFFERENTLY = 10058
MESSAGE_NOT_FOUND = 10037
MESSAGE_DELETE_FAILED = 10057  # what MSG.DELETE answers for a sequence that is not there
STORE_FULL = 10077
WRONG_LAST_SEQUENCE = (10071, 10164)  # the second while a replicated stream still applies the first
CONSUMER_EXISTS = 10148  # with another configuration


class ApiFault(msgspec.Struct, frozen=True):
    """Why the server refused."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class JetStreamError(BusError):
    """The server refused a JetStream request; `err_code` says why."""

    def __init__(self, fault: ApiFault) -> None:
        super().__init__(f"JetStream refused: {fault.description} ({fault.err_code})")
        self.err_code = fault.err_code
        self.status = fault.code


class ApiAnswer(msgspec.Struct, frozen=True):
    """Any answer of the API: without an `error` it was done."""

    error: ApiFault | None = None
    success: bool = False


class StreamState(msgspec.Struct, frozen=True):
    """What a stream holds."""

    messages: int = 0
    subjects: dict[str, int] | None = None


class StreamInfo(msgspec.Struct, frozen=True):
    """Answer to STREAM.INFO, CREATE and UPDATE."""

    error: ApiFault | None = None
    config: dict[str, object] = {}
    state: StreamState = StreamState()


class StoredMessage(msgspec.Struct, frozen=True):
    """One message in a stream; `data` is base64 in JSON."""

    subject: str = ""
    seq: int = 0
    data: bytes = b""


class MessageAnswer(msgspec.Struct, frozen=True):
    """Answer to STREAM.MSG.GET."""

    error: ApiFault | None = None
    message: StoredMessage | None = None


class PubAck(msgspec.Struct, frozen=True):
    """Answer to a message published into a stream."""

    error: ApiFault | None = None
    stream: str = ""
    seq: int = 0
    duplicate: bool = False


class MaxDeliveriesAdvisory(msgspec.Struct, frozen=True):
    """A message was delivered as often as it may be."""

    stream: str
    stream_seq: int
    deliveries: int = 0


Answer = TypeVar("Answer", StreamInfo, ApiAnswer, MessageAnswer)


class Requester(Protocol):
    """What JetStream needs of a connection: a request that may carry a header block."""

    async def request_raw(self, subject: str, payload: bytes, *, timeout_s: float, header: bytes = b"") -> Delivery:
        """As Bus.request; the answer may be a status without a payload."""


def api_subject(*tokens: str) -> str:
    """`$JS.API.<tokens>`."""
    return ".".join((API, *tokens))


async def call(bus: Requester, subject: str, body: object, answer_type: type[Answer]) -> Answer:
    """One API request, repeated while nobody answers it (a server starts, a leader is elected).

    Raises QueueUnavailable after 5 s, JetStreamError when the server refuses, BusDisconnected.
    """
    payload = b"" if body is None else msgspec.json.encode(body)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + API_TIMEOUT_S
    while True:
        try:
            timeout_s = max(0.1, min(2.0, deadline - loop.time()))
            delivery = await bus.request_raw(subject, payload, timeout_s=timeout_s)
            break
        except (NoResponders, RequestTimeout) as error:
            if loop.time() + RETRY_WAIT_S > deadline:
                raise QueueUnavailable(f"JetStream did not answer {subject} in {API_TIMEOUT_S:g} s") from error
            await asyncio.sleep(RETRY_WAIT_S)
    answer = msgspec.json.decode(delivery.payload, type=answer_type)
    if answer.error is not None:
        raise JetStreamError(answer.error)
    return answer


async def ensure_stream(bus: Requester, config: dict[str, object], *, may_update: bool) -> None:
    """Create the stream, or bring it to `config` when `may_update`; does nothing when it is so already."""
    name = str(config["name"])
    try:
        info = await call(bus, api_subject("STREAM", "INFO", name), None, StreamInfo)
    except JetStreamError as error:
        if error.err_code != STREAM_NOT_FOUND:
            raise
    else:
        if may_update and any(info.config.get(key) != value for key, value in config.items()):
            await call(bus, api_subject("STREAM", "UPDATE", name), info.config | config, StreamInfo)
        return
    try:
        await call(bus, api_subject("STREAM", "CREATE", name), config, StreamInfo)
    except JetStreamError as error:
        if error.err_code != STREAM_EXISTS_DIFFERENTLY:  # else: somebody else created it just now
            raise


def seconds(value: float) -> int:
    """A duration as JetStream writes it: nanoseconds."""
    return round(value * 1e9)


def status_of(header: bytes) -> str:
    """The status of a header block without a message: "503" of `NATS/1.0 503`, "" when there is none."""
    return header[9:12].decode() if header.startswith(b"NATS/1.0 ") else ""


async def ensure_bucket(bus: Requester, stream: str, subject: str, *, replicas: int) -> None:
    """Create a key-value bucket that keeps the last value of each key, 64 KiB at most, unless it is there."""
    config: dict[str, object] = {
        "name": stream,
        "subjects": [subject],
        "storage": "file",
        "discard": "new",
        "max_msgs_per_subject": 1,
        "max_msg_size": 1 << 16,
        "num_replicas": replicas,
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "deny_delete": True,
    }
    await ensure_stream(bus, config, may_update=False)
