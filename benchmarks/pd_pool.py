"""The systems that `gpu_pd.py` compares, each started as a user would and stopped at the end.

- `pd`: `hocket serve` with prefill and decode workers, each on its GPU.
- `aggregated`: `hocket serve` with a decode worker on each GPU, which compute their prompts themselves, behind `round_robin`.
- `vllm`: vLLM's own server on each GPU; the client takes them in turn. `vllm-tp`: one of them over all GPUs.
- `vllm-nixl`: vLLM's own servers as prefill and decode, with its NIXL connector; the client asks the one and then the other, as
  vLLM's proxies do.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measure import Row, cpu_s, process_tree, rss_mib

HERE = Path(__file__).parent
STOP_S = 25.0
IDLE_S = 60.0
FREE_S = 6.0  # blocks that a cancelled hand-off still holds come back within that


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What every engine of every system gets alike."""

    model: Path
    block_tokens: int
    kv_gib: float
    slots: int  # of engines that decode
    prefill_slots: int
    max_model_len: int
    chunk_tokens: int  # the largest budget of a step
    transports: str
    staging_mib: int
    verify_kv: bool
    is_cpu: bool
    dtype: str
    engine_args: Mapping[str, object]


@dataclass(slots=True)
class System:
    """A running system."""

    name: str
    ports: tuple[int, ...]
    metrics_ports: dict[str, int]  # of workers, by name
    pids: dict[str, int]  # whose CPU is counted
    model: str
    gpus: int
    engines: int  # behind one port
    budget_file: Path
    trace: Path
    bus_url_file: Path | None = None
    prefill_ports: tuple[int, ...] = ()  # of vLLM's own servers that prefill
    _cpu: dict[str, float] = field(default_factory=dict)

    def set_budget(self, tokens: int) -> None:
        """The chunk budget of every engine's step, from the next one on."""
        self.budget_file.write_text(str(tokens))

    def start_clocks(self) -> None:
        """The window of `cpu` begins."""
        self._cpu = {name: cpu_s(pid) for name, pid in self.pids.items()}

    def cpu(self, window_s: float) -> Row:
        """Share of a core of each watched process since `start_clocks`."""
        return {f"cpu_{name}": (cpu_s(pid) - self._cpu[name]) / window_s for name, pid in self.pids.items()}

    def memory(self) -> Row:
        """Of each watched process with all of its children: resident memory (MiB) and open descriptors."""
        row: Row = {}
        for name, pid in self.pids.items():
            tree = process_tree(pid)
            row[f"rss_mib_{name}"] = sum(rss_mib(one) for one in tree)
            row[f"fds_{name}"] = sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in tree)
        return row

    def metric(self, port: int, name: str) -> float:
        """The sum over a metric's labels; 0 when it is not there."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].partition(" ")[0] == name)

    def doctor(self) -> str:
        """What `hocket doctor` says of the pool's links."""
        assert self.bus_url_file
        command = [*_HOCKET, "doctor", "--pool", self.name, "--nats", self.bus_url_file.read_text()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def handoffs(self) -> Row:
        """KV bytes and hand-offs so far, and what the engines still hold."""
        row: Row = {}
        for worker, port in self.metrics_ports.items():
            row[f"{worker}_running"] = self.metric(port, "num_requests_running")
            row[f"{worker}_kv_used"] = self.metric(port, "kv_cache_usage_perc")
            for line in _metric_lines(port, "hocket_handoffs_total") + _metric_lines(port, "hocket_kv_bytes_total"):
                labels, _, value = line.rpartition(" ")
                row[f"{worker} {labels}"] = float(value)
        return row

    def wait_idle(self) -> None:
        """Until no engine runs a request, and a little longer for its blocks. Raises TimeoutError."""
        name = "num_requests_running" if self.metrics_ports else "vllm:num_requests_running"
        waiting = name.replace("running", "waiting")
        ports = tuple(self.metrics_ports.values()) or self.ports + self.prefill_ports
        end_s = time.monotonic() + IDLE_S
        while any(self.metric(port, name) + self.metric(port, waiting) for port in ports):
            if time.monotonic() > end_s:
                raise TimeoutError(f"{self.name} still runs requests after {IDLE_S:.0f} s: {self.handoffs()}")
            time.sleep(0.2)
        end_s = time.monotonic() + FREE_S
        while any(self.metric(port, "kv_cache_usage_perc") for port in ports) and time.monotonic() < end_s:
            time.sleep(0.1)  # What is left then is in the row `end`.


def _metric_lines(port: int, name: str) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return [line for line in answer.read().decode().splitlines() if line.startswith(name)]


def _free_ports(count: int) -> list[int]:
    """Below the kernel's own choice (32768 up): what is free now must still be free when the engines are up."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _engine_args(options: EngineOptions) -> dict[str, object]:
    """For `AsyncEngineArgs`; by `vllm serve` as flags."""
    name = "BudgetScheduler" if options.is_cpu else "AsyncBudgetScheduler"
    return {
        "max_num_batched_tokens": options.chunk_tokens,
        "enable_chunked_prefill": True,
        "scheduler_cls": f"budget_scheduler.{name}",
        **options.engine_args,
    }


def _toml(value: object) -> str:
    """JSON is TOML for what is used here, but for tables within a line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _serve_file(options: EngineOptions, roles: Sequence[tuple[str, str]], ports: Sequence[int], folder: Path) -> str:
    """The file that `hocket serve` is given: `roles` are (role, GPUs) of each worker."""
    is_pd = any(role == "prefill" for role, _ in roles)
    worker = {
        "block_tokens": options.block_tokens,
        "kv_gib": options.kv_gib,
        "max_model_len": options.max_model_len,
        "chunk_tokens": options.chunk_tokens,
        "staging_mib": options.staging_mib,
        "verify_kv": options.verify_kv,
        "dtype": options.dtype,
        "engine_args": {"skip_tokenizer_init": True, **_engine_args(options)},
    }
    cluster = {
        "model": str(options.model), "engine": "vllm", "transports": options.transports, "port": ports[0],
        "pool": folder.name, "state_dir": str(folder), "start_timeout_s": 560.0, "grace_s": 1.0,
    }  # fmt: skip
    router = {"policy": "kv" if is_pd else "round_robin", "local_prefill_tokens_max": 16}
    lines = [f"{key} = {_toml(value)}" for key, value in cluster.items()]
    for title, table in (("router", router), ("worker", worker)):
        lines += [f"[{title}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    for (role, gpus), port in zip(roles, ports[1:], strict=True):
        slots = options.prefill_slots if role == "prefill" else options.slots
        lines += ["[[workers]]", f'role = "{role}"', f"slots = {slots}", f"metrics_port = {port}"]
        if gpus:
            lines.append(f'gpus = "{gpus}"')
    return "\n".join(lines) + "\n"


def _environment(folder: Path) -> tuple[dict[str, str], Path, Path]:
    """Of every process of a system; the budget's file and the trace's file."""
    budget, trace = folder / "budget", folder / "facts"
    budget.write_text("")
    paths = [str(HERE), str(HERE / "trace"), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"CHUNK_BUDGET_FILE": str(budget), "STEP_LOG": str(folder / "steps"), "TRACE_FACTS_FILE": str(trace)}
    return os.environ | added | {"PYTHONPATH": os.pathsep.join(paths)}, budget, trace


class Children:
    """Processes in sessions of their own, with a log each; leaving it stops them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._processes.append(process)
        return process

    def check(self) -> None:
        """Raises RuntimeError when one has ended."""
        for process in self._processes:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args} ended with {process.returncode}; logs in {self._folder}")

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(STOP_S)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _wait_ready(children: Children, ports: Sequence[int], path: str, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    for port in ports:
        while True:
            children.check()
            if _answers(f"http://127.0.0.1:{port}{path}"):
                break
            if time.monotonic() > end_s:
                raise RuntimeError(f"nobody is ready on port {port} after {timeout_s:.0f} s")
            time.sleep(0.25)


@contextlib.contextmanager
def hocket_system(
    name: str, folder: Path, options: EngineOptions, roles: Sequence[tuple[str, str]], start_s: float
) -> Iterator[System]:
    """`hocket serve` with these workers. Raises RuntimeError when it does not get ready."""
    folder.mkdir(parents=True)
    ports = _free_ports(1 + len(roles))
    file = folder / "cluster.toml"
    file.write_text(_serve_file(options, roles, ports, folder))
    environment, budget, trace = _environment(folder)
    with Children(folder) as children:
        serve = children.start("serve", [*_HOCKET, "serve", "--config", str(file)], environment)
        _wait_ready(children, ports[:1], "/ready", start_s)
        _wait_workers(ports[0], roles, start_s)
        counts = {"prefill": 0, "decode": 0}
        metrics = {}
        for (role, _), port in zip(roles, ports[1:], strict=True):
            metrics[f"{role}-{counts[role]}"] = port
            counts[role] += 1
        gpus = len({gpu for _, places in roles for gpu in places.split(",")} - {""}) or len(roles)
        pids, url = _pids(serve.pid), folder / "nats-url"
        yield System(name, (ports[0],), metrics, pids, options.model.name, gpus, len(roles), budget, trace, url)


_HOCKET = (sys.executable, "-m", "hocket.cluster.cli")


def _wait_workers(port: int, roles: Sequence[tuple[str, str]], timeout_s: float) -> None:
    """Until the router counts all of them: without the prefill worker every plan would be a local prefill."""
    names = [role for role, _ in roles]
    wanted = {f'hocket_workers{{role="{role}"}} {names.count(role)}.0' for role in set(names)}
    end_s = time.monotonic() + timeout_s
    while not wanted <= set(_metric_lines(port, "hocket_workers")):
        if time.monotonic() > end_s:
            raise RuntimeError(f"the router did not see its workers within {timeout_s:.0f} s")
        time.sleep(0.1)


def _pids(parent: int) -> dict[str, int]:
    """Router, bus and the workers' own processes (engines not), by what their command lines say."""
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) != parent:
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "nats-server" in words[0]:
                found["nats"] = pid
            elif "router" in words:
                found["router"] = pid
            elif "worker" in words:
                role = words[words.index("worker") + 1]
                found[f"{role}-{sum(name.startswith(role) for name in found)}"] = pid
    return found


@contextlib.contextmanager
def vllm_system(
    name: str, folder: Path, options: EngineOptions, roles: Sequence[tuple[str, str]], start_s: float
) -> Iterator[System]:
    """vLLM's own server for each of these (role, GPUs). Raises RuntimeError when one does not get ready."""
    folder.mkdir(parents=True)
    ports = _free_ports(2 * len(roles))
    environment, budget, trace = _environment(folder)
    is_pd = any(role == "prefill" for role, _ in roles)
    with Children(folder) as children:
        for index, (role, gpus) in enumerate(roles):
            slots = options.prefill_slots if role == "prefill" else options.slots
            arguments = {
                "served_model_name": options.model.name, "block_size": options.block_tokens, "max_num_seqs": slots,
                "max_model_len": options.max_model_len, "kv_cache_memory_bytes": int(options.kv_gib * (1 << 30)),
                "dtype": "float32" if options.is_cpu else options.dtype,
                "tensor_parallel_size": gpus.count(",") + 1, **_engine_args(options),
            }  # fmt: skip
            if is_pd:
                arguments["kv_transfer_config"] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
            flags = [part for key, value in arguments.items() for part in _flag(key, value)]
            command = [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(options.model), "--host", "127.0.0.1",
                "--port", str(ports[index]), *flags,
            ]  # fmt: skip
            side_port = str(ports[len(roles) + index])
            own = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": side_port}
            children.start(
                f"{role}-{index}", command, environment | own | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
            )
        _wait_ready(children, ports[: len(roles)], "/health", start_s)
        decode = tuple(port for port, (role, _) in zip(ports, roles, strict=False) if role != "prefill")
        prefill = tuple(port for port, (role, _) in zip(ports, roles, strict=False) if role == "prefill")
        count = sum(gpus.count(",") + 1 for _, gpus in roles)
        yield System(name, decode, {}, {}, options.model.name, count, 1, budget, trace, prefill_ports=prefill)


def _flag(key: str, value: object) -> list[str]:
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name] if value else [f"--no-{name[2:]}"]
    if isinstance(value, list):
        return [name, *map(str, value)]
    return [name, json.dumps(value) if isinstance(value, dict) else str(value)]
