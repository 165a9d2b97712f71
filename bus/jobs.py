"""The durable work queue on JetStream: publish until stored, pull, and hand back what nobody finished.

One stream for all pools, one durable consumer for each lane. What the server does and this relies on
(nats-server 2.15): `discard: new` refuses at the limit with 10077; a repeated Nats-Msg-Id within the window is
stored once; Nats-TTL (whole seconds) removes a job nobody finished; ack, nak, term and in-progress work from any connection
that knows the ack subject; a job delivered `max_deliver` times stays stored and is announced once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from . import subjects
from .base import BusDisconnected, BusError, Delivery, NoResponders, QueueFull, QueueUnavailable, RequestTimeout, Room
from .jetstream import (
    ADVISORY_MAX_DELIVERIES,
    CONSUMER_EXISTS,
    MESSAGE_DELETE_FAILED,
    MESSAGE_NOT_FOUND,
    STORE_FULL,
    STREAM_NOT_FOUND,
    ApiAnswer,
    JetStreamError,
    MaxDeliveriesAdvisory,
    MessageAnswer,
    PubAck,
    api_subject,
    call,
    ensure_stream,
    seconds,
)
from .jobs_pull import NatsJob, NatsJobPuller, consumer_name, nak_payload, one_job, take_now

if TYPE_CHECKING:
    from .nats_bus import NatsBus, NatsSubscription

log = logging.getLogger(__name__)

STREAM = subjects.PREFILL_STREAM
DEDUP_WINDOW_S = 120.0  # longer than any router goes on publishing one attempt
WATCHERS = "hk-exhausted"  # queue group: one router handles each exhausted job
ACK_PENDING_MAX = 10_000  # jobs that all workers of a lane hold at once; past it the queue waits
PULLS_WAITING_MAX = 16_384  # open pulls of a lane; a pull past it would be refused without a word
LANE_IDLE_S = (
    900.0  # nobody pulls from a worker's lane any more: the server may forget its consumer; who needs it makes it again
)
PUBLISH_RETRY_S = 0.05

_pub_ack = msgspec.json.Decoder(PubAck)
_advisory = msgspec.json.Decoder(MaxDeliveriesAdvisory)
_JOB_ID = re.compile(r"[!-~]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class JobLimits:
    """How the work queue is set up. The first bus creates it; a bus that is given limits of its own also updates it."""

    max_jobs: int = 100_000
    max_bytes: int = 1 << 30
    max_job_bytes: int = 8 << 20
    ack_wait_s: float = 15.0  # a worker says `in_progress` every third of it
    max_deliver: int = 4
    replicas: int = 1  # 3 in production
    publish_timeout_s: float = 1.0  # then the caller has another way (a direct request to a worker)
    publish_try_s: float = 0.3  # without an answer the job is sent again, under the same id


class NatsJobQueue:
    """The work queue as one bus sees it."""

    def __init__(self, bus: NatsBus, limits: JobLimits | None) -> None:
        self._bus = bus
        self._limits = limits or JobLimits()
        self._may_update = limits is not None
        self._is_ensured = False
        self._ensuring = asyncio.Lock()
        self._pullers: dict[NatsJobPuller, None] = {}
        self._reports: set[asyncio.Task[None]] = set()
        bus.on_connection(self._on_connection)

    @property
    def limits(self) -> JobLimits:
        """What this bus assumes of the queue."""
        return self._limits

    async def publish(self, subject: str, payload: bytes, *, job_id: str, ttl_s: float) -> int:
        """Store a job, trying again under the same id for `publish_timeout_s`; its sequence number."""
        check_job(payload, job_id, ttl_s, self._limits)
        if not self._bus.is_connected:
            raise BusDisconnected("no connection to NATS")
        header = f"NATS/1.0\r\nNats-Msg-Id: {job_id}\r\nNats-TTL: {math.ceil(ttl_s)}\r\n\r\n".encode()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.publish_timeout_s
        while True:
            try:
                if not self._is_ensured:
                    async with asyncio.timeout_at(deadline):
                        await self._ensure()
                return await self._publish_once(subject, payload, header, deadline - loop.time())
            except (NoResponders, RequestTimeout, BusDisconnected, QueueUnavailable, TimeoutError) as error:
                if isinstance(error, NoResponders):
                    self._is_ensured = False  # The stream may be gone: a server without its old store.
                if loop.time() + PUBLISH_RETRY_S >= deadline:
                    raise QueueUnavailable(f"the work queue did not confirm job {job_id}: {error}") from error
            await asyncio.sleep(PUBLISH_RETRY_S)

    async def _publish_once(self, subject: str, payload: bytes, header: bytes, left_s: float) -> int:
        timeout_s = max(0.01, min(self._limits.publish_try_s, left_s))
        answer = await self._bus.request_raw(subject, payload, timeout_s=timeout_s, header=header)
        ack = _pub_ack.decode(answer.payload)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code == STORE_FULL:
            raise QueueFull(f"the work queue is full: {ack.error.description}")
        raise QueueUnavailable(str(JetStreamError(ack.error)))

    async def puller(self, subject: str, room: Room = one_job) -> NatsJobPuller:
        """One open request for jobs of `subject`."""
        await self.ensure_consumer(subject)
        puller = NatsJobPuller(self._bus, self, subject, room)
        await puller.open()
        self._pullers[puller] = None
        return puller

    async def take(self, subject: str) -> NatsJob | None:
        """The next job of a lane if there is one now."""
        try:
            return await take_now(self._bus, consumer_name(subject))
        except NoResponders:  # Nobody has pulled from it yet, or for long.
            await self.ensure_consumer(subject)
            return await take_now(self._bus, consumer_name(subject))

    def forget(self, puller: NatsJobPuller) -> None:
        """A puller was closed."""
        self._pullers.pop(puller, None)

    async def delete(self, sequence: int) -> bool:
        """Remove a job; False when it was not there."""
        try:
            body = {"seq": sequence, "no_erase": True}
            return (await call(self._bus, api_subject("STREAM", "MSG", "DELETE", STREAM), body, ApiAnswer)).success
        except JetStreamError as error:
            if error.err_code in (MESSAGE_NOT_FOUND, MESSAGE_DELETE_FAILED, STREAM_NOT_FOUND):
                return False
            raise

    def nak_for(self, ack_subject: str, delay_s: float = 0.0) -> None:
        """Give a dead worker's job back; does nothing while disconnected (`ack_wait_s` does it then)."""
        self._bus.publish_nowait(ack_subject, nak_payload(delay_s))

    async def watch_exhausted(self, handler: Callable[[bytes], None]) -> NatsSubscription:
        """Call `handler(payload)` for each job delivered in vain, in one of all watching processes."""
        await self._ensure()

        def on_advisory(delivery: Delivery) -> None:
            advisory = _advisory.decode(delivery.payload)
            task = asyncio.get_running_loop().create_task(
                self._report(advisory.stream_seq, handler), name=f"exhausted job {advisory.stream_seq}"
            )
            self._reports.add(task)
            task.add_done_callback(self._reports.discard)

        subject = subjects.all_under(subjects.under(ADVISORY_MAX_DELIVERIES, STREAM))
        return await self._bus.subscribe(subject, on_advisory, queue=WATCHERS)

    async def _report(self, sequence: int, handler: Callable[[bytes], None]) -> None:
        """Handle first, remove after: a crash between the two reports the job twice rather than never."""
        try:
            body = {"seq": sequence}
            answer = await call(self._bus, api_subject("STREAM", "MSG", "GET", STREAM), body, MessageAnswer)
            if answer.message is not None:
                handler(answer.message.data)
                await self.delete(sequence)
        except BusError as error:  # Expired or acked just now; or its time to live ends it.
            log.warning("could not report exhausted job %d: %s", sequence, error)

    # ---- stream and consumers

    async def _ensure(self) -> None:
        async with self._ensuring:
            if not self._is_ensured:
                await ensure_stream(self._bus, self._stream_config(), may_update=self._may_update)
                self._is_ensured = True

    async def ensure_consumer(self, subject: str) -> str:
        """The durable consumer of a lane, created when it is not there; its name."""
        await self._ensure()
        name = consumer_name(subject)
        config = {
            "name": name,
            "durable_name": name,
            "filter_subject": subject,
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "replay_policy": "instant",
            "ack_wait": seconds(self._limits.ack_wait_s),
            "max_deliver": self._limits.max_deliver,
            "max_ack_pending": ACK_PENDING_MAX,
            "max_waiting": PULLS_WAITING_MAX,
            "num_replicas": 0,  # as the stream
        }
        if subjects.is_lane(subject):  # Of a worker that will not come back under this name.
            config["inactive_threshold"] = seconds(LANE_IDLE_S)
        body = {"stream_name": STREAM, "config": config, "action": "" if self._may_update else "create"}
        try:
            await call(self._bus, api_subject("CONSUMER", "CREATE", STREAM, name, subject), body, ApiAnswer)
        except JetStreamError as error:
            if error.err_code == STREAM_NOT_FOUND:
                self._is_ensured = False
            if error.err_code != CONSUMER_EXISTS:  # else: there with another bus's limits, which is fine
                raise
        return name

    def _stream_config(self) -> dict[str, object]:
        limits = self._limits
        return {
            "name": STREAM,
            "subjects": [subjects.prefill_jobs_all()],
            "retention": "workqueue",
            "storage": "file",
            "discard": "new",
            "num_replicas": limits.replicas,
            "max_msgs": limits.max_jobs,
            "max_bytes": limits.max_bytes,
            "max_msg_size": limits.max_job_bytes + 1024,  # with the header block
            "duplicate_window": seconds(DEDUP_WINDOW_S),
            "allow_msg_ttl": True,
        }

    def _on_connection(self, is_connected: bool) -> None:
        for puller in tuple(self._pullers):
            puller.on_connection(is_connected)

    async def aclose(self) -> None:
        """Give back what was pulled and not taken; finish the reports that run."""
        for puller in tuple(self._pullers):
            await puller.aclose()
        for report in tuple(self._reports):
            report.cancel()
        if self._reports:
            await asyncio.wait(tuple(self._reports), timeout=1.0)


def check_job(payload: bytes, job_id: str, ttl_s: float, limits: JobLimits) -> None:
    """Raises ValueError for what no queue takes; the id goes into a header line."""
    if not _JOB_ID.match(job_id):
        raise ValueError(f"a job id is 1 to 128 visible ASCII characters, got {job_id!r}")
    if not ttl_s > 0:
        raise ValueError(f"ttl_s must be more than 0, got {ttl_s}")
    if len(payload) > limits.max_job_bytes:
        raise ValueError(f"a job of {len(payload)} B exceeds the queue's {limits.max_job_bytes} B")
