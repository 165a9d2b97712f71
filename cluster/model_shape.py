"""What a model's `config.json` says of its memory: how its layers keep KV, and how large its weights are. Decides; reads no file.

Weights are counted for the architectures whose matrices are known here; KV for every one that keeps keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..transport.layout import KvGroup

Json = Mapping[str, object]
Sharing = Literal["split", "kv", "whole"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Attention of grouped queries and a gated MLP. Of these, the ones with experts in place of the MLP:
_KNOWN = ("llama", "mistral", "ministral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe", "gpt_oss")
_EXPERT_SIZES = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "gpt_oss": ("num_local_experts", "intermediate_size"),
}
_MXFP4_GROUP = 32  # weights that share a scale of one byte (OCP Microscaling Formats 1.0)
# vLLM's Triton kernels, which it takes on Hopper, round each rank's share of an expert up to that (fused_moe/oracle/mxfp4.py);
# those of Marlin and of TRT-LLM on Blackwell to 128, and the hidden size to 256: up to 14 % more.
_MXFP4_INNER = 64
_SCALE_BYTES = 2


class UnknownModel(ValueError):
    """The config does not say what is needed, or says what no hand-off can serve; the text names it."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Weights of one kind, of all layers and over the whole model.

    Tensor-parallel ranks have an equal share ("split"), at least one KV head's ("kv"), or all ("whole").
    """

    name: str
    weights: int
    sharing: Sharing = "split"
    weight_bytes: float = 0.0  # of each, scales included; 0: they are in the dtype that the model runs in

    def nbytes(self, dtype: str) -> float:
        """Of all when the model runs in this dtype."""
        return self.weights * (self.weight_bytes or DTYPE_BYTES[dtype])


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts in MXFP4, whose kernels round each rank's share up."""

    count: int  # over all layers
    hidden: int
    inner: int

    def rank_bytes(self, tp: int) -> float:
        """Of each rank."""
        share = -(-self.inner // tp)
        rounded = -(-share // _MXFP4_INNER) * _MXFP4_INNER
        return self.count * 3 * rounded * self.hidden * _mxfp4_bytes()

    @property
    def nbytes(self) -> float:
        """As they lie in the files."""
        return self.count * 3 * self.inner * self.hidden * _mxfp4_bytes()


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one model."""

    kind: str
    hidden: int
    inner: int  # of the widest MLP that one token goes through, all its experts counted
    vocabulary: int
    context_tokens: int
    heads: int
    kv_heads: int  # 1 for MLA
    head_numbers: int  # K and V of one token and head
    is_latent: bool  # MLA: each rank has the whole latent
    dtype: str
    layers: tuple[KvGroup, ...]  # how far each looks back
    matrices: tuple[Matrix, ...]  # empty: this architecture's weights are not known here
    experts: Experts | None = None

    @property
    def weight_bytes(self) -> int | None:
        """Of the whole model, as it lies in the files; None: not known."""
        if not self.matrices:
            return None
        return int(sum(m.nbytes(self.dtype) for m in self.matrices) + (self.experts.nbytes if self.experts else 0))

    def rank_weight_bytes(self, tp: int, dtype: str) -> int | None:
        """Of each tensor-parallel rank when the model runs in this dtype; None: not known."""
        if not self.matrices:
            return None
        divisor = {"split": tp, "kv": min(tp, self.kv_heads), "whole": 1}
        split = sum(matrix.nbytes(dtype) / divisor[matrix.sharing] for matrix in self.matrices)
        return int(split + (self.experts.rank_bytes(tp) if self.experts else 0))


def read_model(config: Json) -> ModelShape:
    """The shape that a `config.json` describes. Raises UnknownModel."""
    text = config.get("text_config", config)
    if not isinstance(text, Mapping):
        raise UnknownModel("config.json: text_config is not an object")
    hidden, heads = _int(text, "hidden_size"), _int(text, "num_attention_heads")
    layers = _layers(text)
    latent = _optional(text, "kv_lora_rank")
    head = _optional(text, "head_dim") or hidden // heads
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in DTYPE_BYTES:
        raise UnknownModel(f"config.json: dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}")
    kind = str(text.get("model_type", ""))
    matrices, experts = _weights(config, text, kind, head) if text is config and kind in _KNOWN else ((), None)
    return ModelShape(
        kind=kind or "?",
        hidden=hidden,
        inner=_inner(text, kind),
        vocabulary=_int(text, "vocab_size"),
        context_tokens=_int(text, "max_position_embeddings"),
        heads=heads,
        kv_heads=1 if latent else _optional(text, "num_key_value_heads") or heads,
        head_numbers=latent + _optional(text, "qk_rope_head_dim") if latent else 2 * head,
        is_latent=bool(latent),
        dtype=dtype,
        layers=layers,
        matrices=matrices,
        experts=experts,
    )


def _int(config: Json, name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise UnknownModel(f"config.json: {name} is {value!r}, not a whole number >= 1")
    return value


def _optional(config: Json, name: str) -> int:
    return _int(config, name) if config.get(name) is not None else 0


def _inner(text: Json, kind: str) -> int:
    if kind not in _EXPERT_SIZES:
        return _optional(text, "intermediate_size") or 4 * _int(text, "hidden_size")
    return _int(text, _EXPERT_SIZES[kind][1]) * (_optional(text, "num_experts_per_tok") or 1)


# ---- KV


def _layers(text: Json) -> tuple[KvGroup, ...]:
    count = _int(text, "num_hidden_layers")
    kinds = text.get("layer_types")
    if kinds is None:
        return (_only_kind(text),) * count
    if not isinstance(kinds, Sequence) or len(kinds) != count:
        raise UnknownModel(f"config.json: layer_types does not name the kind of each of {count} layers")
    return tuple(_kind(text, str(kind)) for kind in kinds)


def _kind(text: Json, kind: str) -> KvGroup:
    match kind:
        case "full_attention":
            return KvGroup()
        case "sliding_attention":
            return KvGroup("window", _int(text, "sliding_window"))
        case "chunked_attention":
            return KvGroup("chunk", _int(text, "attention_chunk_size"))
    raise UnknownModel(f"layers of {kind!r} keep a state instead of KV, which cannot be handed off")


def _only_kind(text: Json) -> KvGroup:
    """Of a config that does not tell layers apart: as vLLM takes it, a window is everywhere or, with a switch, nowhere."""
    window = _optional(text, "sliding_window")
    return KvGroup("window", window) if window and text.get("use_sliding_window", True) else KvGroup()


# ---- weights


def _weights(config: Json, text: Json, kind: str, head: int) -> tuple[tuple[Matrix, ...], Experts | None]:
    """Nothing where a quantization is not known here: a wrong sum is worse than none."""
    try:
        widths = _Widths(config.get("quantization_config"))
    except UnknownModel:
        return (), None
    hidden, layers = _int(text, "hidden_size"), _int(text, "num_hidden_layers")
    queries = _int(text, "num_attention_heads") * head
    keys = (_optional(text, "num_key_value_heads") or _int(text, "num_attention_heads")) * head
    embedding = _int(text, "vocab_size") * hidden
    matrices = [
        Matrix("embedding", embedding),
        Matrix("queries and outputs", layers * 2 * hidden * queries, "split", widths.of("self_attn.q_proj")),
        Matrix("keys and values", layers * 2 * hidden * keys, "kv", widths.of("self_attn.k_proj")),
        Matrix("norms", (2 * layers + 1) * hidden, "whole"),
    ]
    if not text.get("tie_word_embeddings", False):
        matrices.append(Matrix("output", embedding))
    if kind not in _EXPERT_SIZES:
        mlp = layers * 3 * hidden * _int(text, "intermediate_size")
        return (*matrices, Matrix("mlp", mlp, "split", widths.of("mlp.gate_proj"))), None
    of_experts, experts = _expert_weights(text, kind, widths)
    return (*matrices, *of_experts), experts


def _expert_weights(text: Json, kind: str, widths: _Widths) -> tuple[list[Matrix], Experts | None]:
    count_name, inner_name = _EXPERT_SIZES[kind]
    hidden, inner = _int(text, "hidden_size"), _int(text, inner_name)
    count = _int(text, "num_hidden_layers") * _int(text, count_name)
    matrices = [Matrix("expert gates", count * hidden, "whole")]
    if kind == "gpt_oss":
        matrices.append(Matrix("expert biases", count * (2 * inner + hidden)))
    if widths.has_mxfp4_experts:
        return matrices, Experts(count, hidden, inner)
    return [
        *matrices,
        Matrix("experts", count * 3 * hidden * inner, "split", widths.of("mlp.experts.0.gate_proj")),
    ], None


class _Widths:
    """Bytes of one weight of a linear layer, its share of the scales included, as its quantization says; 0: there is none."""

    def __init__(self, quantization: object) -> None:
        self._linear = 0.0
        self._ignored: tuple[str, ...] = ()
        self.has_mxfp4_experts = False
        if quantization is None:
            return
        if not isinstance(quantization, Mapping):
            raise UnknownModel("config.json: quantization_config is not an object")
        method = str(quantization.get("quant_method"))
        ignored = quantization.get("ignore") or quantization.get("modules_to_not_convert") or ()
        if isinstance(ignored, Sequence):
            self._ignored = tuple(str(name) for name in ignored)
        match method:
            case "mxfp4":  # Only experts are.
                self.has_mxfp4_experts = True
            case "fp8":
                self._linear = 1.0
            case "compressed-tensors":
                self._linear = max(_packed(group) for group in _groups(quantization))
            case "gptq" | "awq":
                bits = _int(quantization, "bits")
                self._linear = (bits + (8 * _SCALE_BYTES + bits) / max(1, _optional(quantization, "group_size"))) / 8
            case _:
                raise UnknownModel(f"weights quantized by {method!r} are not known here")

    def of(self, module: str) -> float:
        """Of a module of layer 0, which stands for all layers."""
        names = (f"model.layers.0.{module}", f"model.layers.0.{module.rpartition('.')[0]}")
        return 0.0 if any(map(self._is_ignored, names)) else self._linear

    def _is_ignored(self, name: str) -> bool:
        for pattern in self._ignored:
            expression = pattern[3:] if pattern.startswith("re:") else re.escape(pattern).replace(r"\*", ".*")
            if re.fullmatch(expression, name):
                return True
        return False


def _groups(quantization: Json) -> Iterator[Json]:
    groups = quantization.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    if not found:
        raise UnknownModel("config.json: quantization_config has no config_groups")
    for group in found:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            raise UnknownModel("config.json: a group of quantization_config does not say how its weights are kept")
        yield weights


def _packed(weights: Json) -> float:
    """Scales of whole rows and columns are too few to count."""
    bits, group = _int(weights, "num_bits"), weights.get("group_size")
    return (bits + (8 * _SCALE_BYTES / group if isinstance(group, int) and group > 0 else 0)) / 8


def _mxfp4_bytes() -> float:
    return 0.5 + 1 / _MXFP4_GROUP
