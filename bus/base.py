"""What a bus is: the contract that `nats_bus` and `memory_bus` both keep (tests/bus/test_contract.py).

Core messages are fast and may be lost (their users detect and repair it); jobs in the work queue are durable and
delivered at least once until acked; the registry keeps the last card of each worker, the settings what operators decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .ids import WorkerId
from .messages import WorkerCard


class BusError(Exception):
    """A failure of the bus that its caller can act on."""


class NoResponders(BusError):
    """Nobody listens on the subject: the worker or router behind it has gone."""


class RequestTimeout(BusError):
    """No answer came in time; it may still have been handled."""


class BusDisconnected(BusError):
    """There is no connection to the server now; what was in flight may or may not have arrived."""


class QueueFull(BusError):
    """The work queue is at its limit; nothing was stored."""


class QueueUnavailable(BusError):
    """The work queue did not confirm the job; it may or may not be stored (publishing again with the same id is safe)."""


class SettingChanged(BusError):
    """The stored document is not the one that was to be replaced; nothing was stored."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One core message as its subscriber gets it."""

    subject: str
    reply: str  # "" when no answer is expected
    payload: bytes
    is_no_responders: bool = False  # the server's 503 for a message published with a `reply` of ours


Handler = Callable[[Delivery], None]
"""Called inside the read loop: short, never blocks. What it raises is logged and counted and costs no other message."""


class Subscription(Protocol):
    """One interest in a subject."""

    async def unsubscribe(self) -> None:
        """No delivery starts after this returns."""


class PulledJob(Protocol):
    """One delivery of one job. Exactly one of ack, nak, term ends it; without any the job comes again after `ack_wait_s`."""

    @property
    def payload(self) -> bytes: ...

    @property
    def delivery(self) -> int:
        """1 for the first delivery of this job."""

    @property
    def behind(self) -> int:
        """Jobs that were in its lane behind it when it was delivered."""

    @property
    def ack_subject(self) -> str:
        """With it, anyone may nak on this worker's behalf (`JobQueue.nak_for`)."""

    async def ack(self) -> None:
        """The effect has happened: returns when the queue has removed the job. A second ack is harmless."""

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give it back, to be delivered again after `delay_s`."""

    async def in_progress(self) -> None:
        """Still working: restarts `ack_wait_s`."""

    async def term(self, reason: str) -> None:
        """Remove it without an effect."""


Room = Callable[[], int]
"""How many jobs its owner would take now; 0: none."""


class JobPuller(Protocol):
    """One open request for a lane's jobs: for as many as there is room for, taken back when there is none any more."""

    @property
    def outstanding(self) -> int:
        """Jobs that have been asked for and not been pulled yet."""

    async def pull(self) -> PulledJob:
        """Wait for the next job; survives reconnects and restarts of the server. Cancelling it loses no job."""

    def room_changed(self) -> None:
        """Its owner's room is another one now."""

    async def aclose(self) -> None:
        """Give back what arrived but was never pulled."""


class JobQueue(Protocol):
    """The durable work queue of prefill jobs."""

    async def publish(self, subject: str, payload: bytes, *, job_id: str, ttl_s: float) -> int:
        """Store a job and return its sequence number. Within two minutes the same `job_id` is stored once.

        Raises QueueFull, QueueUnavailable or BusDisconnected.
        """

    async def puller(self, subject: str, room: Room = ...) -> JobPuller:
        """A puller on the jobs of `subject`, one at a time unless told the `room`; all pullers of a subject share its jobs."""

    async def take(self, subject: str) -> PulledJob | None:
        """The next job of a lane if there is one now, also of a lane whose worker is gone. Raises BusError."""

    async def delete(self, sequence: int) -> bool:
        """Remove a job that nobody needs any more; False when it was not there."""

    def nak_for(self, ack_subject: str, delay_s: float = 0.0) -> None:
        """Give a dead worker's job back to the queue at once."""

    async def watch_exhausted(self, handler: Callable[[bytes], None]) -> Subscription:
        """Call `handler(payload)` for each job that was delivered `max_deliver` times in vain; the job is removed."""


class Registry(Protocol):
    """The cards of the workers. Not a sign of life: that is the heartbeat."""

    async def put(self, card: WorkerCard) -> None: ...

    async def get(self, worker: WorkerId) -> WorkerCard | None: ...

    async def delete(self, worker: WorkerId) -> None: ...

    async def list(self) -> list[WorkerCard]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """One stored document. `revision` grows with every change, not always by one."""

    value: bytes
    revision: int


class Settings(Protocol):
    """Small documents that outlive every process, one under each key; nobody is told of a change by the store itself."""

    async def get(self, key: str) -> Setting | None:
        """The newest, or None."""

    async def put(self, key: str, value: bytes, *, after: int | None) -> int:
        """Store it in place of revision `after` (None: of nothing) and return its own revision.

        Raises SettingChanged when somebody else was faster, QueueUnavailable when it may or may not be stored.
        """


class Bus(Protocol):
    """One process's connection to everybody else."""

    @property
    def jobs(self) -> JobQueue: ...

    @property
    def registry(self) -> Registry: ...

    @property
    def settings(self) -> Settings: ...

    @property
    def is_connected(self) -> bool: ...

    async def connect(self) -> None:
        """Raises BusError, with the address and the reason, when the first connection fails; later ones repair themselves."""

    async def aclose(self) -> None:
        """Send what was published and leave."""

    def publish_nowait(self, subject: str, payload: bytes, *, reply: str = "") -> bool:
        """Queue a core message; it is written in this turn of the loop. False: not connected or the outbound buffer is full,
        and nothing was queued. With `reply`, the server's 503 comes there when nobody listens on `subject`."""

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Returns when the server knows the interest. With `queue`, each message goes to one subscriber of that group."""

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Publish and wait for one answer. Raises NoResponders at once, RequestTimeout, or BusDisconnected."""

    def new_inbox(self) -> str:
        """A subject of our own that nobody else uses, for `reply`; subscribe to it first."""

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(is_connected)` on every change, from the loop."""

    async def fatal(self) -> BusError:
        """Waits until the connection can never work again (a denied permission, closed for good) and returns why."""
