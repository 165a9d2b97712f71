"""The KV groups are read from vLLM's own specs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from hocket.transport.layout import KvGroup
from hocket.workers.engines.vllm import versions
from hocket.workers.engines.vllm.kv_tensors import KvGroupFacts, UnfitKv, group_facts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@dataclass
class Group:
    """As much of `KVCacheGroupSpec` as is read."""

    kv_cache_spec: Any  # One of vLLM's, which has no stubs.
    layer_names: list[str] = field(default_factory=lambda: ["a"])


def spec(name: str, **fields: object) -> Any:
    import torch
    from vllm.v1 import kv_cache_interface

    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return getattr(kv_cache_interface, name)(**(shape | fields))


def uniform(**specs: object) -> Any:
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    return UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs=specs)


def test_each_kind_of_attention_has_its_group() -> None:
    facts = group_facts(
        [
            Group(spec("SlidingWindowSpec", sliding_window=128)),
            Group(spec("ChunkedLocalAttentionSpec", attention_chunk_size=64)),
            Group(spec("FullAttentionSpec"), ["b"]),
            Group(spec("MLAAttentionSpec", num_kv_heads=1), ["m"]),
        ]
    )
    assert facts == (
        KvGroupFacts(KvGroup("window", 128), 16, frozenset("a"), frozenset()),
        KvGroupFacts(KvGroup("chunk", 64), 16, frozenset("a"), frozenset()),
        KvGroupFacts(KvGroup(), 16, frozenset("b"), frozenset()),
        KvGroupFacts(KvGroup(), 16, frozenset("m"), frozenset("m")),
    )


def test_a_window_that_is_only_a_mask_is_full_attention() -> None:
    """What vLLM makes of windows when its hybrid allocator is off: no block is taken back."""
    (facts,) = group_facts([Group(spec("FullAttentionSpec", sliding_window=100))])
    assert facts.kind == KvGroup()


def test_layers_of_other_head_sizes_may_share_blocks() -> None:
    (facts,) = group_facts(
        [Group(uniform(x=spec("FullAttentionSpec", head_size=64), y=spec("FullAttentionSpec")), ["x", "y"])]
    )
    assert facts == KvGroupFacts(KvGroup(), 16, frozenset("xy"), frozenset())


def mamba() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    return MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.float32,))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (mamba, "Mamba"),
        (lambda: spec("SlidingWindowMLASpec", sliding_window=4, num_kv_heads=1), "SlidingWindowMLASpec"),
        (lambda: spec("MLAAttentionSpec", num_kv_heads=1, tokens_per_state=4), "4 tokens in one state"),
        (
            lambda: uniform(a=spec("FullAttentionSpec"), b=spec("SlidingWindowSpec", sliding_window=4)),
            "differently far",
        ),
    ],
    ids=["mamba", "unknown class", "compressed", "mixed"],
)
def test_what_keeps_anything_else_is_refused_with_the_reason(make: Any, why: str) -> None:
    with pytest.raises(UnfitKv, match=why):
        group_facts([Group(make())])


def test_this_version_can_be_told_of_failed_loads_and_keeps_windows_when_asked() -> None:
    assert versions.can_report_failed_loads()
    assert versions.dense_prefix_cache() == {"prefix_cache_retention_interval": None}
