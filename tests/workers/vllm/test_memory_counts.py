"""What is counted without vLLM is what vLLM counts: KV groups, and the blocks that a request may take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hocket.cluster.engine_memory import EngineSizes, kv_groups, kv_layout, kv_room
from hocket.cluster.model_shape import read_model
from hocket.transport.layout import KvGroup
from hocket.workers.config import WorkerConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
WINDOW, FULL = KvGroup("window", 128), KvGroup()
PATTERNS = [
    (WINDOW, FULL) * 18,
    (WINDOW, WINDOW, FULL) * 4,
    (WINDOW,) * 12 + (FULL,) * 13,
    (WINDOW,) * 5 + (FULL,) * 2,
    ((WINDOW,) * 5 + (FULL,)) * 3,
]


def spec(kind: KvGroup) -> Any:  # One of vLLM's, which has no stubs.
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    shape = {"block_size": 16, "num_kv_heads": 8, "head_size": 64, "dtype": torch.bfloat16}
    if kind.kind == "full":
        return FullAttentionSpec(**shape)
    return SlidingWindowSpec(**shape, sliding_window=kind.span_tokens)


@pytest.mark.parametrize("layers", PATTERNS)
def test_groups_are_vllms(layers: tuple[KvGroup, ...]) -> None:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size

    theirs = _get_kv_cache_groups_uniform_page_size({str(index): spec(kind) for index, kind in enumerate(layers)})
    groups, group_of = kv_groups(layers)
    mine = [{str(index) for index, group in enumerate(group_of) if group == number} for number in range(len(groups))]
    assert sorted(map(sorted, mine)) == sorted(sorted(group.layer_names) for group in theirs)


@pytest.mark.parametrize("max_model_len", [100, 4096, 131072])
def test_the_blocks_of_a_request_are_vllms(max_model_len: int) -> None:
    shape = read_model(
        {
            "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "head_dim": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 128, "vocab_size": 201088,
            "max_position_embeddings": 131072, "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"] * 18,
        }
    )  # fmt: skip
    config = WorkerConfig(role="prefill", block_tokens=16, chunk_tokens=2048, max_model_len=max_model_len)
    sizes = EngineSizes.of(config, shape, is_cpu=False)
    room = kv_room(kv_layout("m", shape, sizes, is_cpu=False), sizes, is_decode=False)
    told = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        max_in_flight_tokens=2 * 2048,  # asynchronous scheduling
    )
    specs = [spec(WINDOW), spec(FULL)]
    assert room.start_blocks == sum(-(-one.max_memory_usage_bytes(told) // one.page_size_bytes) for one in specs)
    assert room.block_bytes == 18 * specs[0].page_size_bytes
