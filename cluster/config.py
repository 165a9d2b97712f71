"""What `hocket serve` is told, and the plan of processes that follows from it.

A config file has the cluster's own settings at its top, `[worker]` for every worker, `[router]` for the router, and one
`[[workers]]` table for each kind of worker that differs (`examples/cluster.toml` shows all of them).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ..router.config import RouterConfig
from ..workers.config import WorkerConfig
from .gpus import named_gpus
from .settings import Setting, SettingsError, refuse_unknown, resolve, settings_of

Meta = msgspec.Meta
LogLevel = Literal["debug", "info", "warning", "error"]


class CommonConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What every command is told beside its own settings."""

    log_level: Annotated[LogLevel, Meta(description="records below this level are left out")] = "info"


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One cluster on this machine. Times in seconds."""

    prefill: Annotated[int, Meta(description="prefill workers", ge=0, le=64)] = 1
    decode: Annotated[int, Meta(description="decode workers", ge=1, le=64)] = 1
    engine: Annotated[Literal["vllm", "sim"], Meta(description="what runs the model in every worker")] = "vllm"
    model: Annotated[str, Meta(description="folder, Hugging Face id, or demo (fetched once)")] = "demo"
    served_name: Annotated[str, Meta(description="model name clients use; default: the model's last path part")] = ""
    transports: Annotated[str, Meta(description="links for KV, best first, comma separated: ucx,tcp")] = "ucx,tcp"
    processes: Annotated[int, Meta(description="router processes, which share the port", ge=1, le=256)] = 1
    host: Annotated[str, Meta(description="address the API listens on")] = "127.0.0.1"
    port: Annotated[int, Meta(description="port of the API, 0: any free one", ge=0, le=65535)] = 8000
    nats: Annotated[str, Meta(description="URL of a NATS server with JetStream; default: start one here")] = ""
    pool: Annotated[str, Meta(description="pool of workers and routers that belong together")] = "main"
    machine_gpus: Annotated[
        str, Meta(description="GPUs of the machine this is for, like 8xH200 or 2x80GiB; --check counts with them")
    ] = ""
    state_dir: Annotated[
        str, Meta(description="folder of logs and of the NATS server's store; default: ~/.local/state/hocket/POOL")
    ] = ""
    start_timeout_s: Annotated[float, Meta(description="a process that is not ready by then fails the start", gt=0)] = (
        300.0
    )
    grace_s: Annotated[
        float, Meta(description="time to finish streams after Ctrl-C; everything ends within 6 s more", ge=0, le=300)
    ] = 3.0
    log_level: Annotated[LogLevel, Meta(description="records of our processes below it are only in the log files")] = (
        "info"
    )


class ProcessesConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many routers."""

    processes: Annotated[
        int,
        Meta(description="router processes on one port, each on a core of its own; they are supervised", ge=1, le=256),
    ] = 1


class DoctorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which pool `hocket doctor` examines."""

    nats: Annotated[
        str,
        Meta(
            description="URL of the pool's NATS server, credentials included; "
            "default: that of a hocket serve of this pool here, else nats://127.0.0.1:4222"
        ),
    ] = ""
    pool: Annotated[str, Meta(description="pool whose links are measured")] = "main"


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose routers `hocket policy`, `hocket explain` and `hocket top` ask."""

    nats: Annotated[
        str,
        Meta(
            description="URL of the pool's NATS server, credentials included; "
            "default: that of a hocket serve of this pool here, else nats://127.0.0.1:4222"
        ),
    ] = ""
    pool: Annotated[str, Meta(description="pool whose routers are asked")] = "main"


# What `serve` decides for its workers and its router: these are no settings of [worker], [router] and their flags.
_OF_THE_CLUSTER = ("nats", "pool", "model", "served_name", "engine", "transports", "grace_s", "host", "port")
_OF_ONE_WORKER = ("role", "worker_id", "metrics_port", "cpu_cores")

