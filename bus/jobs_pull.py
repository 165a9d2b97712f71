"""One worker's open pull on the work queue, and the job that comes through it.

nats-py's fetch() loses a job when it is cancelled and hides a deleted consumer; this keeps one request open at the server,
asks again whenever the server may have lost it, takes it back when there is no room for jobs any more (else a busy worker
gets what an idle one waits for), and keeps a job that comes when nobody waits.
https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-13.md
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

import msgspec
import xxhash

from . import subjects
from .base import BusDisconnected, BusError, NoResponders, QueueUnavailable, RequestTimeout, Room
from .jetstream import MESSAGE_DELETE_FAILED, ApiAnswer, api_subject, seconds, status_of

if TYPE_CHECKING:
    from .jobs import NatsJobQueue
    from .nats_bus import NatsBus

log = logging.getLogger(__name__)

PULL_EXPIRES_S = 5.0  # so long a worker that hangs can still be given a job
HEARTBEAT_S = 2.0
SILENCE_S = 2.5 * HEARTBEAT_S  # two heartbeats missed: the server has forgotten the request
BACKOFF_S = 0.25  # an election, a starting server
CONFIRM_TRY_S = 0.5  # an answer takes 1 ms
CONFIRM_TIMEOUT_S = 10.0  # for ack and term: longer than the election of a new stream leader (4.5 to 8 s)

TAKE_TIMEOUT_S = 0.5  # an answer takes 1 ms
BATCH_MAX = 256  # jobs of one request

_NAK = b"-NAK"
"""Back to the queue, now."""


def one_job() -> int:
    """The room of who takes one job at a time."""
    return 1


def nak_payload(delay_s: float) -> bytes:
    """Back to the queue, after a while."""
    return _NAK if delay_s <= 0 else b'-NAK {"delay": %d}' % seconds(delay_s)


class OpenPull:
    """What is known of the request at the server; plain state, told the time."""

    def __init__(self) -> None:
        self.is_open = False
        self._heard_at = 0.0
        self._expires_at = 0.0
        self._not_before = 0.0
        self.is_consumer_in_doubt = False
        self.due = 0  # jobs that may still come for it

    def sent(self, now: float, batch: int = 1) -> None:
        """A request for so many jobs went out."""
        self.is_open, self._heard_at, self._expires_at = True, now, now + PULL_EXPIRES_S + 1.0
        self.due = batch

    def on_job(self) -> bool:
        """A job came; False: one too many, for a request that was thought lost."""
        was_due = self.due > 0
        self.due = max(0, self.due - 1)
        if not self.due:
            self.is_open = False
        return was_due

    def withdrawn(self) -> None:
        """The request was taken back."""
        self.is_open, self.due = False, 0

    def on_status(self, status: str, description: bytes, now: float) -> None:
        """The server spoke without a job."""
        if status == "100":
            self._heard_at = now
            return
        self.is_open = False
        if status in ("404", "408"):  # expired: simply ask again
            return
        self._not_before = now + BACKOFF_S
        # 503: nobody answers for the consumer. 409 is also said at a change of leader or a full waiting list.
        self.is_consumer_in_doubt = status == "503" or (status == "409" and b"deleted" in description.lower())

    def on_disconnected(self) -> None:
        """The server drops a request whose inbox is gone."""
        self.is_open, self._not_before = False, 0.0

    def wait_s(self, now: float) -> float:
        """How long nothing needs doing; 0.0: ask (again) now."""
        if self.is_open:
            until = min(self._heard_at + SILENCE_S, self._expires_at)
            if until <= now:
                self.is_open = False
                return 0.0
            return until - now
        return max(0.0, self._not_before - now)


class NatsJobPuller:
    """One request at a time, for as many jobs as there is room for."""

    def __init__(self, bus: NatsBus, queue: NatsJobQueue, subject: str, room: Room) -> None:
        self._bus = bus
        self._queue = queue
        self._subject = subject
        self._room = room
        self._pull_subject = _pull_subject(consumer_name(subject))
        self._inbox = bus.new_inbox()
        self._subscription_id = 0
        self._open_pull = OpenPull()
        self._ready: deque[NatsJob] = deque()
        self._news = asyncio.Event()
        self._is_waited = False
        self._give_back: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def outstanding(self) -> int:
        """Jobs that have been asked for and not been pulled yet."""
        return len(self._ready) + (self._open_pull.due if self._open_pull.is_open else 0)

    def room_changed(self) -> None:
        """Ask, or take the request back."""
        self._news.set()

    async def open(self) -> None:
        """Listen on the inbox. Delivered jobs carry their own subject, so the inbox belongs to this puller alone."""
        self._subscription_id = await self._bus.client.subscribe_direct(self._inbox, self._on_message)

    async def pull(self) -> NatsJob:
        """Wait for the next job. Cancelling it keeps the request open: the next call takes what came for it."""
        if self._is_waited or self._is_closed:
            raise ValueError("this puller is closed or somebody waits on it already")
        self._is_waited = True
        loop = asyncio.get_running_loop()
        try:
            while not self._ready:
                self._news.clear()
                wait_s = await self._act(loop.time())
                try:
                    async with asyncio.timeout(wait_s):
                        await self._news.wait()
                except TimeoutError:
                    pass
                if self._is_closed:
                    raise BusError("the puller was closed while somebody waited on it")
            if self._give_back is not None:
                self._give_back.cancel()
                self._give_back = None
            return self._ready.popleft()
        finally:
            self._is_waited = False

    async def _act(self, now: float) -> float:
        """Ask the server when it is time to; how long to wait for news after that."""
        state = self._open_pull
        room = min(self._room(), BATCH_MAX)
        if room <= 0:
            await self._withdraw()
            return 0.0 if self._ready else PULL_EXPIRES_S
        wait_s = state.wait_s(now)
        if wait_s > 0:
            return wait_s
        if not self._bus.is_connected:
            return PULL_EXPIRES_S  # the reconnection is news
        if state.is_consumer_in_doubt:
            try:
                await self._queue.ensure_consumer(self._subject)
            except BusError as error:
                log.warning("the work queue is away: %s", error)
                return BACKOFF_S
            state.is_consumer_in_doubt = False
        request = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (
            room, seconds(PULL_EXPIRES_S), seconds(HEARTBEAT_S),
        )  # fmt: skip
        if not self._bus.publish_nowait(self._pull_subject, request, reply=self._inbox):
            return BACKOFF_S
        state.sent(asyncio.get_running_loop().time(), room)
        return HEARTBEAT_S

    async def _withdraw(self) -> None:
        """Without its inbox the server drops the request; what is on its way already still comes."""
        if not self._open_pull.is_open or not self._bus.is_connected:
            return
        old, self._inbox = self._subscription_id, self._bus.new_inbox()
        await self.open()
        if await self._bus.client.retire_direct(old):
            self._open_pull.withdrawn()

    def on_connection(self, is_connected: bool) -> None:
        """Called by the queue at each change."""
        if not is_connected:
            self._open_pull.on_disconnected()
        self._news.set()

    def _on_message(self, subject: bytes, reply: bytes, payload: bytes, header: bytes) -> None:
        loop = asyncio.get_running_loop()
        if header and not reply and (status := status_of(header)).isdigit():
            self._open_pull.on_status(status, header, loop.time())
        else:
            self._take(NatsJob(self._bus, payload, reply.decode()), loop)
        self._news.set()

    def _take(self, job: NatsJob, loop: asyncio.AbstractEventLoop) -> None:
        if not self._open_pull.on_job() or self._is_closed:
            self._bus.publish_nowait(job.ack_subject, _NAK)
            return
        self._ready.append(job)
        if (
            not self._is_waited and self._give_back is None
        ):  # A cancelled pull. Another worker should get it before `ack_wait_s` runs out.
            wait_s = min(2.0, self._queue.limits.ack_wait_s / 3)
            self._give_back = loop.call_later(wait_s, self._give_back_ready)

    def _give_back_ready(self) -> None:
        self._give_back = None
        if not self._is_waited:
            for job in self._ready:
                self._bus.publish_nowait(job.ack_subject, _NAK)
            self._ready.clear()

    async def aclose(self) -> None:
        """Give back what arrived but was never pulled. Without its inbox the server drops the open request."""
        if self._is_closed:
            return
        self._is_closed = True
        self._queue.forget(self)
        self._news.set()
        if self._give_back is not None:
            self._give_back.cancel()
        for job in self._ready:
            self._bus.publish_nowait(job.ack_subject, _NAK)
        self._ready.clear()
        await self._bus.client.unsubscribe_direct(self._subscription_id)


class NatsJob:
    """One delivery of one job."""

    __slots__ = ("_ack_subject", "_bus", "_payload")

    def __init__(self, bus: NatsBus, payload: bytes, ack_subject: str) -> None:
        self._bus = bus
        self._payload = payload
        self._ack_subject = ack_subject

    @property
    def payload(self) -> bytes:
        """The job as it was published."""
        return self._payload

    @property
    def ack_subject(self) -> str:
        """With it, anyone may nak on this worker's behalf."""
        return self._ack_subject

    @property
    def behind(self) -> int:
        """Jobs that were in its lane behind it when it was delivered."""
        return int(self._fact(8))

    @property
    def delivery(self) -> int:
        """1 for the first delivery of this job, and again after a crash of the server: it does not sync the count."""
        return int(self._fact(4))

    def _fact(self, place: int) -> str:
        """A token of $JS.ACK.<stream>.<consumer>.<delivered>.<sequence>...; some servers put <domain>.<account> before them."""
        tokens = self._ack_subject.split(".")
        return tokens[place if len(tokens) == 9 else place + 2]

    async def ack(self) -> None:
        """Returns when the queue has removed the job; raises QueueUnavailable after 10 s."""
        await self._remove(b"+ACK")

    async def nak(self, delay_s: float = 0.0) -> None:
        """Give it back, to be delivered again after `delay_s`; unheard, it comes again after `ack_wait_s`."""
        try:
            await self._bus.request_raw(self._ack_subject, nak_payload(delay_s), timeout_s=CONFIRM_TRY_S)
        except (NoResponders, RequestTimeout, BusDisconnected) as error:
            log.info("a job was given back without an answer: %s", error)

    async def in_progress(self) -> None:
        """Restart `ack_wait_s`. While disconnected nothing can be done, and nothing is."""
        self._bus.publish_nowait(self._ack_subject, b"+WPI")

    async def term(self, reason: str) -> None:
        """Remove it without an effect; raises QueueUnavailable after 10 s."""
        await self._remove(b"+TERM " + reason.encode())

    async def _remove(self, verdict: bytes) -> None:
        """Repeated until the server answers: a plain ack is lost with the process that sent it last."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CONFIRM_TIMEOUT_S
        while True:
            try:
                try:
                    await self._bus.request_raw(self._ack_subject, verdict, timeout_s=CONFIRM_TRY_S)
                except RequestTimeout:
                    await self._delete()
                return
            except (NoResponders, RequestTimeout, BusDisconnected, QueueUnavailable) as error:
                if loop.time() + BACKOFF_S > deadline:
                    raise QueueUnavailable(f"the work queue did not confirm {verdict[:5]!r}: {error}") from error
            await asyncio.sleep(BACKOFF_S)

    async def _delete(self) -> None:
        """For a server that was killed: it forgets its last deliveries, and answers no ack for them."""
        subject = api_subject("STREAM", "MSG", "DELETE", subjects.PREFILL_STREAM)
        body = b'{"seq":%d,"no_erase":true}' % int(self._fact(5))
        answer = await self._bus.request_raw(subject, body, timeout_s=CONFIRM_TRY_S)
        error = msgspec.json.decode(answer.payload, type=ApiAnswer).error
        if error is not None and error.code >= 500 and error.err_code != MESSAGE_DELETE_FAILED:
            raise QueueUnavailable(error.description)  # else: it was removed before


def consumer_name(subject: str) -> str:
    """The lane's durable consumer: readable, and its own even where two subjects read alike."""
    return f"{subject.replace('.', '_')}-{xxhash.xxh3_64_hexdigest(subject.encode())[:8]}"


