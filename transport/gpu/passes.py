"""From the extents of a message to kernel launches: as few as its block sizes, cuts and lists of blocks allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base import Extent
from ..errors import TransportUnavailable
from .cuts import BlockShape
from .kernel import Cutting, cut_programs, move_programs
from .lists import BlockList

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error


class Layer(NamedTuple):
    """One layer of a pool: rows of uint8."""

    rows: torch.Tensor
    address: int
    stride_bytes: int
    block_bytes: int
    shape: BlockShape

    def extent_bytes(self, extent: Extent) -> int:
        """Bytes of an extent of this layer. Raises ValueError for a cut that its blocks do not hold."""
        blocks = len(extent.block_ids)
        return blocks * self.block_bytes if extent.cut is None else self.shape.cut_bytes(extent.cut, blocks)


class Pass:
    """One launch: neighbouring extents of one block size, or of one cut.

    When they are the same blocks of layers that are evenly apart (all of a chunk's, or those of one group), the kernel
    needs one list of block ids, which often is on the device already. Else it needs the address of every block.
    """

    __slots__ = ("blocks", "cutting", "layer", "layer_step", "nbytes", "parts", "programs", "shared", "whole_bytes")

    def __init__(self, layer: int, blocks: BlockList, whole_bytes: int, cutting: Cutting | None) -> None:
        self.whole_bytes = whole_bytes  # of a block; 0 with a cut
        self.cutting = cutting
        self.layer = layer  # of the first extent
        self.layer_step = 0
        self.shared: BlockList | None = blocks
        self.parts: list[tuple[int, BlockList]] = []  # layer and blocks of each extent
        self.blocks = self.nbytes = self.programs = 0

    @property
    def list_words(self) -> int:
        """How long its list is."""
        return self.blocks if self.shared is None else len(self.shared.ids)

    def add(self, layer: int, blocks: BlockList, nbytes: int, programs: int) -> None:
        """One more extent, of the same size or cut."""
        count = len(self.parts)
        if count == 1:
            self.layer_step = layer - self.layer
        if blocks is not self.shared or layer != self.layer + count * self.layer_step:
            self.shared = None
        self.parts.append((layer, blocks))
        self.blocks += len(blocks.ids)
        self.nbytes += nbytes
        self.programs += programs

    def fill(self, table: npt.NDArray[np.int64], layers: Sequence[Layer]) -> None:
        """Write its list: the ids that its extents share, else the address of every block."""
        if self.shared is not None:
            table[:] = self.shared.ids
            return
        at = 0
        for index, blocks in self.parts:
            part = table[at : at + len(blocks.ids)]
            np.multiply(blocks.ids, layers[index].stride_bytes, out=part)
            part += layers[index].address
            at += len(blocks.ids)


def plan(extents: Sequence[Extent], lists: Sequence[BlockList], layers: Sequence[Layer]) -> list[Pass] | None:
    """The launches that move a message; None when a cut is not for the kernel. Raises ValueError for a senseless cut."""
    passes: list[Pass] = []
    for extent, blocks in zip(extents, lists, strict=True):
        layer, count, cutting = layers[extent.layer], len(blocks.ids), None
        nbytes, whole_bytes = layer.extent_bytes(extent), layer.block_bytes
        if extent.cut is None:
            programs = move_programs(whole_bytes, count)
        elif layer.shape.is_for_the_kernel:
            cutting, whole_bytes = layer.shape.cutting(extent.cut, count), 0
            programs = cut_programs(cutting)
        else:
            return None
        if not passes or passes[-1].whole_bytes != whole_bytes or passes[-1].cutting != cutting:
            passes.append(Pass(extent.layer, blocks, whole_bytes, cutting))
        passes[-1].add(extent.layer, blocks, nbytes, programs)
    return passes
