"""Trace readers, block chains, scaling."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hocket.lab.traces import Span, Trace, TraceError, Turn, own_id, read_trace

MOONCAKE = """{"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 1536, "output_length": 0, "hash_ids": [0, 1, 3]}
{"timestamp": 3000, "input_length": 600, "output_length": 7, "hash_ids": [0, 4]}
"""
SESSIONS = """{"session_id":"a","input_length":1000,"output_length":100,"hash_ids":[1,2],"timestamp":500.0,"group_id":1}
{"session_id":"b","input_length":700,"output_length":10,"hash_ids":[1,9],"timestamp":900.0}
{"session_id":"a","input_length":600,"output_length":50,"hash_ids":[7,8],"delay":2500}
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.4799600,3180,8
"""
VIDUR = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
3772,54,3826,69.8
2015,156,2171,12.9
"""


def read(tmp_path: Path, text: str, *, as_stamped: bool = False) -> Trace:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    return read_trace(path, as_stamped=as_stamped)


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_mooncakes_hash_ids_are_shared_prefixes_at_any_block_size(tmp_path: Path):
    trace = read(tmp_path, MOONCAKE)
    first, second, third = trace.turns
    assert (first.prompt_tokens, first.output_tokens, second.output_tokens) == (1300, 5, 1)
    for block_tokens in (16, 48, 64, 512, 1024):
        chains = [turn.chain(block_tokens) for turn in trace.turns]
        assert [len(chain) for chain in chains] == [
            (t.prompt_tokens + t.output_tokens) // block_tokens for t in trace.turns
        ]
        assert common(chains[0], chains[1]) == 1024 // block_tokens
        assert common(chains[0], chains[2]) == 512 // block_tokens
        assert len(set(chains[0])) == len(chains[0])


def test_equal_stamps_are_spread_over_their_tick_unless_told_otherwise(tmp_path: Path):
    assert [turn.arrival_s for turn in read(tmp_path, MOONCAKE).turns] == [0.0, 1.5, 3.0]
    assert [turn.arrival_s for turn in read(tmp_path, MOONCAKE, as_stamped=True).turns] == [0.0, 0.0, 3.0]


def test_a_sessions_turn_holds_all_that_was_said_and_follows_its_answer(tmp_path: Path):
    first, other, second = read(tmp_path, SESSIONS).turns
    assert (first.after, other.after, second.after, second.think_s) == (None, None, 0, 2.5)
    assert (first.arrival_s, other.arrival_s) == (0.0, 0.4)
    assert second.prompt_tokens == 1000 + 100 + 600
    assert common(first.chain(64), second.chain(64)) == 1100 // 64
    assert common(first.chain(64), other.chain(64)) == 512 // 64


def test_azure_and_vidur_give_times_and_lengths(tmp_path: Path):
    azure = read(tmp_path, AZURE).turns
    assert [(turn.arrival_s, turn.prompt_tokens, turn.output_tokens) for turn in azure] == [
        (0.0, 4808, 10),
        (pytest.approx(1.5), 3180, 8),
    ]
    assert common(azure[0].chain(64), azure[1].chain(64)) == 0
    vidur = read(tmp_path, VIDUR).turns
    assert [(turn.arrival_s, turn.prompt_tokens, turn.output_tokens) for turn in vidur] == [
        (0.0, 3772, 54),
        (1.0, 2015, 156),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (MOONCAKE + "{oops\n", r"trace.txt:4: Expecting property name"),
        (MOONCAKE + "[1]\n", r"trace.txt:4: not an object"),
        (MOONCAKE.replace('"input_length": 600', '"input_length": -6'), r"trace.txt:3: input_length must be a whole number"),
        (MOONCAKE.replace('"timestamp": 3000', '"timestamp": "x"'), r"trace.txt:3: timestamp must be milliseconds"),
        (MOONCAKE.replace("[0, 4]", "[0]"), r"trace.txt:3: 1 hash_ids of 512 tokens for 600 tokens"),
        (MOONCAKE.replace("[0, 4]", "[0, null]"), r"trace.txt:3: hash_ids must be a list"),
        (SESSIONS.replace('"delay":2500', '"lag":1'), r"trace.txt:3: delay must be milliseconds"),
        (SESSIONS.replace('"session_id":"b"', '"session_id":5'), r"trace.txt:2: session_id must be a string"),
        (AZURE.replace("2023-11-16 18:17:05", "yesterday"), r"trace.txt:3: 'yesterday.4799600' is no time stamp"),
        (AZURE.replace("3180", "many"), r"trace.txt:3: 'many' and '8' must be token counts"),
        (AZURE.replace("ContextTokens", "Context"), r"trace.txt:1: no column ContextTokens"),
        (VIDUR.replace("2015,156", "2015,-1"), r"trace.txt:3: '2015' and '-1' must not be negative"),
        ("hello\n", r"trace.txt:1: no known trace begins with 'hello'"),
        (VIDUR.splitlines()[0] + "\n", r"trace.txt: no request in it"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, text: str, why: str):
    with pytest.raises(TraceError, match=why):
        read(tmp_path, text)


def test_rate_and_length_can_be_scaled_and_prefixes_stay_shared(tmp_path: Path):
    trace = read(tmp_path, MOONCAKE, as_stamped=True)
    assert trace.faster(2.0).turns[2].arrival_s == 1.5
    small = trace.resized(0.25)
    assert small.turns[1].prompt_tokens == 3 * 128
    assert small.turns[0].output_tokens == 1
    assert common(small.turns[0].chain(16), small.turns[1].chain(16)) == 2 * 128 // 16
    assert len(trace.first(2).turns) == 2


def test_a_conversation_can_be_made_longer(tmp_path: Path):
    long = read(tmp_path, SESSIONS).resized(3.0)
    first, _, second = long.turns
    assert second.prompt_tokens == first.prompt_tokens + first.output_tokens + 3 * 600
    assert common(first.chain(64), second.chain(64)) == (first.prompt_tokens + first.output_tokens) // 64


def test_copies_share_nothing_with_each_other(tmp_path: Path):
    trace = read(tmp_path, MOONCAKE)
    both = trace.copies(2)
    assert len(both.turns) == 6
    assert both.ideal_hit_tokens(64) == 2 * trace.ideal_hit_tokens(64)
    talks = read(tmp_path, SESSIONS).copies(2).turns
    assert [turn.after for turn in talks] == [None, None, 0, None, None, 3]
    assert [turn.session for turn in talks[::3]] == ["a/0", "a/1"]


def test_a_closed_loop_finds_the_turn_that_went_before(tmp_path: Path):
    lines = [
        (0, 1024, [1, 2]),
        (10, 1100, [5, 6, 7]),
        (20, 2100, [1, 2, 3, 4, 8]),
        (30, 2600, [1, 2, 3, 4, 9, 10]),
    ]
    text = "".join(
        f'{{"timestamp": {t}, "input_length": {n}, "output_length": 5, "hash_ids": {ids}}}\n' for t, n, ids in lines
    )
    assert [turn.after for turn in read(tmp_path, text).closed().turns] == [None, None, 0, 2]


def test_the_ideal_is_what_one_endless_cache_would_have_had(tmp_path: Path):
    trace = read(tmp_path, MOONCAKE)
    assert trace.ideal_hit_tokens(512) == 0 + 2 * 512 + 512


@given(
    prompt=st.integers(1, 5000), output=st.integers(1, 300), block_tokens=st.integers(1, 700), cut=st.integers(0, 5000)
)
def test_a_block_is_equal_exactly_when_everything_before_its_end_is(
    prompt: int, output: int, block_tokens: int, cut: int
):
    """Two prompts of 512-token ids that part at `cut`."""
    whole = -(-prompt // 512)
    cut = min(cut // 512, whole)
    ids = tuple(range(whole))
    other = (*ids[:cut], *(own_id(9, i) for i in range(cut, whole)))
    a = Turn(0.0, prompt, output, (Span(0, 512, ids),), own_id(1))
    b = Turn(0.0, prompt, output, (Span(0, 512, other),), own_id(2))
    shared = min(cut * 512, prompt)
    assert common(a.chain(block_tokens), b.chain(block_tokens)) == shared // block_tokens
