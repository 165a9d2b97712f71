"""A pool in GPU memory, or in interpreted kernels' memory, of random bytes."""

from __future__ import annotations

import numpy as np
import torch

from hocket.transport import Extent, KvLayer, KvLayout, KvShape
from hocket.transport.gpu.pool import CudaKvPool

BLOCKS, BLOCK_TOKENS = 12, 8
BLOCK_BYTES = 8 * 4 * 64
EXTENTS = (Extent(0, (1, 7, 4)), Extent(1, (1, 7, 4)), Extent(2, (0, 11)))
NBYTES = 8 * BLOCK_BYTES


def make_layout() -> KvLayout:
    layers = tuple(KvLayer(f"layer.{index}", heads=4, head_bytes=64) for index in range(3))
    return KvLayout("tiny", "1", "bf16", "bf16", layers, KvShape((BLOCK_TOKENS,), order="HND"), digest="weighted")


def make_pool(device: str, seed: int, *, verifies_blocks: bool = False) -> tuple[torch.Tensor, CudaKvPool]:
    """Its memory (layers, blocks, block bytes), and the pool."""
    random = np.random.default_rng(seed).integers(0, 256, (3, BLOCKS, BLOCK_BYTES), np.uint8)
    memory = torch.from_numpy(random).to(device)
    return memory, CudaKvPool(make_layout(), list(memory), 1 << 20, verifies_blocks=verifies_blocks)
