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
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

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
    other_ports: dict[str, int] = field(default_factory=dict)  # of further routers, by name


def worker_arguments(role: str, flags: Flags) -> list[str]:
    """Python's arguments for a worker."""
    return ["-m", "hocket.cluster.cli", "worker", role, *_flags(flags)]


def sim_worker(role: str, flags: Flags) -> list[str]:
    """Python's arguments for a simulated worker."""
    return worker_arguments(role, {"engine": "sim", "transports": "tcp", **flags})


@contextlib.contextmanager
def running_pool(
    name: str,
    nats_url: str,
    model: Path,
    folder: Path,
    *,
    workers: Mapping[str, Sequence[str]],
    router: Flags,
    other_routers: Mapping[str, Flags] = MappingProxyType({}),
    is_pinned: bool = True,
    profile: tuple[str, Path] | None = None,
) -> Iterator[Pool]:
    """Start the processes of pool `name`, `workers` and a router, and stop them at the end. Logs are in `folder`.

    A worker is named by its role and, where there are several of it, what follows a dash: decode-1, decode-2.
    With `profile`, a role and a file, that process runs under cProfile, which writes there when it stops.
    """
    settings = {"NATS": nats_url, "POOL": name, "MODEL": model, "SERVED_NAME": SERVED_NAME, "LOG_LEVEL": "warning"}
    environment = os.environ | {f"HOCKET_{key}": str(value) for key, value in settings.items()}
    with contextlib.ExitStack() as stack:

        def start(role: str, arguments: Sequence[str], core: int) -> _Process:
            launcher = ("-m", "cProfile", "-o", str(profile[1])) if profile and profile[0] == role else ()
            log = folder / f"{name}-{role}.log"
            process = _Process([*launcher, *arguments], environment, log, core if is_pinned else None)
            stack.callback(process.stop)
            stack.push(process.show_log)
            return process

        started = {role: start(role, arguments, REST_CORE) for role, arguments in workers.items()}
        for worker in started.values():
            worker.wait_ready()
        fronts, ports = {}, {}
        for role, flags in {"router": router, **other_routers}.items():
            arguments = ["-m", "hocket.cluster.cli", "router", *_flags({"port": 0, **flags})]
            front = fronts[role] = start(role, arguments, ROUTER_CORE)
            url = front.wait_ready()["url"]
            _wait_workers(url, workers)
            ports[role] = int(url.rpartition(":")[2])
        yield Pool(
            port=ports.pop("router"),
            pids={role: process.pid for role, process in {**fronts, **started}.items()},
            other_ports=ports,
        )


def _flags(flags: Flags) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


class _Process:
    """One child in a session of its own; stderr goes to a file, its ready line comes back."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path, core: int | None) -> None:
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
        if core is not None:
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


def _wait_workers(url: str, names: Iterable[str]) -> None:
    """Until the router counts every worker: without the prefill worker the plan would be a local prefill."""
    end_s = time.monotonic() + _START_TIMEOUT_S
    roles = Counter(name.partition("-")[0] for name in names)
    wanted = {f'hocket_workers{{role="{role}"}} {count:.1f}' for role, count in roles.items()}
    while time.monotonic() < end_s:
        with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
            if wanted <= set(answer.read().decode().splitlines()):
                return
        time.sleep(0.05)
    raise RuntimeError(f"the router at {url} did not see its workers within {_START_TIMEOUT_S:.0f} s")
