"""vLLM's KV tensors as a pool of blocks, in host or in GPU memory, and the layout that two engines compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....transport.layout import KvGroup, KvLayer, KvLayout, KvShape
from ....transport.pool import HostKvPool
from .kv_groups import KvGroups
from .versions import Unchecked

if TYPE_CHECKING:
    import torch

    from ....transport.gpu.pool import CudaKvPool

MLA_SPEC = "MLAAttentionSpec"
UNIFORM_SPEC = "UniformTypeKVCacheSpecs"


class UnfitKv(Exception):
    """This engine's KV cannot be handed off; the text says why and what would help."""


@dataclass(frozen=True, slots=True)
class KvGroupFacts:
    """A KV group as vLLM's scheduler knows it (`KVCacheGroupSpec`)."""

    kind: KvGroup
    block_tokens: int
    layer_names: frozenset[str]
    mla_names: frozenset[str]  # of these: one latent for all heads


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the tensors cannot tell."""

    model: str
    revision: str
    dtype: str
    groups: tuple[KvGroupFacts, ...]
    engine: str  # vLLM's version: another one may pack a block in another way
    backends: str  # attention backends, for the same reason
    kv_heads: int  # of the model, over all tensor-parallel ranks
    tp_size: int = 1
    tp_rank: int = 0
    packed_order: str | None = None  # how a block really lies in memory, when the tensor's strides do not tell


def group_facts(groups: Sequence[Unchecked]) -> tuple[KvGroupFacts, ...]:
    """From vLLM's `kv_cache_groups`. Raises UnfitKv for what no hand-off can serve: states, encoders, unknown specs."""
    return tuple(_group_facts(group.kv_cache_spec, group.layer_names) for group in groups)


def kv_groups(facts: Sequence[KvGroupFacts]) -> KvGroups:
    return KvGroups(tuple(group.kind for group in facts), tuple(group.block_tokens for group in facts))


def _group_facts(spec: Unchecked, layer_names: Sequence[str]) -> KvGroupFacts:
    layer_specs = dict.fromkeys(layer_names, spec)
    if type(spec).__name__ == UNIFORM_SPEC:  # One block table for layers of different head sizes.
        layer_specs = dict(spec.kv_cache_specs)
    kinds = {_kind(name, layer_spec) for name, layer_spec in layer_specs.items()}
    if len(kinds) != 1:
        raise UnfitKv(f"layers {', '.join(layer_names)} share blocks and look back differently far: {kinds}")
    mla_names = [name for name, layer_spec in layer_specs.items() if type(layer_spec).__name__ == MLA_SPEC]
    return KvGroupFacts(kinds.pop(), int(spec.block_size), frozenset(layer_names), frozenset(mla_names))


def _kind(name: str, spec: Unchecked) -> KvGroup:
    """By the exact class: a subclass means other rules about blocks."""
    class_name = type(spec).__name__
    if class_name == "MambaSpec":
        raise UnfitKv(f"layer {name} keeps a state instead of KV (Mamba, linear attention), which cannot be handed off")
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise UnfitKv(f"layer {name} keeps {spec.tokens_per_state} tokens in one state, which cannot be handed off")
    match class_name:
        case "FullAttentionSpec" | "MLAAttentionSpec":
            return KvGroup()
        case "SlidingWindowSpec":
            # The spec's window, which is not always that of the model's config.
            return KvGroup("window", int(spec.sliding_window))
        case "ChunkedLocalAttentionSpec":
            return KvGroup("chunk", int(spec.attention_chunk_size))
    raise UnfitKv(f"layer {name} keeps its KV as {class_name}, which cannot be handed off")