def _pull_subject(consumer: str) -> str:
    return api_subject("CONSUMER", "MSG", "NEXT", subjects.PREFILL_STREAM, consumer)


async def take_now(bus: NatsBus, consumer: str) -> NatsJob | None:
    """One request that does not wait. Raises NoResponders when there is no such consumer; cancelling it loses no job."""
    answer: asyncio.Future[NatsJob | str] = asyncio.get_running_loop().create_future()

    def on_message(_: bytes, reply: bytes, payload: bytes, header: bytes) -> None:
        is_status = bool(header) and not reply and status_of(header).isdigit()
        if answer.done():
            if not is_status:
                bus.publish_nowait(reply.decode(), _NAK)
        else:
            answer.set_result(status_of(header) if is_status else NatsJob(bus, payload, reply.decode()))

    inbox = bus.new_inbox()
    subscription_id = await bus.client.subscribe_direct(inbox, on_message)
    try:
        if not bus.publish_nowait(_pull_subject(consumer), b'{"batch":1,"no_wait":true}', reply=inbox):
            return None
        async with asyncio.timeout(TAKE_TIMEOUT_S):
            got = await asyncio.shield(answer)
    except TimeoutError:
        answer.cancel()
        return None
    except asyncio.CancelledError:
        if answer.done() and isinstance(job := answer.result(), NatsJob):
            bus.publish_nowait(job.ack_subject, _NAK)
        answer.cancel()
        raise
    finally:
        await bus.client.retire_direct(subscription_id)
    if got == "503":
        raise NoResponders(f"no consumer {consumer}")
    return got if isinstance(got, NatsJob) else None
