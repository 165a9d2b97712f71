"""A model's memory, counted from its config.json, against what is known of published models and of vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hocket.cluster.engine_memory import EngineSizes, assumed_bytes, kv_groups, kv_layout, kv_room
from hocket.cluster.model_shape import ModelShape, UnknownModel, read_model
from hocket.transport.layout import KvGroup
from hocket.workers.config import WorkerConfig

MODELS = Path(__file__).resolve().parents[2] / "deploy" / "models"
KIB, GIB = 1 << 10, 1 << 30
LLAMA_8B: dict[str, object] = {
    "model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
WINDOW, FULL = KvGroup("window", 128), KvGroup()


def config_of(name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((MODELS / name / "config.json").read_text())
    return found


LLAMA_70B = config_of("Llama-3.3-70B-Instruct-FP8-dynamic")
GPT_OSS = config_of("gpt-oss-120b")


def sizes(shape: ModelShape, **settings: object) -> EngineSizes:
    given: dict[str, object] = {"role": "decode", "block_tokens": 16, **settings}
    return EngineSizes.of(WorkerConfig(**given), shape, is_cpu=False)  # type: ignore[arg-type]  # A test's own settings.


@pytest.mark.parametrize(
    ("config", "file_bytes"),
    [
        (LLAMA_8B, 16_060_522_496),  # 8,030,261,248 parameters, 2 bytes each
        (LLAMA_70B, 70_553_706_496 + 2 * 128256 * 8192),  # a byte for each parameter, two for embedding and output
        (GPT_OSS, 65_248_815_744),  # the index of openai/gpt-oss-120b
    ],
)
def test_weights_are_as_large_as_the_published_files(config: dict[str, object], file_bytes: int):
    assert read_model(config).weight_bytes == pytest.approx(file_bytes, rel=0.001)


def test_tensor_parallel_ranks_share_the_weights():
    shape = read_model(LLAMA_70B)
    whole, half = shape.rank_weight_bytes(1, "bfloat16"), shape.rank_weight_bytes(2, "bfloat16")
    assert whole is not None
    assert half is not None
    assert whole == shape.weight_bytes
    assert half == pytest.approx(whole / 2, rel=0.001)


def test_more_ranks_than_kv_heads_keep_a_head_each():
    shape = read_model(LLAMA_8B)
    by_rank = [shape.rank_weight_bytes(tp, "bfloat16") or 0 for tp in (8, 16)]
    assert by_rank[1] > by_rank[0] / 2
    tokens = [kv_layout("m", shape, sizes(shape, tp=tp), is_cpu=False).token_bytes for tp in (8, 16)]
    assert tokens == [128 * KIB // 8, 128 * KIB // 8]


def test_mxfp4_experts_are_rounded_up_in_each_rank():
    """A rank of four has 720 of the 2,880 numbers of an expert, and its kernels take 768."""
    shape = read_model(GPT_OSS)
    one, four = shape.rank_weight_bytes(1, "bfloat16"), shape.rank_weight_bytes(4, "bfloat16")
    assert one == shape.weight_bytes
    assert one is not None
    assert four is not None
    assert four * 4 / one == pytest.approx(1 + 60.91 / 65.25 * (768 / 720 - 1), rel=0.002)  # Gates are in every rank.


MEASURED = [
    # What NVML showed during benchmarks/gpu_pd.py on H200s, vLLM 0.26, graphs of at most 64 requests, 8,192 tokens a step.
    (LLAMA_70B, {"role": "prefill", "kv_gib": 40.0, "slots": 4}, 111.9),  # 111.5 to 112.4 GiB
    (LLAMA_70B, {"role": "decode", "kv_gib": 40.0, "slots": 64}, 111.4),  # 110.5 to 112.3
    (GPT_OSS, {"role": "decode", "kv_gib": 24.0, "slots": 64}, 88.3),
    (LLAMA_8B, {"role": "prefill", "kv_gib": 6.0, "slots": 4}, 46.6 / 2),  # Two engines shared one GPU.
]


@pytest.mark.parametrize(("config", "settings", "gib"), MEASURED)
def test_the_sum_is_what_a_gpu_showed(config: dict[str, object], settings: dict[str, object], gib: float):
    shape = read_model(config)
    told = sizes(shape, chunk_tokens=8192, engine_args={"max_num_batched_tokens": 8192}, **settings)
    weights = shape.rank_weight_bytes(1, "bfloat16")
    assert weights is not None
    assert told.kv_bytes is not None
    counted = weights + told.kv_bytes + (512 << 20) + sum(assumed_bytes(shape, told).values())
    assert counted / GIB == pytest.approx(gib, rel=0.03)


def test_an_unquantized_model_is_as_large_as_the_dtype_it_runs_in():
    shape = read_model(LLAMA_8B)
    assert shape.rank_weight_bytes(1, "float32") == 2 * (shape.rank_weight_bytes(1, "bfloat16") or 0)
    quantized = read_model(LLAMA_70B)
    assert (quantized.rank_weight_bytes(1, "float32") or 0) < 1.1 * (quantized.weight_bytes or 0)


@pytest.mark.parametrize(
    ("config", "tp", "more", "token_bytes"),
    [
        (LLAMA_8B, 1, {}, 128 * KIB),
        (LLAMA_70B, 1, {}, 320 * KIB),
        (LLAMA_70B, 4, {}, 80 * KIB),
        (LLAMA_70B, 1, {"engine_args": {"kv_cache_dtype": "fp8"}}, 160 * KIB),
        (GPT_OSS, 1, {}, 72 * KIB),
    ],
)
def test_kv_of_a_token(config: dict[str, object], tp: int, more: dict[str, object], token_bytes: int):
    shape = read_model(config)
    assert kv_layout("m", shape, sizes(shape, tp=tp, **more), is_cpu=False).token_bytes == token_bytes


def test_the_measured_kv_of_a_70b_is_its_room():
    """187,008 tokens was what vLLM 0.26 had on an H200."""
    shape = read_model(LLAMA_70B)
    told = sizes(shape, kv_gib=187_008 * 320 * KIB / GIB, max_model_len=3200)
    room = kv_room(kv_layout("m", shape, told, is_cpu=False), told, is_decode=True)
    assert (room.blocks + 1) * 16 == 187_008
    assert int(room.requests) == 58  # 64 prompts of 3,000 tokens did not fit


def test_windows_keep_what_they_can_see():
    shape = read_model(GPT_OSS)
    told = sizes(shape, kv_gib=10.0, max_model_len=131072)
    layout = kv_layout("m", shape, told, is_cpu=False)
    room = kv_room(layout, told, is_decode=True)
    assert layout.groups == (WINDOW, FULL)
    assert room.block_bytes == 18 * 16 * 2 * KIB  # of either group: half of the layers
    assert room.request_blocks == 8192 + 10  # a whole prompt, and a window with what is on its way
    while_computed = 8192 + (127 + 2 * 2048) // 16 + 2
    assert room.start_blocks == while_computed


def test_a_fixed_number_of_blocks_is_the_memory_they_take():
    shape = read_model(LLAMA_8B)
    told = sizes(shape, kv_blocks=1000)
    room = kv_room(kv_layout("m", shape, told, is_cpu=False), told, is_decode=True)
    assert (room.blocks, room.nbytes) == (1000, 1001 * 16 * 128 * KIB)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ((FULL,) * 3, (FULL,)),
        ((WINDOW, FULL) * 4, (WINDOW, FULL)),
        ((WINDOW, WINDOW, FULL) * 4, (WINDOW, WINDOW, FULL)),
        ((WINDOW,) * 12 + (FULL,) * 13, (WINDOW, FULL)),
        ((WINDOW,) * 5 + (FULL,) * 2, (WINDOW, WINDOW, WINDOW, FULL)),
    ],
)
def test_layers_that_look_back_equally_far_are_grouped(layers: tuple[KvGroup, ...], groups: tuple[KvGroup, ...]):
    made, group_of = kv_groups(layers)
    assert made == groups
    assert all(made[group] == layer for group, layer in zip(group_of, layers, strict=True))


def test_mla_has_one_latent_that_every_rank_keeps():
    mla = {**LLAMA_8B, "model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    shape = read_model(mla)
    assert shape.weight_bytes is None  # Not an architecture that is known here.
    assert [kv_layout("m", shape, sizes(shape, tp=tp), is_cpu=False).token_bytes for tp in (1, 4)] == [32 * 576 * 2] * 2


def test_what_is_assumed_grows_with_the_step():
    shape = read_model(LLAMA_70B)
    small, large = (
        assumed_bytes(shape, sizes(shape, role="prefill", chunk_tokens=tokens))["activations"]
        for tokens in (2048, 8192)
    )
    assert small < large < 3 * GIB


WRONG: list[tuple[dict[str, object], str]] = [
    ({"num_hidden_layers": None}, "num_hidden_layers is None"),
    ({"hidden_size": "4096"}, "hidden_size is '4096'"),
    ({"torch_dtype": "int4"}, "dtype 'int4' is none of"),
    ({"layer_types": ["full_attention"]}, "does not name the kind of each of 32 layers"),
    ({"layer_types": ["linear_attention"] * 32}, "keep a state instead of KV"),
    ({"layer_types": ["sliding_attention"] * 32}, "sliding_window is None"),
    ({"text_config": 3}, "text_config is not an object"),
]


@pytest.mark.parametrize(("change", "says"), WRONG)
def test_a_config_that_does_not_say_enough_is_refused(change: dict[str, object], says: str):
    with pytest.raises(UnknownModel, match=says):
        read_model({**LLAMA_8B, **change})


def test_a_quantization_that_is_not_known_leaves_the_weights_open():
    assert read_model({**LLAMA_8B, "quantization_config": {"quant_method": "bitsandbytes"}}).weight_bytes is None


def test_four_bits_in_groups_have_their_scales():
    config = {**LLAMA_8B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}
    shape = read_model(config)
    assert shape.weight_bytes is not None
    linear = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    assert shape.weight_bytes == pytest.approx(linear * (4 + 20 / 128) / 8 + 2 * (8_030_261_248 - linear), rel=0.001)
