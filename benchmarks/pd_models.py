"""Models for loads on GPUs without their weights: a config.json, and a tokenizer whose every id is one word.

vLLM fills the weights in (`load_format=dummy`, the same seed in every engine). A prompt of `n` ids has exactly `n` tokens, and
an answer's text says which ids it has. With `random_weights` a model is written out whose answers depend on its KV; dummy
weights are so small that they hardly do.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

Config = dict[str, object]

_LLAMA: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 32768,
    "rope_theta": 500000.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
    "bos_token_id": 0,
}
# As llm-compressor writes it for FP8 weights a channel and dynamic activations a token (RedHatAI's FP8-dynamic models).
_FP8_DYNAMIC: Config = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **more: object) -> Config:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    return {**_LLAMA, **sizes, "num_attention_heads": heads, **more}


_GPT_OSS_120B: Config = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "hidden_act": "silu",
    "swiglu_limit": 7.0,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    },
}


SHAPES: dict[str, Config] = {
    "llama-8b": _llama(4096, 14336, 32, 32),
    "llama-70b-fp8": _llama(8192, 28672, 80, 64, quantization_config=_FP8_DYNAMIC),
    # Two windows and a full layer in turn: three KV groups.
    "windows": _llama(
        2048, 5632, 12, 16, architectures=["MistralForCausalLM"], model_type="ministral", sliding_window=128,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 4, vocab_size=32000,
    ),
    "gpt-oss-120b": _GPT_OSS_120B,
    "llama-1b": _llama(2048, 8192, 16, 32, head_dim=64, vocab_size=32000),
    "tiny-windows": _llama(
        128, 256, 6, 2, head_dim=64, num_key_value_heads=2, vocab_size=2048, max_position_embeddings=4096, sliding_window=64,
        architectures=["MistralForCausalLM"], model_type="ministral",
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "tiny": _llama(128, 256, 2, 2, head_dim=64, num_key_value_heads=2, vocab_size=2048, max_position_embeddings=4096),
}  # fmt: skip


def vocabulary(folder: Path) -> int:
    """How many ids the model has."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def is_plain(folder: Path) -> bool:
    """Whether every layer looks back over the whole prompt."""
    return "layer_types" not in json.loads((folder / "config.json").read_text())


def has_weights(folder: Path) -> bool:
    """Whether there are weights to load."""
    return any(folder.glob("*.safetensors"))


def make_model(folder: Path, shape: str, *, random_weights: bool) -> Path:
    """The folder `folder/shape`: config, tokenizer, and with `random_weights` weights, which torch makes."""
    model = folder / shape
    model.mkdir(parents=True)
    config = SHAPES[shape]
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text(json.dumps(_tokenizer(int(str(config["vocab_size"])))))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    if random_weights:
        _write_weights(model, config)
    return model


def _tokenizer(size: int) -> Config:
    """Id n is the word "n" with a space before it ("G with a dot" in the byte alphabet), so decoding needs a table only."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "WordLevel", "vocab": {f"\u0120{n}": n for n in range(size)}, "unk_token": "\u01200"},
    }


def _write_weights(folder: Path, config: Config) -> None:
    """Normal weights of the usual size (0.02, larger for Q and K so that attention is not flat), ones for norms."""
    import torch  # Only for this.
    from safetensors.torch import save_file

    hidden, inner = int(str(config["hidden_size"])), int(str(config["intermediate_size"]))
    head_dim = int(str(config["head_dim"]))
    heads, kv_heads = int(str(config["num_attention_heads"])), int(str(config["num_key_value_heads"]))
    shapes = {"model.embed_tokens": (int(str(config["vocab_size"])), hidden), "model.norm": (hidden,)}
    shapes["lm_head"] = shapes["model.embed_tokens"]
    for layer in range(int(str(config["num_hidden_layers"]))):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm": (hidden,),
            f"{at}.post_attention_layernorm": (hidden,),
            f"{at}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{at}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{at}.mlp.gate_proj": (inner, hidden),
            f"{at}.mlp.up_proj": (inner, hidden),
            f"{at}.mlp.down_proj": (hidden, inner),
        }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.Generator(device).manual_seed(1)
    tensors = {}
    for name, shape in shapes.items():
        size = 0.06 if name.endswith(("q_proj", "k_proj")) else 0.02
        weight = torch.randn(shape, generator=source, device=device) * size if len(shape) > 1 else torch.ones(shape)
        tensors[f"{name}.weight"] = weight.to(torch.bfloat16).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prompt(seed: int, tokens: int, size: int) -> list[int]:
    """Prompt `seed`: ids that share no block with another one's."""
    source = random.Random(f"{seed} {tokens}")
    return [source.randrange(size // 10, size) for _ in range(tokens)]
