"""What `hocket serve --check` knows and says: facts of a machine and its models, a planned engine, the report. No I/O."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from ..transport.layout import KvLayout
from .config import WorkerSpec
from .diagnosis import Finding
from .engine_memory import ASSUMED, EngineSizes, KvRoom, assumed_bytes, kv_layout, kv_room
from .gpus import Gpu
from .model_shape import ModelShape


class ModelFacts(msgspec.Struct, frozen=True):
    """What was found under a model's name."""

    name: str
    config: Mapping[str, object] | None = None
    problem: str = ""  # why there is no config
    is_fetched_later: bool = False  # by `serve`, from a registry
    file_bytes: int = 0  # of its weights; 0: there are none


class Port(msgspec.Struct, frozen=True):
    """One that a process listens on; 0: any free one, chosen when it starts."""

    process: str
    what: str
    host: str
    port: int
    problem: str = ""


class MachineFacts(msgspec.Struct, frozen=True):
    """Where the plan is to run."""

    gpus: tuple[Gpu, ...]
    is_elsewhere: bool = (
        False  # `gpus` were named, and this machine has none: its other facts are not those of the plan's
    )
    own_gpus: tuple[Gpu, ...] = ()
    cores: tuple[int, ...] = ()
    memory_bytes: int = 0
    is_cpu_build: bool = False  # of vLLM
    has_vllm: bool = True
    transports: tuple[str, ...] = ()
    state_problem: str = ""


class KvReport(msgspec.Struct, frozen=True):
    """One rank's KV cache; `requests` of the greatest length fit at once."""

    dtype: str
    groups: tuple[str, ...]
    token_bytes: int
    block_tokens: int
    block_bytes: int
    blocks: int
    context_tokens: int
    requests: float


class WorkerReport(msgspec.Struct, frozen=True):
    """One worker; bytes are of each of its GPUs (of the host's memory, when its engine computes on CPUs)."""

    name: str
    role: str
    engine: str
    gpus: tuple[str, ...]
    tp: int
    cores: str
    slots: int
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    staging_bytes: int = 0
    assumed_bytes: dict[str, int] = {}
    kv: KvReport | None = None

    @property
    def rank_bytes(self) -> int:
        """Of each GPU, or of the host for each rank."""
        return (self.weight_bytes or 0) + (self.kv_bytes or 0) + self.staging_bytes + sum(self.assumed_bytes.values())


class GpuReport(msgspec.Struct, frozen=True):
    """One GPU and who takes how much of it."""

    gpu: str
    name: str
    memory_bytes: int
    workers: dict[str, int]

    @property
    def share(self) -> float:
        """Of its memory that is taken."""
        return sum(self.workers.values()) / self.memory_bytes if self.memory_bytes else 0.0


class Report(msgspec.Struct, frozen=True):
    """Everything that `--check` prints; `host_bytes` and `pinned_bytes` are of the host's memory."""

    is_ok: bool
    findings: tuple[Finding, ...]
    workers: tuple[WorkerReport, ...] = ()
    gpus: tuple[GpuReport, ...] = ()
    ports: tuple[Port, ...] = ()
    cores: int = 0
    cores_wanted: int = 0  # by processes that are busy while tokens are made
    memory_bytes: int = 0
    host_bytes: int = 0
    pinned_bytes: int = 0
    assumed: str = ASSUMED


class PlannedEngine:
    """One worker on its way to a report."""

    def __init__(self, spec: WorkerSpec, machine: MachineFacts, shape: ModelShape | None) -> None:
        given = spec.environment.get("CUDA_VISIBLE_DEVICES", "")
        self.spec = spec
        self.config = spec.config
        self.is_real = spec.config.engine == "vllm"
        self.is_cpu = self.is_real and machine.is_cpu_build and not given
        self.has_gpus = self.is_real and not self.is_cpu
        named = (
            [part.strip() for part in given.split(",") if part.strip()]
            if given
            else [str(i) for i in range(spec.config.tp)]
        )
        self.gpus = tuple(named) if self.has_gpus else ()
        self.shape = shape if self.is_real else None
        self.sizes: EngineSizes | None = None
        self.layout: KvLayout | None = None
        self.room: KvRoom | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    def measure(self, sizes: EngineSizes, shape: ModelShape) -> None:
        """Fill in what follows from what vLLM will be told; the ranks must fit the model's heads."""
        self.layout = kv_layout(self.config.model, shape, sizes, is_cpu=self.is_cpu)
        self.room = kv_room(self.layout, sizes, is_decode=self.config.role == "decode")

    def report(self) -> WorkerReport:
        config, sizes, room = self.config, self.sizes, self.room
        tp = sizes.tp if sizes else config.tp
        report = WorkerReport(
            self.name, config.role, config.engine, self.gpus, tp, config.cpu_cores if self.is_cpu else "", config.slots
        )
        if self.shape is None or sizes is None or room is None or self.layout is None:
            return report
        groups = tuple(f"{group.kind} {group.span_tokens}".removesuffix(" 0") for group in self.layout.groups)
        kv = KvReport(
            sizes.kv_dtype, groups, room.token_bytes, sizes.block_tokens, room.block_bytes, room.blocks,
            sizes.context_tokens, round(room.requests, 2),
        )  # fmt: skip
        return msgspec.structs.replace(
            report,
            weight_bytes=self.shape.rank_weight_bytes(tp, sizes.dtype),
            kv_bytes=room.nbytes,
            staging_bytes=config.staging_mib << 20 if self.has_gpus else 0,
            assumed_bytes=assumed_bytes(self.shape, sizes) if self.has_gpus else {},
            kv=kv,
        )