def pool_of(
    tensors: Mapping[str, torch.Tensor],
    facts: ModelFacts,
    *,
    staging_bytes: int = 512 << 20,
    verifies_blocks: bool = False,
) -> HostKvPool | CudaKvPool:
    """The pool over `tensors` (layer name -> (blocks, KV heads, tokens, 2 x head size)), without a copy.

    In GPU memory it takes `staging_bytes` besides. Raises UnfitKv, TransportUnavailable.
    """
    own = _own_layers(tensors, facts.groups)
    orders = {_check(name, tensors[name], facts.groups[group].block_tokens) for name, group in own.items()}
    if len(orders) != 1:
        raise UnfitKv(f"layers lay their blocks out differently: {', '.join(sorted(orders))}")
    order = orders.pop() if facts.packed_order is None else facts.packed_order
    rows = [_rows(tensors[name]) for name in own]
    device = rows[0].device.type
    groups = kv_groups(facts.groups)
    layout = KvLayout(
        model=facts.model,
        revision=facts.revision,
        dtype=facts.dtype,
        kv_dtype=",".join(sorted({_dtype(tensors[name]) for name in own})),
        layers=tuple(_layer(name, tensors[name], facts, group) for name, group in own.items()),
        shape=KvShape(groups.block_tokens, order, facts.tp_size, facts.tp_rank),
        groups=groups.groups,
        digest="xxh3" if device == "cpu" else "weighted",
        extra=f"vllm {facts.engine} {facts.backends}",
    )
    if device == "cpu":
        return HostKvPool(layout, [row.numpy() for row in rows])
    from ....transport.gpu.pool import CudaKvPool  # Needs Triton, which engines on CPUs do without.

    return CudaKvPool(layout, rows, staging_bytes, verifies_blocks=verifies_blocks)


def _own_layers(tensors: Mapping[str, torch.Tensor], groups: Sequence[KvGroupFacts]) -> dict[str, int]:
    """Layer name -> its group. Layers that share another one's KV travel once, under the first name.

    The same memory in two groups is no sharing: the groups take turns in it, block by block.
    """
    group_of = {name: index for index, group in enumerate(groups) for name in group.layer_names}
    seen: set[tuple[int, int]] = set()
    shared = {
        tensor.data_ptr() for name, tensor in tensors.items() if name in group_of and not isinstance(tensor, Sequence)
    }
    own = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Sequence):
            raise UnfitKv(f"layer {name} keeps a state of several tensors (Mamba), which cannot be handed off")
        if name not in group_of:
            if tensor.data_ptr() in shared:
                continue  # vLLM leaves a layer that uses another one's KV out of the groups.
            raise UnfitKv(f"layer {name} is in no KV group")
        key = (group_of[name], tensor.data_ptr())
        if key not in seen:
            seen.add(key)
            own[name] = group_of[name]
    return own


def _layer(name: str, tensor: torch.Tensor, facts: ModelFacts, group: int) -> KvLayer:
    head_bytes = tensor.shape[3] * tensor.element_size()
    if name in facts.groups[group].mla_names:
        return KvLayer(name, 1, head_bytes, 1, group)
    # With more ranks than heads every rank has one, and the tensor no longer tells how many there are.
    heads = tensor.shape[1] * facts.tp_size if facts.tp_size <= facts.kv_heads else facts.kv_heads
    return KvLayer(name, heads, head_bytes, 2, group)


def _check(name: str, tensor: torch.Tensor, block_tokens: int) -> str:
    """The order in which a block of this layer lies in memory: "HND" or "NHD"."""
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnfitKv(f"the KV cache is on {tensor.device}; only KV in host or CUDA memory can be handed off")
    if tensor.dim() != 4:
        raise UnfitKv(f"layer {name} has the shape {tuple(tensor.shape)}, not (blocks, heads, tokens, 2 x head size)")
    if tensor.shape[2] != block_tokens:
        raise UnfitKv(
            f"layer {name} has blocks of {tensor.shape[2]} tokens in memory, {block_tokens} in vLLM's scheduler"
        )
    if tensor[0].is_contiguous():
        return "HND"
    if tensor[0].transpose(0, 1).is_contiguous():
        return "NHD"
    raise UnfitKv(f"a block of layer {name} is scattered: strides {tensor.stride()}; the layout HND was asked for")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as (blocks, bytes of one block), uint8; blocks may lie apart."""
    import torch

    block_bytes = tensor[0].numel() * tensor.element_size()
    in_memory = tensor if tensor[0].is_contiguous() else tensor.transpose(1, 2)
    flat = in_memory.view(torch.uint8)
    return flat.as_strided((tensor.shape[0], block_bytes), (tensor.stride(0) * tensor.element_size(), 1))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
