"""Models of the families with sliding windows and attention chunks: 6 layers, a million random weights, made on the spot.

Weights are drawn wide enough that each token of the context moves the logits: a missing block changes the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

WINDOW = 100
ATTENTION_CHUNK = 64
VOCABULARY = 1024
MAX_MODEL_LEN = 1024
_SHAPE: Mapping[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": False,
}
_TWO_WINDOWS_ONE_FULL = ["sliding_attention", "sliding_attention", "full_attention"] * 2
_WINDOW_AND_FULL = ["sliding_attention", "full_attention"] * 3


@dataclass(frozen=True)
class Family:
    """What is special about one model's config; `groups` is what vLLM makes of it."""

    config_class: str  # of transformers
    architecture: str  # of vLLM
    groups: tuple[str, ...]
    settings: Mapping[str, object]
    environment: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaConfig", "LlamaForCausalLM", ("full",), {}),
    "one_head": Family("LlamaConfig", "LlamaForCausalLM", ("full",), {"num_key_value_heads": 1}),
    "ministral": Family(
        "MinistralConfig",
        "MistralForCausalLM",
        ("window", "window", "full"),
        {"sliding_window": WINDOW, "layer_types": _TWO_WINDOWS_ONE_FULL},
    ),
    "mistral": Family("MistralConfig", "MistralForCausalLM", ("window",), {"sliding_window": WINDOW}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        ("window", "full"),
        {
            "sliding_window": WINDOW,
            "layer_types": _WINDOW_AND_FULL,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        ("window", "window", "full"),
        {"sliding_window": WINDOW, "layer_types": _TWO_WINDOWS_ONE_FULL, "query_pre_attn_scalar": 32},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        ("window", "full"),
        {
            "sliding_window": WINDOW,
            "layer_types": _WINDOW_AND_FULL,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 64,
        },
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        ("chunk", "chunk", "full"),
        {
            "attention_chunk_size": ATTENTION_CHUNK,
            "no_rope_layers": [1, 1, 0] * 2,
            "moe_layers": [],
            "interleave_moe_layer_step": 0,
            "intermediate_size_mlp": 256,
        },
        # Without it vLLM gives all layers one group.
        {"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"},
    ),
}


def make_model(name: str, folder: Path) -> Path:
    """Write the model of `FAMILIES[name]` into `folder`, the same bytes each time; no tokenizer."""
    import torch
    import transformers

    family = FAMILIES[name]
    config = getattr(transformers, family.config_class)(**{**_SHAPE, **family.settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                scale = 1.0 if "embed" in parameter_name else 2.0 * parameter.shape[-1] ** -0.5
                parameter.normal_(0.0, scale, generator=source)
            elif "norm" not in parameter_name:
                parameter.normal_(0.0, 0.5, generator=source)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [family.architecture]}))
    return folder
