"""vLLM's KV tensors as a `HostKvPool`, and the layout that two engines compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....transport.layout import KvLayout
from ....transport.pool import HostKvPool

if TYPE_CHECKING:
    import torch


class UnfitKv(Exception):
    """This engine's KV cannot be handed off; the text says why and what would help."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the tensors cannot tell."""

    model: str
    revision: str
    dtype: str
    block_tokens: int
    engine: str  # vLLM's version: another one may pack a block in another way
    backends: str  # attention backends, for the same reason


def pool_of(tensors: Mapping[str, torch.Tensor], facts: ModelFacts) -> HostKvPool:
    """The pool over `tensors` (layer name -> (blocks, KV heads, tokens, 2 x head size)), without a copy. Raises UnfitKv."""
    own = _without_aliases(tensors)
    rows = []
    for name, tensor in own.items():
        _check(name, tensor)
        rows.append(_rows(tensor).numpy())
    first = next(iter(own.values()))
    shapes = sorted({f"{tuple(tensor.shape[1:])}{tensor.stride()[1:]}" for tensor in own.values()})
    layout = KvLayout(
        model=facts.model,
        revision=facts.revision,
        dtype=facts.dtype,
        kv_dtype=_dtype(first),
        block_tokens=facts.block_tokens,
        layer_names=tuple(own),
        layer_block_bytes=tuple(row.shape[1] for row in rows),
        kv_heads=first.shape[1],
        head_size=first.shape[3] // 2,
        extra=f"vllm {facts.engine} {facts.backends} {' '.join(shapes)}",
    )
    return HostKvPool(layout, rows)


def _without_aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers that share another one's KV (the same memory under two names) travel once, under the first name."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Sequence):
            raise UnfitKv(f"layer {name} keeps a state of several tensors (Mamba), which cannot be handed off yet")
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            own[name] = tensor
    return own


def _check(name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise UnfitKv(f"the KV cache is on {tensor.device}; only KV in host memory can be handed off yet")
    if tensor.dim() != 4:
        raise UnfitKv(f"layer {name} has the shape {tuple(tensor.shape)}, not (blocks, heads, tokens, 2 x head size)")
    if not tensor[0].is_contiguous():
        raise UnfitKv(f"a block of layer {name} is scattered: strides {tensor.stride()}; the layout HND was asked for")


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as (blocks, bytes of one block), uint8; blocks may lie apart."""
    import torch

    block_bytes = tensor[0].numel() * tensor.element_size()
    flat = tensor.view(torch.uint8)
    return flat.as_strided((tensor.shape[0], block_bytes), (tensor.stride(0) * tensor.element_size(), 1))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
