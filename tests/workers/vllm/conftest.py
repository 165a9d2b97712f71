"""The two engines live as long as the test session: each start costs half a minute."""

from __future__ import annotations

import gc
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parent))  # For `vllm_rig`: with import-mode=importlib nothing else adds it.

from vllm_rig import DECODE_EPOCH, PREFILL_EPOCH, EnginePair, engine_config

from hocket.cluster.model import resolve_model
from hocket.workers.engines.vllm.engine import VllmEngine


@pytest.fixture(autouse=True)
def collected(request: pytest.FixtureRequest) -> Iterator[None]:
    """vLLM leaves a zmq context to the garbage collector, which complains; it shall do so where that is expected."""
    yield
    if request.node.get_closest_marker("slow"):
        gc.collect()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo model's folder (`make` fetches it before the tests)."""
    return resolve_model("demo")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pair(demo_model: Path) -> AsyncIterator[EnginePair]:
    prefill = VllmEngine(engine_config("prefill", demo_model), worker_id="prefill", epoch=PREFILL_EPOCH)
    decode = VllmEngine(engine_config("decode", demo_model), worker_id="decode", epoch=DECODE_EPOCH)
    try:
        engines = EnginePair(prefill, decode, await prefill.start(), await decode.start())
        prefill.on_kv_events(engines.prefill_events.extend)
        decode.on_kv_events(engines.decode_events.extend)
        yield engines
    finally:
        await prefill.aclose()
        await decode.aclose()
