"""A real pool of processes for the tests: nats-server, one router, workers; each can be signalled by itself."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO

import httpx

START_TIMEOUT_S = 120.0


class PoolProcess:
    """One `hocket ...` child in a session of its own; its output is kept, its ready line is waited for."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.arguments = arguments
        self.lines: list[str] = []
        self._ready: queue.Queue[dict[str, str] | None] = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hocket.cluster.cli", *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.lines.append(line)
            if line.startswith('{"ready"'):
                self._ready.put(json.loads(line))
        self._ready.put(None)

    def wait_ready(self) -> dict[str, str]:
        ready = self._ready.get(timeout=START_TIMEOUT_S)
        assert ready is not None, f"{self.arguments} ended early:\n{''.join(self.lines[-40:])}"
        return ready

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """SIGTERM, then whatever is left of its session."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Pool:
    """Build it up with `router()` and `worker()`; `stop()` takes everything down."""

    def __init__(self, nats_url: str, model: Path, *, engine: str = "sim", served_name: str = "test-model") -> None:
        self.nats_url = nats_url
        self.model = model
        self.engine = engine
        self.served_name = served_name
        self.base_url = ""
        self.pool = f"test-{uuid.uuid4().hex[:8]}"
        self.processes: list[PoolProcess] = []
        self.names: dict[str, PoolProcess] = {}

    def _spawn(self, arguments: list[str], options: dict[str, object]) -> PoolProcess:
        flags = []
        for name, value in options.items():
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        common = ["--model", str(self.model), "--served-name", self.served_name, "--pool", self.pool]
        process = PoolProcess([*arguments, *common, *flags], {"HOCKET_NATS": self.nats_url})
        self.processes.append(process)
        return process

    def start_worker(self, role: str, **options: object) -> PoolProcess:
        """Start a worker and return at once; `wait_ready` it."""
        return self._spawn(["worker", role], {"engine": self.engine, **options})

    def worker(self, role: str, **options: object) -> PoolProcess:
        """Start a worker and wait until it is ready."""
        process = self.start_worker(role, **options)
        self.names[process.wait_ready()["ready"]] = process
        return process

    def router(self, **options: object) -> PoolProcess:
        """Start the router and wait until it listens."""
        process = self._spawn(["router"], {"port": 0, "local_prefill_tokens_max": 0, **options})
        self.base_url = process.wait_ready()["url"]
        return process

    def wait_workers(self, *, prefill: int, decode: int, timeout_s: float = 20.0) -> None:
        """Wait until the router counts so many live workers."""
        end = time.monotonic() + timeout_s
        counts: dict[str, float] = {}
        while time.monotonic() < end:
            counts = {role: self.metric("hocket_workers", role=role) for role in ("prefill", "decode")}
            if counts == {"prefill": prefill, "decode": decode}:
                return
            threading.Event().wait(0.05)
        raise TimeoutError(f"the router counts {counts}, not {prefill} prefill and {decode} decode workers")

    def metric(self, name: str, **labels: str) -> float:
        """The value of one of the router's metrics; 0.0 while it has none."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in httpx.get(f"{self.base_url}/metrics", timeout=5).text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(label in series for label in wanted):
                return float(value)
        return 0.0

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()
