"""What one engine takes of each of its GPUs, and how many requests its KV cache holds: arithmetic on what vLLM is told.

Weights, KV and staging follow from the model and the settings. The rest is an assumption, made to fit what three runs on H200s
took (`tests/cluster/test_memory.py`: within 3 %), and is called so wherever it is shown: `ASSUMED` says what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..transport.layout import KvGroup, KvLayer, KvLayout, KvShape
from ..workers.config import WorkerConfig
from ..workers.engines.vllm.engine_args import size_args
from .model_shape import DTYPE_BYTES, ModelShape

GIB = 1 << 30
CONTEXT_BYTES = int(0.6 * GIB)  # a process on a GPU that has allocated nothing; driver and torch's own
GROUP_BYTES = GIB  # NCCL and all-reduce buffers of a rank that has others
GRAPHS_BYTES = GIB
UTILIZATION = 0.92  # vLLM 0.32's default; 0.26 has 0.9
DECODE_STEP_TOKENS = 2048  # vLLM's default for AsyncLLM (SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS)
STEPS_AT_ONCE = 2  # async scheduling: one more batch is on its way while one computes
_MERGE_SHARE = (
    1.5  # vLLM 0.32, kv_cache_utils.py: kinds of layers that are about equally many make groups of equal size
)
ASSUMED = (
    f"a CUDA context {CONTEXT_BYTES / GIB:g} GiB, buffers of tensor parallelism {GROUP_BYTES / GIB:g} GiB, CUDA graphs "
    f"{GRAPHS_BYTES / GIB:g} GiB (none with enforce_eager), activations of the largest step in 16 bit and logits in 32"
)
_KV_BYTES = {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What vLLM is told, defaults filled in."""

    tp: int
    dtype: str
    kv_dtype: str
    kv_number_bytes: int
    block_tokens: int
    context_tokens: int
    step_tokens: int  # most in one step
    requests: int  # at once
    kv_bytes: int | None  # of each rank; None: `kv_blocks` says it
    kv_blocks: int
    utilization: float  # share of a GPU that must be free when the engine starts
    has_graphs: bool

    @classmethod
    def of(cls, config: WorkerConfig, shape: ModelShape, *, is_cpu: bool) -> EngineSizes:
        """Raises ValueError for an engine argument that is not of its type."""
        arguments = size_args(config, is_cpu=is_cpu)
        dtype = str(arguments["dtype"])
        dtype = shape.dtype if dtype == "auto" else dtype
        kv_dtype = str(arguments.get("kv_cache_dtype", "auto"))
        kv_dtype = dtype if kv_dtype == "auto" else kv_dtype
        context_tokens = _number(arguments, "max_model_len", shape.context_tokens)
        # Without chunks a step has room for a whole prompt.
        step_tokens = DECODE_STEP_TOKENS if arguments.get("enable_chunked_prefill", True) else context_tokens
        if is_cpu or "num_gpu_blocks_override" not in arguments:
            kv_bytes: int | None = _number(arguments, "kv_cache_memory_bytes", 0)
        else:
            kv_bytes = None
        return cls(
            tp=_number(arguments, "tensor_parallel_size", config.tp),
            dtype=dtype,
            kv_dtype=kv_dtype,
            kv_number_bytes=_KV_BYTES.get(kv_dtype, DTYPE_BYTES.get(kv_dtype, DTYPE_BYTES[shape.dtype])),
            block_tokens=_number(arguments, "block_size", config.block_tokens),
            context_tokens=context_tokens,
            step_tokens=_number(arguments, "max_num_batched_tokens", step_tokens),
            requests=_number(arguments, "max_num_seqs", config.slots),
            kv_bytes=kv_bytes,
            kv_blocks=_number(arguments, "num_gpu_blocks_override", 0),
            utilization=float(str(arguments.get("gpu_memory_utilization", UTILIZATION))),
            has_graphs=not arguments.get("enforce_eager", False),
        )


def _number(arguments: Mapping[str, object], name: str, default: int) -> int:
    value = arguments.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"engine_args: {name}: {value!r} is not a whole number >= 0")
    return value


