"""Dummy weights under which a mixture of experts works as with real ones; a plugin of vLLM (`trace/spread_weights-0.dist-info`).

vLLM's own leave a router's logits so small that its bias picks the same few experts for every token, and leave packed weights
zero, which a GPU multiplies faster than anything else. With $SPREAD_DUMMY_WEIGHTS set, norms are 1, routers have no bias and
weights of the usual size, packed weights are random bytes and their scales 2^-7 (E8M0).
"""

from __future__ import annotations

import os
from typing import Any

_SCALE_BYTE = 127 - 7


def register() -> None:
    """Called by vLLM in each of its processes."""
    if not os.environ.get("SPREAD_DUMMY_WEIGHTS"):
        return
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load_weights = DummyModelLoader.load_weights

    def spread(self: Any, model: Any, model_config: Any) -> None:  # vLLM and torch: no types here
        load_weights(self, model, model_config)
        torch.manual_seed(0)  # the same in every engine
        for name, weight in model.state_dict().items():
            _spread(name, weight)

    DummyModelLoader.load_weights = spread


def _spread(name: str, weight: Any) -> None:
    import torch

    if weight.device.type == "meta":
        return
    if weight.dtype == torch.uint8:
        if "scale" in name:
            weight.fill_(_SCALE_BYTE)
        else:
            weight.random_(0, 256)
    elif "norm" in name:
        weight.fill_(1.0)
    elif name.endswith("router.bias"):
        weight.zero_()
    elif name.endswith("router.weight"):
        weight.normal_(0.0, 0.02)
