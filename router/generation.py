"""The border between the API (text, HTTP) and the router core (workers, jobs): what one side asks and the other answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from ..bus.ids import RequestId, WorkerId
from ..bus.messages import EntryDetail, SamplingParams
from .admission import Refusal
from .control_messages import Receipt


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to make (a request with n=3 is three of them): validated, templated and tokenized."""

    request_id: RequestId
    model: str
    packed_tokens: bytes  # the prompt, bus.messages.pack_tokens
    prompt_tokens: int
    sampling: SamplingParams
    deadline_s: float  # on the router's monotonic clock
    salt: str = ""  # of the prefix cache (tenant); "" : shared
    explains: bool = False  # the client asked for its receipt
    tenant: str = ""  # who asks; limits and fair shares are by tenant
    priority: int = 0  # higher goes first
    session_id: str = ""  # of the conversation, where the client says so


@dataclass(frozen=True, slots=True)
class Started:
    """A decode worker has admitted it; tokens may already be in the stream."""

    stream_id: int
    plan: str  # "remote": a prefill worker computes the prompt; "local": the decode worker does
    decode_worker: WorkerId
    why: str


class RouterError(Exception):
    """A request that could not be started. `status` and `code` are what the client gets."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, retry_after_s: float | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.param = param


class NoWorker(RouterError):
    """No live decode worker serves the model now."""

    status = 503
    code = "no_worker"


class Overloaded(RouterError):
    """Every worker, the queue or this router is full."""

    status = 429
    code = "overloaded"


class Rejected(RouterError):
    """No worker can ever serve it (too long for the model, a parameter the engine refuses)."""

    status = 400
    code = "invalid_request"


def refused(refusal: Refusal) -> RouterError:
    """What the client hears of limits: 400 for what can never fit, 429 for its own, 503 for the pool's."""
    error = RouterError(refusal.detail, retry_after_s=refusal.retry_after_s or None)
    error.status = {"too_large": 400, "tenant_limit": 429}.get(refusal.reason, 503)
    error.code = refusal.reason
    return error


class StreamEvents(Protocol):
    """What the token path tells the router core, from inside the bus callback: short, never blocks."""

    def on_first_token(self, stream_id: int, detail: EntryDetail | None) -> None:
        """The first token of the stream was accepted."""

    def on_gap(self, stream_id: int, next_index: int) -> None:
        """Tokens from `next_index` on are missing: ask the worker for a replay. Called at most once per gap and turn."""

    def on_end(self, stream_id: int, finish: int, output_tokens: int, detail: EntryDetail | None) -> None:
        """The worker's terminal entry was accepted (FINISH_*); the stream is closed."""

    def on_stop_string(self, stream_id: int, output_tokens: int) -> None:
        """A stop string was found: the stream is closed and the worker should stop."""

    def on_late_end(self, worker: WorkerId, stream_id: int, attempt: int) -> None:
        """A terminal entry for a stream that is not open any more: acknowledge it again."""


class TokenStreams(Protocol):
    """What the router core needs of the token path (`api/stream.py`)."""

    def rebind(self, stream_id: int, attempt: int) -> None:
        """Only tokens of `attempt` count from now on; the stream keeps its place (its next index)."""

    def next_index(self, stream_id: int) -> int | None:
        """The next token that the stream waits for; None when it is not open."""

    def fail(self, stream_id: int, failure: Failure) -> None:
        """End the stream with one error event; unknown ids are ignored."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an accepted request ended without an answer."""

    code: str  # "decode_worker_lost", "timeout", "engine_error", "shutting_down", ...
    message: str
    is_retryable: bool
    status: int = 503  # used when no byte was sent yet
    retry_after_s: float | None = field(default=None)


class RouterCore(Protocol):
    """What the API needs of the router core (`router.py`)."""

    async def start(self, generation: Generation, stream_id: int) -> Started:
        """Choose workers and get the request admitted. The stream must be open in the token path. Raises RouterError."""

    def cancel(self, stream_id: int) -> None:
        """The client has gone or gave up: free everything the request holds. Unknown ids are ignored."""

    def models(self) -> list[str]:
        """Names that clients may ask for."""

    def not_ready_reason(self) -> str | None:
        """None when requests can be served now."""

    def receipt(self, request_id: RequestId) -> Receipt | None:
        """Why a request that is still remembered went where it went."""

    def prompt_tokens_max(self) -> int | None:
        """The longest prompt plus output that some worker takes; None while no worker is known."""
