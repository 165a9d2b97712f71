"""A pool of real processes for a benchmark: one router, one prefill and one decode simulator, on a NATS server of their own.

The router has a core for itself and everything else shares the other one (clients too: they inherit it from the caller),
so that what the router costs is what it costs alone. On a machine with one core nothing is pinned.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROUTER_CORE, REST_CORE = 0, 1
SERVED_NAME = "sim-model"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0

Flags = Mapping[str, str | int | float]


def pin(pid: int, core: int) -> None:
    """Keep a process that has just started on one core; threads and processes that it starts later inherit that."""
    if (os.cpu_count() or 1) > core:
        os.sched_setaffinity(pid, {core})


@dataclass(frozen=True, slots=True)
class Pool:
    """What a load needs to know of a running pool."""

    port: int  # of the API
    pids: dict[str, int]


@contextlib.contextmanager
def running_pool(
    name: str,
    nats_url: str,
    model: Path,
    folder: Path,
    *,
    workers: Mapping[str, Flags],
    router: Flags,
    profile: Path | None = None,
) -> Iterator[Pool]:
    """Start the processes of pool `name`, a worker for each role in `workers`, and stop them at the end. Logs are in `folder`.

    With `profile` the router runs under cProfile, which writes there when it stops.
    """
    environment = {**os.environ, "HOCKET_NATS": nats_url, "HOCKET_POOL": name}
    common = {"model": str(model), "served-name": SERVED_NAME, "log-level": "warning"}
    sim = {**common, "engine": "sim", "transports": "tcp"}
    launcher = () if profile is None else ("-m", "cProfile", "-o", str(profile))
    with contextlib.ExitStack() as stack:

        def start(role: str, command: list[str], flags: Flags, core: int, *launcher: str) -> _Process:
            arguments = [*launcher, "-m", "hocket.cluster.cli", *command, *_flags(flags)]
            process = _Process(arguments, environment, folder / f"{name}-{role}.log", core)
            stack.callback(process.stop)
            stack.push(process.show_log)
            return process

        started = {role: start(role, ["worker", role], {**sim, **flags}, REST_CORE) for role, flags in workers.items()}
        for worker in started.values():
            worker.wait_ready()
        front = start("router", ["router"], {**common, "port": 0, **router}, ROUTER_CORE, *launcher)
        ready = front.wait_ready()
        _wait_workers(ready["url"])
        yield Pool(
            port=int(ready["url"].rpartition(":")[2]),
            pids={"router": front.pid, **{role: worker.pid for role, worker in started.items()}},
        )


def _flags(flags: Flags) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


class _Process:
    """One child in a session of its own; stderr goes to a file, its ready line comes back."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path, core: int) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.pid = self._process.pid
        pin(self.pid, core)

    def wait_ready(self) -> dict[str, str]:
        """The fields of its ready line. Raises RuntimeError with the end of its log when it ends instead."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"ready"'):
                ready: dict[str, str] = json.loads(line)
                return ready
        raise RuntimeError(f"a process of the pool ended:\n{self._log.read_text()[-2000:]}")

    def show_log(self, kind: type[BaseException] | None, *_: object) -> None:
        """The end of its log on stderr when the benchmark failed."""
        if kind is not None and (tail := self._log.read_text()[-2000:]):
            print(f"{self._log.name}:\n{tail}", file=sys.stderr)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL for its whole session when that is not enough."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(_STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()


def _wait_workers(url: str) -> None:
    """Until the router counts both workers: without the prefill worker the plan would be a local prefill."""
    end_s = time.monotonic() + _START_TIMEOUT_S
    wanted = {f'hocket_workers{{role="{role}"}} 1.0' for role in ("prefill", "decode")}
    while time.monotonic() < end_s:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            if wanted <= set(answer.read().decode().splitlines()):
                return
        time.sleep(0.05)
    raise RuntimeError(f"the router at {url} did not see both workers within {_START_TIMEOUT_S:.0f} s")
