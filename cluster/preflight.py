"""From a plan and the facts of a machine to what `hocket serve --check` says: who gets what, and what cannot be. Decides."""

from __future__ import annotations

from collections.abc import Sequence

from .config import Plan
from .diagnosis import Finding
from .engine_memory import EngineSizes
from .gpus import find_gpu
from .model_shape import ModelShape
from .preflight_facts import GpuReport, MachineFacts, ModelFacts, PlannedEngine, Port, Report, WorkerReport
from .preflight_rules import (
    engine_findings,
    fix,
    gib,
    machine_findings,
    memory_findings,
    model_findings,
    note,
    pair_findings,
    port_findings,
    sharing_findings,
    unfit_ranks,
)

# Of a rank on the host: its libraries, and its share of vLLM's core and of the worker's own process. 2.0 GB were measured for an
# engine on CPUs beside its weights and KV; CUDA's libraries and NCCL pin more.
PROCESS_BYTES = 3 << 30


def preflight(plan: Plan, machine: MachineFacts, models: Sequence[ModelFacts], ports: Sequence[Port]) -> Report:
    """The report. `plan.workers` as they would be started, cores included."""
    findings = list(machine_findings(machine))
    shapes: dict[str, ModelShape] = {}
    for facts in models:
        findings += model_findings(facts, shapes)
    engines = [PlannedEngine(spec, machine, shapes.get(spec.config.model)) for spec in plan.workers]
    for engine in engines:
        findings += _measure(engine)
        findings += engine_findings(engine, machine)
    workers = tuple(engine.report() for engine in engines)
    gpus = _gpu_reports(engines, workers, machine)
    findings += sharing_findings(engines, gpus, machine)
    findings += memory_findings(workers, gpus)
    findings += pair_findings(engines)
    findings += port_findings(ports)
    pinned = sum(engine.config.staging_mib << 20 for engine in engines if engine.has_gpus for _ in engine.gpus)
    host = pinned + sum(_host_bytes(engine, worker) for engine, worker in zip(engines, workers, strict=True))
    if not machine.is_elsewhere and machine.memory_bytes and host > machine.memory_bytes:
        text = f"the workers want {gib(host)} of host memory, the machine has {gib(machine.memory_bytes)}"
        findings.append(fix("host_memory", "this machine", text, "fewer workers, less staging_mib or kv_gib"))
    wanted = plan.serve.processes + 1 + sum(1 + engine.config.tp for engine in engines)
    if not machine.is_elsewhere and any(engine.has_gpus for engine in engines) and wanted > len(machine.cores):
        text = f"{len(machine.cores)} cores for {wanted} busy processes: routers, NATS, and of each engine its core and its ranks"
        findings.append(note("few_cores", "this machine", text, "GPUs wait where these wait for each other"))
    is_ok = not any(finding.severity == "fix" for finding in findings)
    findings.sort(key=lambda finding: finding.severity)
    return Report(
        is_ok,
        tuple(findings),
        workers,
        gpus,
        tuple(ports),
        cores=len(machine.cores),
        cores_wanted=wanted,
        memory_bytes=machine.memory_bytes,
        host_bytes=host,
        pinned_bytes=pinned,
    )


def _measure(engine: PlannedEngine) -> list[Finding]:
    """Fill in its sizes; what keeps them from being known."""
    if engine.shape is None:
        return []
    try:
        engine.sizes = EngineSizes.of(engine.config, engine.shape, is_cpu=engine.is_cpu)
    except ValueError as error:
        return [fix("engine_args", engine.name, str(error))]
    wrong = list(unfit_ranks(engine.name, engine.shape, engine.sizes))
    if not wrong:
        engine.measure(engine.sizes, engine.shape)
    return wrong


def _gpu_reports(
    engines: Sequence[PlannedEngine], workers: Sequence[WorkerReport], machine: MachineFacts
) -> tuple[GpuReport, ...]:
    taken: dict[int, dict[str, int]] = {index: {} for index in range(len(machine.gpus))}
    for engine, worker in zip(engines, workers, strict=True):
        for gpu in engine.gpus:
            index = find_gpu(gpu, machine.gpus)
            if index is not None:
                taken[index][engine.name] = worker.rank_bytes
    return tuple(
        GpuReport(str(index), machine.gpus[index].name, machine.gpus[index].memory_bytes, of)
        for index, of in taken.items()
    )


def _host_bytes(engine: PlannedEngine, worker: WorkerReport) -> int:
    if not engine.is_real:
        return 0
    own = ((worker.weight_bytes or 0) + (worker.kv_bytes or 0)) * worker.tp if engine.is_cpu else 0
    return own + PROCESS_BYTES * worker.tp