def kv_layout(model: str, shape: ModelShape, sizes: EngineSizes, *, rank: int = 0, is_cpu: bool) -> KvLayout:
    """As this engine's rank will describe its KV to others, but for what only the engine knows (its version, its kernels)."""
    groups, group_of = kv_groups(shape.layers)
    return KvLayout(
        model=model,
        revision="",
        dtype=sizes.dtype,
        kv_dtype=sizes.kv_dtype,
        layers=tuple(_layer(shape, sizes, index, group_of[index]) for index in range(len(shape.layers))),
        shape=KvShape((sizes.block_tokens,) * len(groups), "HND", sizes.tp, rank),
        groups=groups,
        digest="xxh3" if is_cpu else "weighted",
    )


def _layer(shape: ModelShape, sizes: EngineSizes, index: int, group: int) -> KvLayer:
    head_bytes = shape.head_numbers * sizes.kv_number_bytes
    return KvLayer(f"layer {index}", shape.kv_heads, head_bytes, 1 if shape.is_latent else 2, group)


def kv_groups(layers: tuple[KvGroup, ...]) -> tuple[tuple[KvGroup, ...], tuple[int, ...]]:
    """The groups that vLLM makes, and each layer's: equally many layers in each, as few groups as that allows.

    vLLM 0.32, v1/core/kv_cache_utils.py, `_get_kv_cache_groups_uniform_page_size`.
    """
    kinds = {kind: [index for index, layer in enumerate(layers) if layer == kind] for kind in dict.fromkeys(layers)}
    counts = [len(members) for members in kinds.values()]
    size = max(counts) if max(counts) < _MERGE_SHARE * min(counts) else min(counts)
    groups: list[KvGroup] = []
    group_of = [0] * len(layers)
    for kind, members in kinds.items():
        parts = -(-len(members) // size)
        for place, layer in enumerate(members):
            group_of[layer] = len(groups) + place % parts
        groups += [kind] * parts
    return tuple(groups), tuple(group_of)


@dataclass(frozen=True, slots=True)
class KvRoom:
    """One rank's KV cache."""

    nbytes: int
    token_bytes: int  # of a token that every layer keeps, in this rank
    block_bytes: int  # of a block of the pool, which any group may take
    blocks: int
    start_blocks: int  # one request of the greatest length while its prompt is computed; vLLM starts with room for that
    request_blocks: int  # what one of the greatest length holds: on decode, when its prompt came from elsewhere

    @property
    def requests(self) -> float:
        """Of the greatest length at once."""
        return self.blocks / self.request_blocks


def kv_room(layout: KvLayout, sizes: EngineSizes, *, is_decode: bool) -> KvRoom:
    """How much fits, as vLLM counts it: groups take their blocks from one pool, and a window keeps what it can still see."""
    layers_of_group = max(sum(layer.group == group for layer in layout.layers) for group in range(len(layout.groups)))
    block_bytes = layout.block_bytes(0) * layers_of_group
    nbytes = sizes.kv_blocks * block_bytes if sizes.kv_bytes is None else sizes.kv_bytes
    blocks = max(0, (sizes.kv_blocks or nbytes // block_bytes) - 1)  # vLLM keeps block 0 for itself.
    start_blocks = sum(_request_blocks(group, sizes, sizes.step_tokens) for group in layout.groups)
    decoding = sum(_request_blocks(group, sizes, 1) for group in layout.groups)
    return KvRoom(
        nbytes, layout.token_bytes, block_bytes, blocks, start_blocks, decoding if is_decode else start_blocks
    )


def _request_blocks(group: KvGroup, sizes: EngineSizes, step_tokens: int) -> int:
    """vLLM 0.32, v1/kv_cache_interface.py, `max_admission_blocks_per_request`."""
    tokens = sizes.context_tokens
    on_its_way = STEPS_AT_ONCE * step_tokens
    match group.kind:
        case "window":
            return math.ceil(min(group.span_tokens - 1 + on_its_way, tokens) / sizes.block_tokens) + 1
        case "chunk":
            return math.ceil(min(group.span_tokens + on_its_way, tokens) / sizes.block_tokens)
    return math.ceil(tokens / sizes.block_tokens)


def assumed_bytes(shape: ModelShape, sizes: EngineSizes) -> dict[str, int]:
    """What else a rank takes of its GPU: an assumption, by name."""
    inner = sizes.step_tokens * (4 * shape.hidden + 3 * max(shape.inner // sizes.tp, shape.hidden)) * 2
    logits = 2 * sizes.requests * shape.vocabulary * 4
    return {
        "context": CONTEXT_BYTES,
        "all_reduce": GROUP_BYTES if sizes.tp > 1 else 0,
        "graphs": GRAPHS_BYTES if sizes.has_graphs else 0,
        "activations": inner + logits,
    }
