"""Extents in canonical order, for a peer with other blocks or ranks: what the kernel needs to know, and a way by torch.

The kernel takes parts of whole 16 B. Others (DeepSeek's indexer has 132 B a token) are moved by torch, a few kernels an
extent. Both touch exactly the bytes of the cut: other tokens and heads of the same blocks may come from another rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base import Cut
from ..errors import TransportUnavailable
from ..layout import KvLayout
from .kernel import Cutting

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


class BlockShape(NamedTuple):
    """How one layer's block is laid out: "HND" (heads, tokens, parts, dim), "NHD" (tokens, heads, parts, dim)."""

    order: str
    tokens: int
    heads: int
    parts: int
    part_bytes: int  # of one token and head

    @classmethod
    def of(cls, layout: KvLayout, layer: int) -> BlockShape:
        """The shape of this rank's blocks of a layer."""
        found = layout.layers[layer]
        order, heads = layout.shape.order, len(layout.rank_heads(layer))
        return cls(order, layout.block_tokens(layer), heads, found.parts, found.head_bytes // found.parts)

    def cut_bytes(self, cut: Cut, blocks: int) -> int:
        """Bytes of a cut of so many blocks. Raises ValueError when the blocks do not hold it."""
        if self.order not in ("HND", "NHD"):
            raise ValueError(f"blocks of order {self.order!r} cannot be cut")
        if not (0 <= cut.first_token < self.tokens and 1 <= cut.tokens <= blocks * self.tokens - cut.first_token):
            raise ValueError(f"{cut} is not within {blocks} blocks of {self.tokens} tokens")
        if not (cut.first_head >= 0 and 1 <= cut.heads <= self.heads - cut.first_head):
            raise ValueError(f"{cut} is not within {self.heads} heads")
        return cut.tokens * cut.heads * self.parts * self.part_bytes

    @property
    def is_for_the_kernel(self) -> bool:
        """Whether what follows such a cut in a slot is still aligned."""
        return not self.part_bytes % 16

    def cutting(self, cut: Cut, blocks: int) -> Cutting:
        """The kernel's arguments for a cut of so many blocks."""
        part_words = self.part_bytes // 8
        near, far = (
            part_words * self.parts,
            part_words * self.parts * (self.tokens if self.order == "HND" else self.heads),
        )
        strides = (far, near) if self.order == "HND" else (near, far)
        tokens = (self.tokens, cut.first_token, cut.tokens)
        return Cutting(blocks, self.parts, *tokens, cut.first_head, cut.heads, part_words, *strides)


class CutView(NamedTuple):
    """A cut of a layer, as torch indexes it: `paged[where]` is (tokens, heads, parts, words)."""

    paged: torch.Tensor
    where: tuple[object, ...]
    shape: tuple[int, int, int, int]  # in the slot: parts, tokens, heads, words
    dtype: torch.dtype


def cut_view(
    rows: torch.Tensor, shape: BlockShape, ids: npt.NDArray[np.int64], cut: Cut, *, slot_offset: int
) -> CutView:
    """The cut of these blocks of a layer (uint8 rows), in the widest words that its bytes and the slot's allow."""
    width, dtype = next(word for word in _WORDS if not shape.part_bytes % word[0] and not slot_offset % word[0])
    words = shape.part_bytes // width
    token = np.arange(cut.first_token, cut.first_token + cut.tokens)
    block, inside = (_to_device(part, rows.device) for part in (ids[token // shape.tokens], token % shape.tokens))
    heads = slice(cut.first_head, cut.first_head + cut.heads)
    inner = (shape.heads, shape.tokens) if shape.order == "HND" else (shape.tokens, shape.heads)
    paged = rows.view(dtype).unflatten(1, (*inner, shape.parts, words))
    # Two index tensors, apart or not, put their common dimension first once the slice is taken beforehand.
    where: tuple[object, ...] = (block, inside)
    if shape.order == "HND":
        paged, where = paged[:, heads], (block, slice(None), inside)
    else:
        paged = paged[:, :, heads]
    return CutView(paged, where, (shape.parts, cut.tokens, cut.heads, words), dtype)


def gather_cut(view: CutView, staged: torch.Tensor) -> None:
    """Copy the cut into its bytes of the slot (uint8, on the device or pinned), on the current stream."""
    found = view.paged[view.where].permute(2, 0, 1, 3)
    staged.view(view.dtype).view(view.shape).copy_(found, non_blocking=True)


def scatter_cut(view: CutView, staged: torch.Tensor) -> None:
    """Copy the slot's bytes into the cut, and nothing beside it, on the current stream."""
    arrived = staged.to(view.paged.device, non_blocking=True).view(view.dtype).view(view.shape)
    view.paged[view.where] = arrived.permute(1, 2, 0, 3)


def gather_whole(rows: torch.Tensor, ids: npt.NDArray[np.int64], staged: torch.Tensor) -> None:
    """Copy whole blocks into the slot, for messages that have cuts as well."""
    found = rows.view(torch.int64).index_select(0, _to_device(ids, rows.device))
    staged.view(rows.dtype).view(len(ids), rows.shape[1]).copy_(found.view(rows.dtype), non_blocking=True)


def scatter_whole(rows: torch.Tensor, ids: npt.NDArray[np.int64], staged: torch.Tensor) -> None:
    """Copy the slot's bytes into whole blocks, for messages that have cuts as well."""
    arrived = staged.to(rows.device, non_blocking=True).view(len(ids), rows.shape[1])
    # int64: `index_copy_` of uint8 is 5x slower.
    if staged.data_ptr() % 8:
        arrived = arrived.clone()  # After a cut of odd length.
    rows.view(torch.int64).index_copy_(0, _to_device(ids, rows.device), arrived.view(torch.int64))


def _to_device(numbers: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Without a synchronising copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int64))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