SERVE = settings_of(ServeConfig)
DOCTOR = settings_of(DoctorConfig)
POOL = settings_of(PoolConfig)
EVERY_WORKER = settings_of(WorkerConfig, leave_out=(*_OF_THE_CLUSTER, *_OF_ONE_WORKER))
ONE_WORKER = settings_of(WorkerConfig, leave_out=("nats", "pool", "worker_id", "grace_s", "served_name"))
THE_ROUTER = settings_of(RouterConfig, leave_out=(*_OF_THE_CLUSTER, "router_id", "reuse_port"))
PROCESSES = settings_of(ProcessesConfig)
_TABLES = ("worker", "router", "workers")
_TABLE_KEYS = ("count", "gpus")


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One worker process to be: its settings and what its environment adds."""

    name: str
    config: WorkerConfig
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """Every process that `serve` starts beside the NATS server; `nats` is filled in when its address is known."""

    serve: ServeConfig
    router: RouterConfig
    workers: Sequence[WorkerSpec]


def plan_from(
    *, flags: Mapping[str, object], environ: Mapping[str, str], file: Mapping[str, object], where: str
) -> Plan:
    """The plan that flags, variables and the file ask for. Raises SettingsError."""
    refuse_unknown(file, [*(setting.name for setting in SERVE), *_TABLES], where)
    worker_table, router_table = _table(file, "worker", EVERY_WORKER, where), _table(file, "router", THE_ROUTER, where)
    given = resolve(SERVE, flags=flags, environ=environ, file=file, where=where)
    every = resolve(EVERY_WORKER, flags=flags, environ=environ, file=worker_table, where=f"{where} [worker]")
    routers = resolve(THE_ROUTER, flags=flags, environ=environ, file=router_table, where=f"{where} [router]")
    serve = msgspec.convert(given, ServeConfig)
    check_names(pool=serve.pool)
    named_gpus(serve.machine_gpus)
    shared = {name: getattr(serve, name) for name in ("pool", "model", "served_name", "grace_s")}
    router = msgspec.convert(
        {**routers, **shared, "host": serve.host, "port": serve.port, "router_id": "router"}, RouterConfig
    )
    base = {**every, **shared, "engine": serve.engine, "transports": serve.transports}
    tables = _worker_tables(file.get("workers", []), given, where)
    return Plan(serve, router, _worker_specs(base, tables))


def check_names(**names: str) -> None:
    """Raises SettingsError for a name that cannot be part of a bus subject; "" is none."""
    from ..bus.subjects import token  # `hocket.bus` exports its NATS client, and --help must not wait for nats-py.

    for setting, name in names.items():
        try:
            token(name or "none")
        except ValueError as error:
            raise SettingsError(f"{setting}: {error}") from error


def _table(file: Mapping[str, object], name: str, settings: Sequence[Setting], where: str) -> Mapping[str, object]:
    table = file.get(name, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{where}: {name} is not a table; write [{name}]")
    refuse_unknown(table, [setting.name for setting in settings], f"{where} [{name}]")
    return table


@dataclass(frozen=True, slots=True)
class _WorkerTable:
    role: str
    count: int
    gpus: str
    values: Mapping[str, object]
    where: str = ""


def _worker_tables(raw: object, given: Mapping[str, object], where: str) -> list[_WorkerTable]:
    if not raw:
        counts = {"prefill": given.get("prefill", 1), "decode": given.get("decode", 1)}
        return [_WorkerTable(role, count, "", {}) for role, count in counts.items() if isinstance(count, int)]
    counted = [name for name in ("prefill", "decode") if name in given]
    if counted:
        raise SettingsError(f"{where}: [[workers]] lists the workers, so {counted[0]} cannot count them; leave one out")
    if not isinstance(raw, list) or not all(isinstance(table, dict) for table in raw):
        raise SettingsError(f"{where}: workers is not a list of tables; write [[workers]] for each kind")
    tables = [_worker_table(table, f"{where} [[workers]] {index}") for index, table in enumerate(raw)]
    if not any(table.role == "decode" and table.count for table in tables):
        raise SettingsError(f"{where}: [[workers]] has no decode worker; nothing could answer")
    return tables


def _worker_table(table: Mapping[str, object], where: str) -> _WorkerTable:
    refuse_unknown(table, [*(setting.name for setting in ONE_WORKER), *_TABLE_KEYS], where)
    values = resolve(ONE_WORKER, flags={}, environ={}, file=table, where=where)
    role = values.pop("role", None)
    if role is None:
        raise SettingsError(f'{where}: role is missing; write role = "prefill" or role = "decode"')
    count, gpus = table.get("count", 1), table.get("gpus", "")
    if not isinstance(count, int) or not 0 <= count <= 64:
        raise SettingsError(f"{where}: count: {count!r} is not a whole number >= 0 and <= 64")
    if not isinstance(gpus, str):
        raise SettingsError(f'{where}: gpus: {gpus!r} is not text like "0" or "0,1"')
    if values.get("metrics_port") and count > 1:
        raise SettingsError(f"{where}: metrics_port: {count} workers cannot share one port; give each a table")
    return _WorkerTable(str(role), count, gpus, values, where)


def _worker_specs(base: Mapping[str, object], tables: Sequence[_WorkerTable]) -> list[WorkerSpec]:
    specs: list[WorkerSpec] = []
    counts = {"prefill": 0, "decode": 0}
    for table in tables:
        for _ in range(table.count):
            index = str(counts[table.role])
            name = f"{table.role}-{index}"
            counts[table.role] += 1
            config = msgspec.convert(
                {**base, **table.values, "role": table.role, "worker_id": index}, WorkerConfig
            )  # It puts its role before it.
            _check_gpus(table, config.tp)
            specs.append(WorkerSpec(name, config, {"CUDA_VISIBLE_DEVICES": table.gpus} if table.gpus else {}))
    return specs


def _check_gpus(table: _WorkerTable, ranks: int) -> None:
    gpus = [gpu for gpu in table.gpus.split(",") if gpu.strip()]
    if gpus and len(gpus) != ranks:
        raise SettingsError(
            f"{table.where}: gpus: {table.gpus!r} names {len(gpus)}, and tp is {ranks}; each rank of an engine has its own"
        )


def share_cores(specs: Sequence[WorkerSpec], cores: Sequence[int]) -> list[WorkerSpec]:
    """Give each rank of an engine that computes on the CPU its own cores, unless the config did.

    vLLM's own choice binds every engine of a machine to the same cores, and they then wait for each other. With cores to
    spare one is left to the router and nats-server; with fewer cores than ranks some share.
    """
    free = [spec for spec in specs if spec.config.engine == "vllm" and not spec.config.cpu_cores]
    if not free or not cores:
        return list(specs)
    ranks = sum(spec.config.tp for spec in free)
    usable = list(cores[1:] if len(cores) > 2 * ranks else cores)
    per_rank = max(1, len(usable) // ranks)
    starts = iter([index * per_rank % len(usable) for index in range(ranks)])
    shares: dict[str, str] = {}
    for spec in free:
        own = [usable[start : start + per_rank] for start in itertools.islice(starts, spec.config.tp)]
        shares[spec.name] = "|".join(",".join(map(str, part)) for part in own)
    return [
        WorkerSpec(spec.name, msgspec.structs.replace(spec.config, cpu_cores=shares[spec.name]), spec.environment)
        if spec.name in shares
        else spec
        for spec in specs
    ]


def state_folder(config: ServeConfig) -> Path:
    """Where a cluster keeps its logs and the store of its NATS server."""
    if config.state_dir:
        return Path(config.state_dir).expanduser().resolve()
    return _state_base() / config.pool


def routers_folder(pool: str, port: int) -> Path:
    """Where several routers that share a port keep their logs."""
    return _state_base() / pool / f"routers-{port}"


def _state_base() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "hocket"


def server_url_file(folder: Path) -> Path:
    """Where `serve` leaves the URL of the NATS server it started, for its user alone: it holds the password."""
    return folder / "nats-url"


def server_here(pool: str) -> str:
    """The NATS server of a `hocket serve` of this pool on this machine, else NATS's own default."""
    try:
        return server_url_file(state_folder(ServeConfig(pool=pool))).read_text()
    except OSError:
        return "nats://127.0.0.1:4222"
