"""What the vLLM engine refuses before it starts a process."""

from __future__ import annotations

import pytest

from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import EngineError
from hocket.workers.engines.vllm.engine import VllmEngine


async def test_tensor_parallel_ranks_are_refused_with_the_reason() -> None:
    engine = VllmEngine(WorkerConfig(role="decode", tp=2), worker_id="decode", epoch=1)
    with pytest.raises(EngineError, match="2 tensor-parallel ranks"):
        await engine.start()
    await engine.aclose()
