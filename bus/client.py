"""nats-py's client, hardened for serving: nothing may stop it silently, and a message costs little.

What stock nats-py 2.16 does and this does not:
- A cancelled flush() or a subject that is not UTF-8 ends the read loop while `is_connected` stays true.
- flush() writes its PING ahead of queued publishes, so it confirms nothing.
- An -ERR from the server closes it for good; a denied publish is only a log line. Here the first reconnects, the second is fatal.
- A half-open connection hangs the reconnection in `wait_closed()`; an unexpected line in the handshake leaves it CONNECTING.
- What was published before a disconnect is sent after it, when nobody is subscribed yet.
Messages go to synchronous handlers inside the read loop (`parser.py`); nats-py keeps the servers, TLS, authentication and
the reconnection loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import ssl
from collections.abc import Callable
from urllib.parse import unquote, urlsplit

from nats import errors
from nats.aio.client import Client, Server, Srv
from nats.aio.subscription import Subscription as NatsSubscription

from .parser import MessageHandler, Parser

log = logging.getLogger(__name__)

READ_BYTES = 1 << 18  # of one socket read: 4 KiB messages cost 30% less CPU than with nats-py's 32 KiB
OUTBOUND_BYTES_MAX = 32 << 20  # queued here and in the socket's buffer: four of the largest messages
RECONNECT_WAIT_S = 0.1
PING_INTERVAL_S = 5.0  # twice unanswered: a half-open connection is left after 10 to 15 s
HANDSHAKE_S = 2.0

_UNSAFE = re.compile(r"[\s\x00]")
_FATAL = ("permissions violation", "authorization violation", "authentication expired", "authentication revoked")


class ConnectionLost(errors.Error):  # type: ignore[misc]  # nats-py has no types
    """The connection ended while something waited for its answer."""


def mask_url(url: str) -> str:
    """The URL (or several, with commas) without its password or token."""
    return re.sub(r"//[^@/,]*@", "//***@", url)


def split_url(url: str) -> tuple[list[str], str | None, str | None]:
    """Servers without credentials, user and password; a user alone is a token.

    The credentials go beside the servers, because a server that the cluster announces later has none in its address.
    """
    servers, user, password = [], None, None
    for address in url.split(","):
        parts = urlsplit(address.strip() if "//" in address else f"nats://{address.strip()}")
        if parts.scheme not in ("nats", "tls") or not parts.hostname:
            raise ValueError(f"a NATS address is nats://host:port or tls://host:port, got {mask_url(address)!r}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        servers.append(f"{parts.scheme}://{host}:{parts.port or 4222}")
        if parts.username is not None:
            user = unquote(parts.username)
            password = None if parts.password is None else unquote(parts.password)
    return servers, user, password


class BusClient(Client):  # type: ignore[misc]  # nats-py has no types
    """`on_state(is_connected)` is called at each change, `on_fatal(reason)` once, both from the loop."""

    # What nats-py keeps and this relies on; pinned to 2.16.0 in pyproject.toml.
    _status: int
    _pending: list[bytes]
    _pending_data_size: int
    _pongs: list[asyncio.Future[bool]]
    _pings_outstanding: int
    _reading_task: asyncio.Task[None] | None
    _ping_interval_task: asyncio.Task[None] | None
    _flusher_task: asyncio.Task[None] | None
    _max_payload: int
    _auth_configured: bool
    _sid: int

    def __init__(self, on_state: Callable[[bool], None], on_fatal: Callable[[str], None]) -> None:
        super().__init__()
        self._on_state = on_state
        self._on_fatal = on_fatal
        self._handlers: dict[int, MessageHandler] = {}
        self._ps = Parser(self._handlers)
        self._write_handle: asyncio.Handle | None = None
        self._socket_bytes = 0  # in the transport's buffer when last looked at
        self.fatal_reason = ""
        self.was_opened = False

    async def open(self, url: str, *, name: str, inbox_prefix: str, tls: ssl.SSLContext | None) -> None:
        """Connect once; raises OSError, nats.errors.Error or TimeoutError. Later connections repair themselves for ever."""
        servers, user, password = split_url(url)
        credentials = {"token": user} if password is None else {"user": user, "password": password}
        await self.connect(
            servers,
            name=name,
            inbox_prefix=inbox_prefix,
            tls=tls,
            error_cb=self._on_error,
            reconnected_cb=self._on_reconnected,
            closed_cb=self._on_closed,
            reconnect_to_server_handler=_next_server,
            allow_reconnect=False,  # The first connection fails instead of being repeated for ever.
            max_reconnect_attempts=-1,
            reconnect_time_wait=RECONNECT_WAIT_S,
            connect_timeout=HANDSHAKE_S,
            ping_interval=PING_INTERVAL_S,
            pending_size=OUTBOUND_BYTES_MAX,
            **(credentials if user is not None else {}),
        )
        self.options["allow_reconnect"] = True
        self.was_opened = True
        self._on_state(True)

    # ---- send

    def publish_now(self, subject: str, payload: bytes, reply: str = "", header: bytes = b"") -> bool:
        """Queue a message; it is written at the end of this turn of the loop. False: not connected, or too much is queued.

        `header` is a whole NATS header block. Raises ValueError for what the server would answer with a disconnect.
        """
        total = len(payload) + len(header)
        if total > self._max_payload:
            raise ValueError(f"payload of {total} B exceeds the server's max_payload of {self._max_payload} B")
        if not subject or _UNSAFE.search(subject) or (reply and _UNSAFE.search(reply)):
            raise ValueError(f"not a subject: {subject!r} (reply {reply!r})")
        if self._status != Client.CONNECTED or not self._has_room(total):
            return False
        if header:
            command = b"HPUB %b %b %d %d\r\n%b%b\r\n" % (
                subject.encode(),
                reply.encode(),
                len(header),
                total,
                header,
                payload,
            )
        else:
            command = b"PUB %b %b %d\r\n%b\r\n" % (subject.encode(), reply.encode(), total, payload)
        self._pending.append(command)
        self._pending_data_size += len(command)
        if self._write_handle is None:
            self._write_handle = asyncio.get_running_loop().call_soon(self._write_pending)
        return True

    def _has_room(self, new_bytes: int) -> bool:
        if self._pending_data_size + self._socket_bytes + new_bytes <= OUTBOUND_BYTES_MAX:
            return True
        self._socket_bytes = self._socket().get_write_buffer_size()
        return self._pending_data_size + self._socket_bytes + new_bytes <= OUTBOUND_BYTES_MAX

    def _socket(self) -> asyncio.WriteTransport:
        transport: asyncio.WriteTransport = self._transport._io_writer.transport
        return transport

    def _write_pending(self) -> None:
        """One write for all messages of a turn, without waking nats-py's flusher task."""
        self._write_handle = None
        if self._pending and self._status == Client.CONNECTED:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            socket = self._socket()
            socket.write(pending[0] if len(pending) == 1 else b"".join(pending))
            self._socket_bytes = socket.get_write_buffer_size()

    async def flush(self, timeout: float = 10.0) -> None:
        """Returns when the server has handled all that was queued before. Raises TimeoutError or ConnectionLost."""
        if not self.is_connected:
            raise ConnectionLost("not connected")
        pong = asyncio.get_running_loop().create_future()
        # Not wait_for(): in 3.11 it swallows a cancellation that meets a finished future, and then two reconnections run.
        async with asyncio.timeout(timeout):
            await self._send_ping(pong)
            await pong

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        self._pending.append(b"PING\r\n")
        self._pending_data_size += 6
        self._write_pending()

    async def _process_ping(self) -> None:
        self._pending.append(b"PONG\r\n")
        self._pending_data_size += 6
        self._write_pending()

    # ---- subscriptions

    async def subscribe_direct(self, subject: str, handler: MessageHandler, queue: str = "") -> int:
        """`handler` runs inside the read loop for each message. The subscription id; not confirmed before a flush()."""
        if not subject or _UNSAFE.search(subject) or _UNSAFE.search(queue):
            raise ValueError(f"not a subject: {subject!r} (queue {queue!r})")
        self._sid += 1
        subscription_id = self._sid
        subscription = NatsSubscription(self, subscription_id, subject, queue=queue)
        self._subs[subscription_id] = subscription  # A reconnection subscribes to what is here.
        self._handlers[subscription_id] = handler
        if self.is_connected:
            await self._send_subscribe(subscription)
        return subscription_id

    async def unsubscribe_direct(self, subscription_id: int) -> None:
        """The handler is not called again."""
        self._handlers.pop(subscription_id, None)
        self._subs.pop(subscription_id, None)
        if self.is_connected:
            await self._send_unsubscribe(subscription_id)

    async def retire_direct(self, subscription_id: int) -> bool:
        """Unsubscribe, and hear what was on its way already. False: the connection was lost meanwhile."""
        self._subs.pop(subscription_id, None)
        try:
            if not self.is_connected:
                return False
            await self._send_unsubscribe(subscription_id)
            await self.flush()
        except (ConnectionLost, TimeoutError):
            return False
        finally:
            self._handlers.pop(subscription_id, None)
        return True

    # ---- receive

    async def _read_loop(self) -> None:
        """Whatever goes wrong here means a new connection, never a silent end."""
        transport = self._transport
        try:
            while True:
                chunk = await transport.read(READ_BYTES)
                if not chunk:
                    raise errors.UnexpectedEOF
                for line in self._ps.feed(chunk):
                    await self._control(line)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # Whatever a server or the parser does to a connection, the client makes a new one.
            await self._process_op_err(error)

    async def _control(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            await self._process_ping()
        elif line.startswith(b"PONG"):
            if self._pongs:
                pong = self._pongs.pop(0)
                self._pings_outstanding = 0
                if not pong.done():
                    pong.set_result(True)
        elif line.startswith(b"-ERR"):
            await self._process_err(line[5:].decode(errors="replace"))
        elif line.startswith(b"INFO"):
            await self._process_info(json.loads(line[5:]))
        else:
            raise errors.ProtocolError

    async def _process_err(self, text: str) -> None:
        reason = text.strip().strip("'")
        if any(sign in reason.lower() for sign in _FATAL):
            self._fail_for_good(reason)
        else:  # The server closes after most of them; after the others a new connection does no harm.
            await self._process_op_err(errors.Error(f"the server said: {reason}"))

    def _fail_for_good(self, reason: str) -> None:
        if not self.fatal_reason:
            self.fatal_reason = reason
            self._server_pool.clear()  # ends the reconnection loop, if it runs
            self._on_fatal(reason)

    # ---- connection

    async def _connect_to_server(self, server: Srv) -> None:
        self.abort()
        await super()._connect_to_server(server)
        self._transport._io_reader._limit = READ_BYTES  # nats-py takes it from a module constant

    async def _process_connect_init(self) -> None:
        """The handshake, complete or not at all: a failed one leaves no socket and no task behind."""
        self._status = Client.CONNECTING
        self._ps.reset()
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):
            if task is not None:
                task.cancel()  # of a connection that broke before its subscriptions were back
        try:
            async with asyncio.timeout(self.options["connect_timeout"]):
                await self._handshake()
        except BaseException:  # Also when it is cancelled: half a connection is none.
            self.abort()
            raise
        self._forget_unsent()
        self._pings_outstanding = 0
        self._status = Client.CONNECTED
        loop = asyncio.get_running_loop()
        self._reading_task = loop.create_task(self._read_loop(), name="nats read")
        self._ping_interval_task = loop.create_task(self._ping_interval(), name="nats ping")
        self._flusher_task = loop.create_task(self._flusher(), name="nats flush")

    async def _handshake(self) -> None:
        transport = self._transport
        first = await transport.readline()
        if not first.startswith(b"INFO "):
            raise errors.Error(f"this is no NATS server, it said {first[:60]!r}")
        info = self._server_info = json.loads(first[5:])
        self._max_payload = info.get("max_payload", self._max_payload)
        self._auth_configured = self._auth_configured or info.get("auth_required", False)
        await self._process_info(info, initial_connection=True)
        if info.get("tls_required") or self._current_server.uri.scheme == "tls":
            host = self._current_server.tls_name or self._current_server.uri.hostname
            await transport.connect_tls(host, self.ssl_context, READ_BYTES, self.options["connect_timeout"])
        transport.write(self._connect_command() + b"PING\r\n")
        while not (line := await transport.readline()).startswith(b"PONG"):
            if not line:
                raise errors.UnexpectedEOF
            if line.startswith(b"-ERR"):
                raise errors.Error(line[5:].decode(errors="replace").strip().strip("'"))
            if line.startswith(b"PING"):
                transport.write(b"PONG\r\n")

    async def _process_op_err(self, error: Exception) -> None:
        if self.is_closed or self.is_reconnecting:
            return
        log.warning("lost the connection to NATS: %s", describe(error))
        self._on_state(False)
        self._forget_unsent()
        await super()._process_op_err(error)

    async def _attempt_reconnect(self) -> None:
        while True:
            self.abort()
            try:
                await super()._attempt_reconnect()
                return
            except Exception as error:  # nats-py expects some errors only; any other would end the reconnection.
                await self._on_error(error)
                self._status = Client.RECONNECTING
                await asyncio.sleep(RECONNECT_WAIT_S)

    def abort(self) -> None:
        """Drop the socket at once: close() would wait until a dead peer has taken what is buffered."""
        if self._transport:
            self._socket().abort()

    def _forget_unsent(self) -> None:
        """What waits for an answer fails now, and nothing old is sent on the next connection."""
        for pong in self._pongs:
            if not pong.done():
                pong.set_exception(ConnectionLost("the connection was lost"))
                pong.exception()  # Retrieved: nobody may be waiting.
        self._pongs = []
        self._pending, self._pending_data_size, self._socket_bytes = [], 0, 0

    async def _on_error(self, error: Exception) -> None:
        log.debug("NATS: %s", describe(error))
        if any(sign in str(error).lower() for sign in _FATAL) and self.options.get("allow_reconnect"):
            self._fail_for_good(str(error))

    async def _on_reconnected(self) -> None:
        log.info("connected to NATS again")
        self._on_state(True)

    async def _on_closed(self) -> None:
        self._on_state(False)
        if not self.fatal_reason:
            self._fail_for_good("closed")


def _next_server(servers: list[Server], _info: dict[str, object]) -> tuple[Server, float]:
    """Reconnection: the server that failed least often, after 0.1 s and a jitter that grows to 1 s (a thousand clients come)."""
    server = min(servers, key=lambda candidate: int(candidate.reconnects))
    return server, RECONNECT_WAIT_S + random.random() * min(1.0, 0.1 * (1 + server.reconnects))


def describe(error: BaseException) -> str:
    """The error's text, or its kind when it has none."""
    return str(error) or type(error).__name__
