"""The simulator's answers are right exactly when the KV is."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from hocket.bus.messages import FINISH_LENGTH, FINISH_STOP, SamplingParams

from .conftest import prompt_of, right_answer

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


async def test_a_prompt_computed_by_the_decode_engine_gives_the_expected_tokens(sim_pair):
    pair = await sim_pair()
    prompt = prompt_of(50, 1)
    assert await pair.answer(prompt, GREEDY) == right_answer(prompt, GREEDY)


async def test_kv_that_came_over_the_link_gives_the_expected_tokens(sim_pair):
    pair = await sim_pair()
    prompt = prompt_of(200, 1)
    assert await pair.hand_over(prompt, GREEDY, b"t" * 16) == right_answer(prompt, GREEDY)
    first = pair.outputs[(b"t" * 16).hex()][0]
    assert (first.computed_tokens, first.cached_tokens) == (1, 0)
    assert pair.decode.endpoint.stats.kv_bytes_received == 25 * 3 * 8 * 8
