"""From a `WorkerConfig` to what vLLM is started with: its arguments and its environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import xxhash

from ...config import WorkerConfig
from . import versions
from .kv_tensors import UnfitKv
from .versions import Unchecked

CONNECTOR_MODULE = "hocket.workers.engines.vllm.connector"
MARK_NAME = "HOCKET_ENGINE"
REPORTS_FAILED_LOADS = "reports_failed_loads"
_SAMPLE_BYTES = 1 << 16
_environment_lock = Lock()


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this engine is to others, and where its private files are."""

    worker_id: str
    epoch: int
    folder: Path
    reports_failed_loads: bool = True

    @property
    def side_channel(self) -> str:
        return str(self.folder / "side")

    @property
    def kv_events(self) -> str:
        return f"ipc://{self.folder / 'kv'}"

    @property
    def mark(self) -> str:
        """What its processes carry in their environment."""
        return f"{MARK_NAME}={self.folder.name}"


def model_identity(model: str) -> tuple[str, str]:
    """(name, revision) for the fingerprint: equal weights in another folder are the same model.

    A folder's revision is a digest over its config and samples of its weights: reading all of them would take longer than
    loading them. An id's is left to Hugging Face's cache, which names it in the folder that vLLM resolves.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model, ""
    digest = xxhash.xxh3_128()
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
    for path in [folder / "config.json", *files]:
        if not path.is_file():
            continue
        length = path.stat().st_size
        digest.update(f"{path.name} {length}\0".encode())
        with path.open("rb") as file:
            for start in {0, length // 3, 2 * length // 3, max(0, length - _SAMPLE_BYTES)}:
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return folder.resolve().name, digest.hexdigest()


def engine_args(config: WorkerConfig, identity: Identity) -> dict[str, Unchecked]:
    """The keyword arguments of `AsyncEngineArgs`; imports vLLM. `config.engine_args` has the last word."""
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    name, revision = model_identity(config.model)
    arguments: dict[str, Unchecked] = {
        **size_args(config, is_cpu=is_cpu),
        "model": config.model,
        "prefix_caching_hash_algo": "sha256_cbor",
        "use_tqdm_on_load": False,
        "disable_log_stats": True,  # vLLM's own loggers; ours stays.
        "kv_transfer_config": _kv_transfer(config, identity, name, revision),
        "kv_events_config": _kv_events(identity),
    }
    if config.role == "decode":
        arguments |= versions.dense_prefix_cache()  # Else the KV that a hand-off brought is never found again.
    return arguments | config.engine_args


def size_args(config: WorkerConfig, *, is_cpu: bool) -> dict[str, Unchecked]:
    """Those of them that decide how much memory an engine takes and how much it does at once; without vLLM."""
    arguments: dict[str, Unchecked] = {
        "dtype": _dtype(config.dtype, is_cpu),
        "tensor_parallel_size": config.tp,
        "block_size": config.block_tokens,
        "max_num_seqs": config.slots,
        "enable_prefix_caching": True,
    }
    if config.max_model_len:
        arguments["max_model_len"] = config.max_model_len
    if config.kv_blocks:
        arguments["num_gpu_blocks_override"] = config.kv_blocks + 1  # vLLM keeps block 0 for itself.
    if is_cpu or not config.kv_blocks:
        arguments["kv_cache_memory_bytes"] = int(config.kv_gib * (1 << 30))
    if config.role == "prefill":
        arguments |= {"enable_chunked_prefill": True, "max_num_batched_tokens": max(config.chunk_tokens, config.slots)}
    elif is_cpu:
        # A seeded request whose prompt is computed in chunks ends a CPU engine ("CPU Generator does not use offset").
        # Without a limit given, vLLM's own budget for a step is then a whole prompt of the model's length.
        arguments["enable_chunked_prefill"] = False
        if config.max_model_len:
            arguments["max_num_batched_tokens"] = config.max_model_len + config.slots  # Each running request takes one.
    if is_cpu:
        arguments["enforce_eager"] = True
    return arguments | config.engine_args


def async_llm(config: WorkerConfig, identity: Identity, logger: Unchecked) -> Unchecked:
    """Start vLLM, inside `environment`. Raises UnfitKv, and whatever vLLM raises."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(**engine_args(config, identity))
    vllm_config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    if refusal := _refusal(vllm_config):
        raise UnfitKv(refusal)
    return AsyncLLM.from_vllm_config(
        vllm_config,
        stat_loggers=[logger],
        enable_log_requests=arguments.enable_log_requests,
        disable_log_stats=arguments.disable_log_stats,
    )


