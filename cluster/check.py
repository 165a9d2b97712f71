"""`hocket serve --check`: what a plan would take of this machine, and what does not fit. Starts nothing and fetches nothing.

Gathers and prints; `preflight.py` decides. Exit 0: `serve` can start it as far as this tells; 1: it cannot.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec

from ..transport.registry import installed_schemes
from ..workers.engines.vllm import versions
from .config import Plan, state_folder
from .diagnosis import Finding
from .gpus import gpus_here, named_gpus
from .model import ModelError, NotFetched, resolve_model
from .preflight import preflight
from .preflight_facts import GpuReport, KvReport, MachineFacts, ModelFacts, Port, Report, WorkerReport
from .routers import PortTaken, keep_port
from .serve import computes_on_cpu, models_of, placed_workers
from .tables import table

GIB = 1 << 30
LOOPBACK = "127.0.0.1"


def check(plan: Plan, *, as_json: bool) -> int:
    """Print the report; the exit code."""
    plan = replace(plan, workers=placed_workers(plan))
    models = [_model_facts(name) for name in models_of(plan)]
    return show(preflight(plan, _machine_facts(plan), models, list(_ports(plan))), as_json=as_json)


def refused(error: Exception, *, as_json: bool) -> int:
    """As the report of a plan that could not even be read."""
    return show(Report(False, (Finding("settings", "fix", "settings", str(error)),)), as_json=as_json)


def show(report: Report, *, as_json: bool) -> int:
    """Print it; the exit code."""
    if as_json:
        print(json.dumps(report_json(report), indent=2))
    else:
        print("\n".join(report_lines(report)))
    return 0 if report.is_ok else 1


# ---- facts


def _model_facts(name: str) -> ModelFacts:
    try:
        folder = resolve_model(name, fetches=False)
    except ModelError as error:
        return ModelFacts(name, None, str(error), is_fetched_later=isinstance(error, NotFetched))
    try:
        config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, object])
    except (OSError, msgspec.DecodeError) as error:
        return ModelFacts(name, None, f"{folder / 'config.json'} cannot be read: {error}")
    return ModelFacts(name, config, file_bytes=_file_bytes(folder))


def _file_bytes(folder: Path) -> int:
    """Of the weights; a repository may keep them twice, and the index counts one."""
    with suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
        index = msgspec.json.decode((folder / "model.safetensors.index.json").read_bytes(), type=_Index)
        return index.metadata.total_size
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))


class _Total(msgspec.Struct):
    total_size: int


class _Index(msgspec.Struct):
    metadata: _Total


def _machine_facts(plan: Plan) -> MachineFacts:
    named, here = named_gpus(plan.serve.machine_gpus), gpus_here()
    return MachineFacts(
        gpus=named or here,
        is_elsewhere=bool(named) and not here,
        own_gpus=here,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        is_cpu_build=computes_on_cpu(),
        has_vllm=versions.is_installed(),
        transports=installed_schemes(),
        state_problem=_state_problem(state_folder(plan.serve)),
    )


def _state_problem(folder: Path) -> str:
    with suppress(OSError), (folder / "lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"another hocket serve uses {folder}; name another: --state-dir FOLDER --port 0"
    return ""


def _ports(plan: Plan) -> Iterator[Port]:
    serve = plan.serve
    name = "router" if serve.processes == 1 else f"{serve.processes} routers"
    yield _port(name, "API and /metrics", serve.host, serve.port)
    if not serve.nats:
        yield Port("nats-server", "NATS, with a password", LOOPBACK, 0)
    for spec in plan.workers:
        config = spec.config
        if config.role == "decode":
            ranks = f", one for each of {config.tp} ranks" if config.tp > 1 else ""
            yield Port(spec.name, f"KV ({config.transports}{ranks})", config.bind, 0)
        if config.metrics_port:
            yield _port(spec.name, "/metrics", LOOPBACK, config.metrics_port)


def _port(process: str, what: str, host: str, port: int) -> Port:
    try:
        keep_port(host, port).close()
    except PortTaken as error:
        return Port(process, what, host, port, str(error).partition(";")[0])
    return Port(process, what, host, port)


# ---- the report


def report_lines(report: Report) -> list[str]:
    """For a reader."""
    lines: list[str] = []
    if report.workers:
        lines += _allocation(report)
        if counted := [worker for worker in report.workers if worker.kv]:
            lines += ["", *_memory(report, counted), "", *_kv(counted)]
        lines += ["", *_port_lines(report.ports)]
    for finding in report.findings:
        lines += ["", f"{finding.severity}: {finding.where}: {finding.text}"]
        if finding.advice:
            lines.append(f"     {finding.advice}")
    wrong = sum(finding.severity == "fix" for finding in report.findings)
    return [*lines, "", f"{wrong} to fix" if wrong else "nothing to fix"]


def _allocation(report: Report) -> list[str]:
    head = ("worker", "engine", "GPUs", "TP", "cores", "slots")
    rows = [
        (one.name, one.engine, ",".join(one.gpus) or "-", str(one.tp), one.cores or "any", str(one.slots))
        for one in report.workers
    ]
    host = f"host: {report.cores} cores, about {report.cores_wanted} busy; {_gib(report.memory_bytes)} GiB, "
    host += f"workers about {_gib(report.host_bytes)}"
    if report.pinned_bytes:
        host += f", {_gib(report.pinned_bytes)} of it pinned for staging where a link needs that"
    return [*table(head, rows, left=3), host]


def _memory(report: Report, workers: Sequence[WorkerReport]) -> list[str]:
    head = ("GiB of each GPU or host", "weights", "KV cache", "staging", "assumed", "together")
    rows = [
        (
            one.name, *(_gib(part) for part in (one.weight_bytes, one.kv_bytes, one.staging_bytes)),
            _gib(sum(one.assumed_bytes.values())), _gib(one.rank_bytes),
        )
        for one in workers
    ]  # fmt: skip
    lines = table(head, rows)
    if report.gpus:
        lines += [*_gpu_lines(report.gpus), f"assumed: {report.assumed}"]
    return lines


def _gpu_lines(gpus: Sequence[GpuReport]) -> Iterator[str]:
    """One line for all that are alike."""
    alike: dict[tuple[object, ...], list[GpuReport]] = {}
    for gpu in gpus:
        alike.setdefault((gpu.name, gpu.memory_bytes, tuple(gpu.workers.items())), []).append(gpu)
    for same in alike.values():
        one = same[0]
        free = one.memory_bytes - sum(one.workers.values())
        left = f"{_gib(free)} left" if free >= 0 else f"{_gib(-free)} too much"
        who = f"{one.share:.0%} by {' and '.join(one.workers)}, {left}" if one.workers else "nobody's"
        yield f"GPU {','.join(gpu.gpu for gpu in same)} ({one.name}, {_gib(one.memory_bytes)} GiB): {who}"


def _kv(workers: Sequence[WorkerReport]) -> list[str]:
    head = ("KV of each rank", "dtype", "groups", "KiB a token", "block", "blocks", "requests", "of tokens")
    return table(head, [_kv_row(worker.name, worker.kv) for worker in workers if worker.kv], left=3)


def _kv_row(name: str, kv: KvReport) -> tuple[str, ...]:
    requests = f"{kv.requests:.1f}" if kv.requests < 10 else f"{kv.requests:.0f}"
    return (
        name, kv.dtype, " + ".join(kv.groups), f"{kv.token_bytes / 1024:g}", f"{kv.block_tokens}", f"{kv.blocks}",
        requests, f"{kv.context_tokens}",
    )  # fmt: skip


def _port_lines(ports: Sequence[Port]) -> list[str]:
    head = ("listens", "at", "for", "now")
    rows = [
        (
            port.process, f"{port.host}:{port.port or 'any'}", port.what,
            port.problem and "taken" or ("free" if port.port else "-"),
        )
        for port in ports
    ]  # fmt: skip
    return table(head, rows, left=4)


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / GIB:.1f}"


def report_json(report: Report) -> dict[str, object]:
    """The same for programs; bytes, and each worker's and GPU's sums beside its parts."""
    plain: dict[str, object] = msgspec.to_builtins(report)
    plain["workers"] = [{**msgspec.to_builtins(worker), "rank_bytes": worker.rank_bytes} for worker in report.workers]
    plain["gpus"] = [{**msgspec.to_builtins(gpu), "share": round(gpu.share, 4)} for gpu in report.gpus]
    return plain
