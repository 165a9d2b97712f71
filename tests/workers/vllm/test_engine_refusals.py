"""What the vLLM engine refuses before it starts a process, and why it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import EngineError
from hocket.workers.engines.vllm import reaper
from hocket.workers.engines.vllm.engine import VllmEngine

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 32,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("settings", "kv_heads", "why"),
    [
        ({"engine_args": {"pipeline_parallel_size": 2}}, 6, "pipeline_parallel_size 2: .*only tensor-parallel ranks"),
        ({"engine_args": {"data_parallel_size": 2}}, 6, "data_parallel_size 2: .*each of which can be a worker"),
        ({"tp": 2}, 3, "3 KV heads cannot be divided among 2 tensor-parallel ranks"),
        ({"tp": 4}, 6, r"attention heads \(6\) must be divisible by tensor parallel size \(4\)"),
        ({"tp": 2, "cpu_cores": "0"}, 6, r"cpu_cores '0' has to name the cores of 2 ranks"),
    ],
    ids=["pipeline", "data", "KV heads", "attention heads", "cores"],
)
async def test_an_engine_that_cannot_be_spread_like_this_says_so(
    tmp_path: Path, settings: dict[str, object], kv_heads: int, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"num_key_value_heads": kv_heads}))
    changes = {"engine_args": {"skip_tokenizer_init": True}} | settings
    config = WorkerConfig(role="decode", model=str(tmp_path), **changes)  # type: ignore[arg-type]  # Checked by its own tests.
    engine = VllmEngine(config, worker_id="decode", epoch=1)
    try:
        with pytest.raises(EngineError, match=why):
            await engine.start()
        assert not reaper.marked(engine.mark.encode())
    finally:
        await engine.aclose()