def _refusal(vllm_config: Unchecked) -> str:
    """Why an engine that is spread over devices like this cannot hand KV off; "" when it can."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    ranks, heads = parallel.tensor_parallel_size, 1 if model.use_mla else max(1, model.get_total_num_kv_heads())
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism spreads a model's layers"),
        ("data_parallel_size", "data parallelism makes several engines, each of which can be a worker"),
        ("decode_context_parallel_size", "context parallelism spreads a prompt's tokens"),
        ("prefill_context_parallel_size", "context parallelism spreads a prompt's tokens"),
        ("nnodes", "the ranks are on several hosts"),
    ):
        if (size := getattr(parallel, name, 1)) != 1:
            return f"{name} {size}: {what}; only tensor-parallel ranks on one host can hand KV off yet"
    if ranks % heads and heads % ranks:
        return f"{heads} KV heads cannot be divided among {ranks} tensor-parallel ranks, nor copied to them evenly"
    return ""


def _dtype(wanted: str, is_cpu: bool) -> str:
    if wanted != "auto" or not is_cpu:
        return wanted
    # bfloat16 without AMX is several times slower than float32 (measured on AVX-512 BF16).
    flags = Path("/proc/cpuinfo").read_text()
    return "auto" if "amx_bf16" in flags else "float32"


def _kv_transfer(config: WorkerConfig, identity: Identity, model: str, revision: str) -> Unchecked:
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector="KvPushConnector",
        kv_connector_module_path=CONNECTOR_MODULE,
        # Never kv_producer on decode: vLLM guards blocks that a peer may write only for consumers.
        kv_role="kv_producer" if config.role == "prefill" else "kv_consumer",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "side_channel": identity.side_channel,
            "transports": config.transports,
            "bind": config.bind,
            "worker_id": identity.worker_id,
            "epoch": identity.epoch,
            "model": model,
            "revision": revision,
            "staging_bytes": config.staging_mib << 20,
            "verifies_blocks": config.verify_kv,
            "step_log": config.step_log,
            REPORTS_FAILED_LOADS: identity.reports_failed_loads and versions.can_report_failed_loads(),
        },
    )


def _kv_events(identity: Identity) -> Unchecked:
    from vllm.config import KVEventsConfig

    # vLLM keeps 10,000 batches for who asks again, 27 KiB for a prompt of 3,000 tokens; we never do (`Translator`).
    return KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=identity.kv_events, buffer_steps=1)


def environment(config: WorkerConfig, identity: Identity) -> dict[str, str]:
    """What vLLM's processes must find in their environment. Raises ValueError for cores that do not fit the ranks."""
    name, _, value = identity.mark.partition("=")
    variables = {
        name: value,
        "SPT_NOENV": "1",  # Else vLLM's process titles overwrite the environment that the reaper reads.
        # Its processes are killed in the end, and Python's resource tracker cleans up after them: as planned.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        "PYTHONHASHSEED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if "VLLM_LOGGING_LEVEL" not in os.environ:  # The user's choice; vLLM reads it nowhere else.
        variables["VLLM_LOGGING_LEVEL"] = "ERROR"  # Each start warns some twenty times about what is meant to be.
    if Path(config.model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if config.cpu_cores:
        if len(config.cpu_cores.split("|")) != config.tp:
            raise ValueError(f"cpu_cores {config.cpu_cores!r} has to name the cores of {config.tp} ranks, like 0-3|4-7")
        # vLLM's "auto" binds every engine of a machine to the same cores.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = config.cpu_cores
    return variables


@contextmanager
def environment_set(variables: dict[str, str]) -> Iterator[None]:
    """vLLM takes settings from the environment alone, and its processes inherit it: set it while they are started.

    One start at a time in a process: the next engine has another mark and other cores.
    """
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
