"""The simulator's bytes: any difference in what is found changes the next token."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import numpy as np
import pytest

from hocket.bus.messages import SamplingParams
from hocket.transport import Extent
from hocket.workers.engines.sim.kv import (
    ROOT_STATE,
    SimKv,
    cells_of,
    choose,
    expected_tokens,
    next_states,
    sim_layouts,
)
from hocket.workers.engines.sim.vocabulary import sim_vocabulary

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
LAYERS, BLOCK_TOKENS = 3, 4


@pytest.fixture
def kv() -> SimKv:
    return SimKv(sim_layouts("m", block_tokens=BLOCK_TOKENS, layers=LAYERS), 16)


def write(kv: SimKv, blocks: list[int], tokens: list[int]) -> None:
    cells = cells_of(next_states(ROOT_STATE, tokens), LAYERS)
    for layer in range(LAYERS):
        kv.write(layer, blocks, cells[layer : layer + 1])


def test_what_was_written_reads_as_the_expected_answer(kv: SimKv):
    tokens = random.Random(1).choices(range(100), k=11)
    write(kv, [7, 2, 9], tokens)
    vocabulary = range(10**6)
    right = expected_tokens(tokens, GREEDY, planes=LAYERS, vocabulary=vocabulary)
    assert choose(kv.read([7, 2, 9], 11), GREEDY, vocabulary) == right[0]


def test_a_prompt_continued_by_its_answer_goes_on_the_same_way():
    tokens = [5, 6, 7]
    answer = expected_tokens(tokens, GREEDY, planes=2, vocabulary=range(1000))
    rest = expected_tokens(
        tokens + answer[:3], SamplingParams(max_tokens=5, temperature=0.0), planes=2, vocabulary=range(1000)
    )
    assert answer[3:] == rest


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("position", [0, 5, 10])
def test_one_flipped_bit_anywhere_changes_the_answer(kv: SimKv, layer: int, position: int):
    write(kv, [0, 1, 2], list(range(11)))
    right = kv.read([0, 1, 2], 11)
    buffer = kv.pools[0].buffers([Extent(layer, (position // BLOCK_TOKENS,))])[0]
    buffer[8 * (position % BLOCK_TOKENS) + 3] ^= 1
    assert kv.read([0, 1, 2], 11) != right


def test_swapped_layers_swapped_blocks_and_foreign_blocks_change_the_answer(kv: SimKv):
    write(kv, [0, 1, 2], list(range(12)))
    write(kv, [3, 4, 5], [50, *range(1, 12)])
    right = kv.read([0, 1, 2], 12)
    assert len({right, kv.read([1, 0, 2], 12), kv.read([0, 4, 2], 12), kv.read([0, 1, 5], 12), kv.read([0, 1], 8)}) == 5
    first, second = kv.pools[0].buffers([Extent(0, (1,))])[0], kv.pools[0].buffers([Extent(1, (1,))])[0]
    copy = first.copy()
    first[:] = second
    second[:] = copy
    assert kv.read([0, 1, 2], 12) != right


def test_tokens_appended_one_by_one_give_the_same_answer_as_a_whole_read(kv: SimKv):
    tokens = list(range(12))
    write(kv, [0], tokens[:4])
    state = next_states(ROOT_STATE, tokens[:4])[-1]
    answer = kv.read([0], 4)
    for position in range(4, 12):
        (state,) = next_states(state, [tokens[position]])
        answer = int(kv.append([position // 4], [position % 4], [state], [answer])[0])
    assert answer == kv.read([0, 1, 2], 12)


def test_the_seed_counts_only_when_sampling():
    def first(**sampling: float | int) -> int:
        params = SamplingParams(max_tokens=1, **sampling)  # type: ignore[arg-type]  # msgspec checks the values
        return expected_tokens([1, 2], params, planes=2, vocabulary=range(10**9))[0]

    assert first(temperature=0.0, seed=1) == first(temperature=0.0, seed=2)
    assert first(temperature=0.5, seed=1) != first(temperature=0.5, seed=2)
    assert first(temperature=0.5, seed=1) == first(temperature=1.0, seed=1)


def test_answers_use_the_whole_vocabulary_and_nothing_else():
    vocabulary = range(100, 120)
    rng = np.random.default_rng(1)
    chosen = {choose(int(answer), GREEDY, vocabulary) for answer in rng.integers(0, 1 << 63, 1000)}
    assert chosen == set(vocabulary)


def test_the_vocabulary_leaves_special_tokens_out(tmp_path: Path):
    tokenizer = {
        "model": {"type": "BPE", "vocab": {f"t{i}": i for i in range(50)}, "merges": []},
        "added_tokens": [{"id": i, "content": "<x>", "special": True} for i in (0, 1, 2, 45)],
    }
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    assert sim_vocabulary(str(tmp_path), 9) == range(3, 45)


def test_without_a_readable_tokenizer_ids_count_from_zero(tmp_path: Path):
    assert sim_vocabulary(str(tmp_path / "none"), 9) == range(9)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert sim_vocabulary(str(tmp_path), 9) == range(9)
