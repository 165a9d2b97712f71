"""The bus over one NATS connection: core messages, requests, and the way to the work queue and the registry."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import ssl
from collections.abc import Callable

from nats import errors

from . import subjects
from .base import BusDisconnected, BusError, Delivery, Handler, NoResponders, RequestTimeout
from .client import BusClient, ConnectionLost, describe, mask_url
from .jetstream import status_of
from .jobs import JobLimits, NatsJobQueue
from .registry import NatsRegistry
from .settings import NatsSettings

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
SUBSCRIBE_TIMEOUT_S = 10.0  # longer than a restart of the server
CLOSE_TIMEOUT_S = 2.0


class NatsBus:
    """One connection. `url` may hold credentials and several servers, with commas; `jobs` sets the queue's limits.

    `tls` is for `tls://` addresses with a certificate authority, or a client certificate, of one's own. A process whose
    permissions allow it only some inboxes brings its `inbox_prefix`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        jobs: JobLimits | None = None,
        inbox_prefix: str = "_INBOX",
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url = url
        self._name = name
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._inbox = subjects.under(inbox_prefix, secrets.token_hex(8))
        self._inbox_numbers = itertools.count(1)
        self._replies = subjects.under(self._inbox, "r")
        self._reply_prefix = self._replies + "."
        self._client = BusClient(self._on_state, self._on_fatal)
        self._inbox_prefix = inbox_prefix
        self._waiting: dict[int, asyncio.Future[Delivery]] = {}
        self._request_numbers = itertools.count(1)
        self._listeners: list[Callable[[bool], None]] = []
        self._connected = asyncio.Event()
        self._fatal = asyncio.Event()
        self._fatal_error = BusError("the bus is closed")
        self._is_closing = False
        self._jobs = NatsJobQueue(self, jobs)
        self._registry = NatsRegistry(self)
        self._settings = NatsSettings(self)

    @property
    def jobs(self) -> NatsJobQueue:
        """The durable work queue of prefill jobs."""
        return self._jobs

    @property
    def registry(self) -> NatsRegistry:
        """The cards of the workers."""
        return self._registry

    @property
    def settings(self) -> NatsSettings:
        """What operators decide."""
        return self._settings

    @property
    def is_connected(self) -> bool:
        """Whether a message can be sent now."""
        return self._connected.is_set()

    @property
    def client(self) -> BusClient:
        """The connection itself, for the work queue."""
        return self._client

    @property
    def max_payload(self) -> int:
        """Bytes of the largest message that the server takes."""
        return int(self._client.max_payload)

    async def connect(self) -> None:
        """Raises BusError, with the address and the reason, when nothing answers in time; later it repairs itself."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._client.open(self._url, name=self._name, inbox_prefix=self._inbox_prefix, tls=self._tls)
        except (OSError, errors.Error, TimeoutError) as error:
            cause = self._client.last_error or error
            raise BusError(f"cannot reach NATS at {mask_url(self._url)}: {describe(cause)}") from error
        await self._client.subscribe_direct(subjects.all_under(self._replies), self._on_reply)

    async def aclose(self) -> None:
        """Send what was published and leave."""
        self._is_closing = True
        if not self._client.was_opened:
            return
        await self._jobs.aclose()
        try:
            if self._client.is_connected:
                await self._client.flush(CLOSE_TIMEOUT_S)
        except (TimeoutError, errors.Error) as error:
            log.warning("left NATS without sending everything: %s", describe(error))
            self._client.abort()
        await self._client.close()

    async def fatal(self) -> BusError:
        """Waits until the connection can never work again and returns why."""
        await self._fatal.wait()
        return self._fatal_error

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(is_connected)` on every change."""
        self._listeners.append(listener)

    def _on_state(self, is_connected: bool) -> None:
        if is_connected == self._connected.is_set():
            return
        if is_connected:
            self._connected.set()
        else:
            self._connected.clear()
            for waiter in self._waiting.values():
                if not waiter.done():
                    waiter.set_exception(BusDisconnected("the connection to NATS was lost before the answer came"))
        for listener in tuple(self._listeners):
            try:
                listener(is_connected)
            except Exception:  # One listener's bug must not stop the reconnection.
                log.exception("a listener of the connection failed")

    def _on_fatal(self, reason: str) -> None:
        if self._is_closing:
            return
        self._fatal_error = BusError(f"the connection to NATS at {mask_url(self._url)} cannot work: {reason}")
        log.error("the connection to NATS cannot work: %s", reason)
        self._fatal.set()

    # ---- core messages

    def publish_nowait(self, subject: str, payload: bytes, *, reply: str = "") -> bool:
        """Queue a message for this turn's write; False when not connected or too much is queued already."""
        return self._client.publish_now(subject, payload, reply)

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> NatsSubscription:
        """Returns when the server knows the interest; it is renewed on every new connection."""

        def deliver(raw_subject: bytes, reply: bytes, payload: bytes, header: bytes) -> None:
            handler(_delivery(raw_subject, reply, payload, header))

        subscription_id = await self._client.subscribe_direct(subject, deliver, queue)
        subscription = NatsSubscription(self._client, subscription_id)
        try:
            await self._confirm()
        except BaseException:  # Also when it is cancelled: nobody would ever unsubscribe.
            await subscription.unsubscribe()
            raise
        return subscription

    async def _confirm(self) -> None:
        """Returns when the server has handled what was sent, on this connection or a later one."""
        try:
            async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
                while True:
                    await self._connected.wait()
                    try:
                        return await self._client.flush()
                    except ConnectionLost:
                        await asyncio.sleep(0)
        except TimeoutError:
            raise BusDisconnected(f"NATS did not confirm a subscription in {SUBSCRIBE_TIMEOUT_S:g} s") from None

    def new_inbox(self) -> str:
        """A subject of our own that nobody else uses."""
        return subjects.under(self._inbox, "i", str(next(self._inbox_numbers)))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Publish and wait for one answer. Raises NoResponders at once, RequestTimeout, or BusDisconnected."""
        return (await self.request_raw(subject, payload, timeout_s=timeout_s)).payload

    async def request_raw(self, subject: str, payload: bytes, *, timeout_s: float, header: bytes = b"") -> Delivery:
        """`request` with a NATS header block; the whole answer."""
        number = next(self._request_numbers)
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Delivery] = loop.create_future()
        if not self._client.publish_now(subject, payload, f"{self._reply_prefix}{number}", header):
            raise BusDisconnected("no connection to NATS" if not self.is_connected else "too much is queued for NATS")
        self._waiting[number] = waiter
        timer = loop.call_later(timeout_s, _expire, waiter, subject, timeout_s)
        try:
            answer = await waiter
        finally:
            timer.cancel()
            del self._waiting[number]
        if answer.is_no_responders:
            raise NoResponders(f"nobody listens on {subject}")
        return answer

    def _on_reply(self, raw_subject: bytes, reply: bytes, payload: bytes, header: bytes) -> None:
        waiter = self._waiting.get(int(raw_subject[len(self._reply_prefix) :]))
        if waiter is not None and not waiter.done():
            waiter.set_result(_delivery(raw_subject, reply, payload, header))


class NatsSubscription:
    """One interest in a subject."""

    def __init__(self, client: BusClient, subscription_id: int) -> None:
        self._client = client
        self._subscription_id = subscription_id

    async def unsubscribe(self) -> None:
        """No delivery starts after this returns."""
        await self._client.unsubscribe_direct(self._subscription_id)


def _delivery(subject: bytes, reply: bytes, payload: bytes, header: bytes) -> Delivery:
    """`backslashreplace`: anyone who may publish may send a subject that is not UTF-8."""
    return Delivery(
        subject.decode(errors="backslashreplace"),
        reply.decode(errors="backslashreplace"),
        payload,
        bool(header) and status_of(header) == "503",
    )


def _expire(waiter: asyncio.Future[Delivery], subject: str, timeout_s: float) -> None:
    if not waiter.done():
        waiter.set_exception(RequestTimeout(f"no answer on {subject} in {timeout_s:g} s"))
