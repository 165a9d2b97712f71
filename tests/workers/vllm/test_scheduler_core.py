"""The scheduler side of the connector decides alone what moves: no vLLM here."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.transport.base import Chunk, HandoffKey
from hocket.workers.engines.vllm.scheduler import (
    Open,
    Push,
    Receive,
    Scheduled,
    SchedulerCore,
    decode_params,
    prefill_params,
)

BLOCK = 16
TOKEN = bytes(range(16))
KEY = HandoffKey(TOKEN, 3, 2)
ORDER = Open("", KEY, ("tcp://127.0.0.1:1",), 9, "f" * 32, 0, 100.0)


@pytest.fixture
def core() -> SchedulerCore:
    return SchedulerCore(BLOCK)


def wait_for_kv(core: SchedulerCore, tokens: int, *, cached_tokens: int = 0) -> None:
    """Request "d" of that many prompt tokens is admitted and its blocks 100, 101, ... are reserved."""
    params = decode_params(7, TOKEN, 3, 100.0)
    external = core.external_tokens("d", params, tokens, cached_tokens)
    blocks = range(100, 100 + -(-tokens // BLOCK))
    core.allocated("d", params, prompt_tokens=tokens, external_tokens=external, block_ids=list(blocks))


def admit_prefill(core: SchedulerCore, tokens: int) -> None:
    core.allocated("p", prefill_params(8, ORDER), prompt_tokens=tokens, external_tokens=0, block_ids=[])


def first_chunk(tokens: int, blocks: int, computed_tokens: int = 0) -> Scheduled:
    return Scheduled("p", tuple(range(blocks)), True, computed_tokens, tokens)


def test_a_decode_request_expects_the_blocks_after_its_prefix_hit(core: SchedulerCore) -> None:
    wait_for_kv(core, 100, cached_tokens=2 * BLOCK)
    plan = core.step([])
    assert plan.receives == [Receive("d", TOKEN, 3, 2, (102, 103, 104, 105, 106), 100.0)]
    assert core.step([]).receives == []


@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK])
def test_the_whole_prompt_comes_from_elsewhere(core: SchedulerCore, tokens: int) -> None:
    params = decode_params(7, TOKEN, 3, 100.0)
    assert core.external_tokens("d", params, tokens, 0) == tokens


def test_after_a_failed_load_or_a_preemption_the_prompt_is_computed_here(core: SchedulerCore) -> None:
    wait_for_kv(core, 100)
    core.step([])
    assert core.moved(["d"]) == []
    assert core.external_tokens("d", decode_params(7, TOKEN, 3, 100.0), 100, 0) == 0


def test_a_request_without_a_token_is_computed_here_and_reports_its_end(core: SchedulerCore) -> None:
    params = decode_params(7, None, 3, 100.0)
    assert core.external_tokens("d", params, 100, 0) == 0
    assert core.finished("d", params) == (False, 7)


def test_a_decode_request_that_is_aborted_while_waiting_ends_when_its_blocks_are_safe(core: SchedulerCore) -> None:
    wait_for_kv(core, 100)
    core.step([])
    assert core.finished("d", decode_params(7, TOKEN, 3, 100.0)) == (False, None)
    assert core.step([]).cancels == [TOKEN]
    assert core.moved(["d"]) == [7]
    assert core.is_idle


def test_a_decode_request_that_is_aborted_after_its_load_ends_at_once(core: SchedulerCore) -> None:
    wait_for_kv(core, 100)
    core.step([])
    core.moved(["d"])
    assert core.finished("d", decode_params(7, TOKEN, 3, 100.0)) == (False, 7)
    assert core.step([]).cancels == []
    assert core.is_idle


def test_a_prefill_opens_with_its_first_chunk_and_sends_whole_blocks(core: SchedulerCore) -> None:
    admit_prefill(core, 50)
    plan = core.step([first_chunk(40, 3)])
    assert [order.key for order in plan.opens] == [KEY]
    assert (plan.opens[0].blocks, plan.opens[0].request_id, plan.opens[0].addresses) == (4, "p", ORDER.addresses)
    assert plan.pushes == [Push(KEY, Chunk(0, (0, 1), False))]
    plan = core.step([Scheduled("p", (3,), False, 40, 10)])
    assert (plan.opens, plan.pushes) == ([], [Push(KEY, Chunk(2, (2, 3), True))])


def test_blocks_from_the_prefill_engines_own_cache_are_sent_with_the_first_chunk(core: SchedulerCore) -> None:
    admit_prefill(core, 64)
    plan = core.step([first_chunk(16, 4, computed_tokens=48)])
    assert plan.pushes == [Push(KEY, Chunk(0, (0, 1, 2, 3), True))]


def test_lookahead_blocks_beyond_the_prompt_are_not_sent(core: SchedulerCore) -> None:
    admit_prefill(core, 20)
    plan = core.step([first_chunk(20, 5)])
    assert plan.pushes == [Push(KEY, Chunk(0, (0, 1), True))]


def test_a_chunk_that_completes_no_block_pushes_nothing(core: SchedulerCore) -> None:
    admit_prefill(core, 40)
    plan = core.step([first_chunk(10, 1)])
    assert [order.key for order in plan.opens] == [KEY]
    assert plan.pushes == []


def test_a_finished_prefill_keeps_its_blocks_until_they_are_sent(core: SchedulerCore) -> None:
    admit_prefill(core, 40)
    core.step([first_chunk(40, 3)])
    assert core.finished("p", prefill_params(8, ORDER)) == (True, None)
    assert core.step([]).aborts == []
    assert core.moved(["p"]) == [8]
    assert core.is_idle


def test_an_aborted_prefill_gives_its_hand_off_up(core: SchedulerCore) -> None:
    admit_prefill(core, 100)
    core.step([first_chunk(40, 3)])
    assert core.finished("p", prefill_params(8, ORDER)) == (True, None)
    assert core.step([]).aborts == [(KEY, "aborted")]


def test_a_prefill_that_never_ran_ends_at_once(core: SchedulerCore) -> None:
    params = prefill_params(8, ORDER)
    assert core.finished("p", params) == (False, 8)
    admit_prefill(core, 100)
    assert core.finished("p", params) == (False, 8)
    assert core.is_idle


def test_a_preempted_prefill_gives_its_hand_off_up_and_sends_no_more(core: SchedulerCore) -> None:
    admit_prefill(core, 100)
    core.step([first_chunk(40, 3)])
    plan = core.step([], preempted=["p", "someone else"])
    assert plan.preempted == [KEY]
    plan = core.step([Scheduled("p", tuple(range(50, 57)), True, 0, 100)])
    assert (plan.opens, plan.pushes) == ([], [])
    assert core.finished("p", prefill_params(8, ORDER)) == (True, None)
    assert core.step([]).aborts == []


def test_a_plan_survives_the_way_between_processes(core: SchedulerCore) -> None:
    admit_prefill(core, 40)
    wait_for_kv(core, 40)
    plan = core.step([first_chunk(40, 3)])
    assert pickle.loads(pickle.dumps(plan)) == plan  # noqa: S301  # What vLLM does with it.


@settings(deadline=None)  # A busy machine is no failure.
@given(st.integers(1, 300), st.lists(st.integers(1, 70), max_size=12), st.integers(0, 10))
def test_every_block_is_sent_once_and_in_order_however_the_prompt_is_chunked(
    tokens: int, chunks: list[int], cached_blocks: int
) -> None:
    core = SchedulerCore(BLOCK)
    admit_prefill(core, tokens)
    computed = min(cached_blocks, (tokens - 1) // BLOCK) * BLOCK
    held = -(-computed // BLOCK)
    sent: list[int] = []
    lasts: list[bool] = []
    is_fresh = True
    for size in [*chunks, tokens]:
        size = min(size, tokens - computed)
        if size == 0:
            break
        needed = -(-(computed + size) // BLOCK)
        blocks = range(needed) if is_fresh else range(held, needed)
        for push in core.step([Scheduled("p", tuple(blocks), is_fresh, computed, size)]).pushes:
            assert push.chunk.first_block == len(sent)
            sent += push.chunk.block_ids
            lasts.append(push.chunk.is_last)
        computed, held, is_fresh = computed + size, needed, False
    assert sent == list(range(-(-tokens // BLOCK)))
    assert lasts[-1]
    assert not any(lasts[:-1])
