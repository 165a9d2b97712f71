"""One child process of `hocket serve`: its start, its output, its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

from .guard import members, signal_all

_TAIL_LINES = 15
_LINE_BYTES_MAX = 64 << 10
_READ_BYTES = 64 << 10
_LAST_WORDS_S = 1.0
_KILL_TIMEOUT_S = 2.0
_KILL_POLL_S = 0.01
# What `logs.py` writes, in a process of ours. Everything else (vLLM's own log, tracebacks) goes to the log file alone.
_OWN_RECORD = re.compile(r"\d\d:\d\d:\d\d\.\d{3} (?P<level>[A-Z]+) +hocket[.\w]* ")


OnRecord = Callable[[str, str], bool]


class Guard:
    """The connection to `guard.py`, which ends the sessions it was told of when this process is gone."""

    def __init__(self, grace_s: float) -> None:
        """Start it, in a session of its own, so that no Ctrl-C reaches it."""
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(grace_s)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, pid: int) -> None:
        """End this session when we are gone."""
        self._tell(f"+ {pid}\n")

    def forget(self, pid: int) -> None:
        """It has ended."""
        self._tell(f"- {pid}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # A guard that was killed costs the protection, not the cluster.
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """Let it end; it returns at once when nothing is left to watch."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Child:
    """A process in a session of its own, so that neither Ctrl-C nor a signal to our group reaches it.

    Its settings go in through stdin: nothing secret is on its command line, in its environment or on disk.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        settings: Mapping[str, object],
        environment: Mapping[str, str],
        log: Path,
        guard: Guard,
    ) -> None:
        self.name = name
        self.log = log
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)  # the last lines that nobody has seen yet
        self._command = command
        self._settings = settings
        self._environment = environment
        self._guard = guard
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it. Raises OSError when that fails."""
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=pipe, env=self._environment, start_new_session=True
        )
        self._guard.watch(self._process.pid)
        self._give_settings(self._process)

    async def run(self, on_ready: Callable[[dict[str, str]], None], on_record: OnRecord) -> int:
        """Stay until the started process has ended and nothing of its session is left; returns its exit code.

        `on_ready` gets its ready line, `on_record` each log record of our own (level, line): true when it was shown.
        """
        process = self._process
        assert process is not None
        try:
            with self.log.open("ab") as file:
                async with asyncio.TaskGroup() as tasks:
                    readers = {
                        tasks.create_task(_lines(process.stdout, lambda line: self._stdout(line, file, on_ready))),
                        tasks.create_task(_lines(process.stderr, lambda line: self._stderr(line, file, on_record))),
                    }
                    await _wait_exit(process.pid)
                    await self._end_session()
                    # Its last words are in the pipes. A process that left the session may hold them open for ever.
                    _, stuck = await asyncio.wait(readers, timeout=_LAST_WORDS_S)
                    for reader in stuck:
                        reader.cancel()
            return process.wait()
        finally:
            self.kill()
            process.wait()
            self._guard.forget(process.pid)
            self._process = None

    def _give_settings(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It ended already; its exit code says more.
            process.stdin.write(
                msgspec.json.encode(self._settings)
            )  # Under 64 KiB, what a pipe takes without a reader.
            process.stdin.close()

    def _stdout(self, line: str, file: IO[bytes], on_ready: Callable[[dict[str, str]], None]) -> None:
        self._keep(line, file)
        if line.startswith('{"ready"'):
            with contextlib.suppress(msgspec.DecodeError):
                on_ready(msgspec.json.decode(line, type=dict[str, str]))

    def _stderr(self, line: str, file: IO[bytes], on_record: OnRecord) -> None:
        record = _OWN_RECORD.match(line)
        is_shown = record is not None and on_record(record["level"], line)
        self._keep(line, file, is_shown=is_shown)

    def _keep(self, line: str, file: IO[bytes], *, is_shown: bool = False) -> None:
        if not is_shown:
            self.tail.append(line)
        with contextlib.suppress(OSError):  # A full disk costs the log, not the cluster.
            file.write(line.encode() + b"\n")
            file.flush()

    def terminate(self) -> None:
        """SIGTERM to the process itself: it knows how to end what it started."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the process and to everything it started."""
        if self._process is not None:
            # A second look, because a process may start another one between the look and the signal.
            for _ in range(2):
                signal_all(members([self._process.pid]), signal.SIGKILL)

    async def _end_session(self) -> None:
        """Engine processes of a worker that died hold memory and ports that its successor needs."""
        assert self._process is not None
        with contextlib.suppress(TimeoutError):  # One that is stuck in the kernel must not hold the rest.
            async with asyncio.timeout(_KILL_TIMEOUT_S):
                while left := members([self._process.pid]):
                    signal_all(left, signal.SIGKILL)
                    await asyncio.sleep(_KILL_POLL_S)


async def _wait_exit(pid: int) -> None:
    """Until the process has ended; it stays a zombie, so that its pid is not used again.

    Not asyncio's own `wait`: it returns only when every pipe is closed too, and an orphan may hold one.
    """
    loop, exited = asyncio.get_running_loop(), asyncio.Event()
    fd = os.pidfd_open(pid)
    try:
        loop.add_reader(fd, exited.set)
        await exited.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def _lines(pipe: IO[bytes] | None, on_line: Callable[[str], None]) -> None:
    """Each line as text; one that is too long comes in pieces (StreamReader.readline would raise)."""
    assert pipe is not None
    stream = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(stream)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
    rest = b""
    try:
        while chunk := await stream.read(_READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                on_line(line.decode(errors="replace").rstrip("\r"))
        if rest:
            on_line(rest.decode(errors="replace"))
    finally:
        transport.close()


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours without HOCKET_*: a child's settings were decided here, a variable must not overrule them."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOCKET_")}
    return {**inherited, "PYTHONUNBUFFERED": "1", **extra}
