"""The scheduler side of the connector decides alone what moves: no vLLM here."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.transport.base import Chunk, GroupBlocks, HandoffKey
from hocket.transport.layout import KvGroup
from hocket.workers.engines.vllm.kv_groups import KvGroups
from hocket.workers.engines.vllm.scheduler import (
    NULL_BLOCK,
    Open,
    Push,
    Receive,
    Scheduled,
    SchedulerCore,
    StepPlan,
    decode_params,
    prefill_params,
)

BLOCK = 16
TOKEN = bytes(range(16))
KEY = HandoffKey(TOKEN, 3, 2)
ORDER = Open("", KEY, ("tcp://127.0.0.1:1",), 9, "f" * 32, 0, 100.0, 0)
PLAIN = KvGroups((KvGroup(),), (BLOCK,))


@pytest.fixture
def core() -> SchedulerCore:
    return SchedulerCore(PLAIN)


def wait_for_kv(core: SchedulerCore, tokens: int, *, cached_tokens: int = 0) -> None:
    """Request "d" of that many prompt tokens is admitted and its blocks 100, 101, ... are reserved."""
    params = decode_params(7, TOKEN, 3, 100.0)
    external = core.external_tokens("d", params, tokens, cached_tokens)
    blocks = range(100, 100 + -(-tokens // BLOCK))
    core.allocated("d", params, prompt_tokens=tokens, external_tokens=external, block_ids=[list(blocks)])


def chunk(first_token: int, end_token: int, block_ids: tuple[int, ...]) -> Chunk:
    return Chunk(first_token, end_token, (GroupBlocks(first_token // BLOCK, block_ids),))


def admit_prefill(core: SchedulerCore, tokens: int) -> None:
    core.allocated("p", prefill_params(8, ORDER), prompt_tokens=tokens, external_tokens=0, block_ids=[])


def first_chunk(tokens: int, blocks: int, computed_tokens: int = 0) -> Scheduled:
    return Scheduled("p", (tuple(range(1, blocks + 1)),), True, computed_tokens, tokens)


def test_a_decode_request_expects_the_blocks_after_its_prefix_hit(core: SchedulerCore) -> None:
    wait_for_kv(core, 100, cached_tokens=2 * BLOCK)
    plan = core.step([])
    assert plan.receives == [
        Receive("d", TOKEN, 3, (GroupBlocks(2, (102, 103, 104, 105, 106)),), 2 * BLOCK, 100, 100.0)
    ]
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
    assert (plan.opens[0].tokens, plan.opens[0].request_id, plan.opens[0].addresses) == (50, "p", ORDER.addresses)
    assert plan.pushes == [Push(KEY, chunk(0, 32, (1, 2)))]
    plan = core.step([Scheduled("p", ((4,),), False, 40, 10)])
    assert (plan.opens, plan.pushes) == ([], [Push(KEY, chunk(32, 50, (3, 4)))])


def test_blocks_from_the_prefill_engines_own_cache_are_sent_with_the_first_chunk(core: SchedulerCore) -> None:
    admit_prefill(core, 64)
    plan = core.step([first_chunk(16, 4, computed_tokens=48)])
    assert plan.pushes == [Push(KEY, chunk(0, 64, (1, 2, 3, 4)))]


def test_lookahead_blocks_beyond_the_prompt_are_not_sent(core: SchedulerCore) -> None:
    admit_prefill(core, 20)
    plan = core.step([first_chunk(20, 5)])
    assert plan.pushes == [Push(KEY, chunk(0, 20, (1, 2)))]


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
    plan = core.step([Scheduled("p", (tuple(range(50, 57)),), True, 0, 100)])
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
    core = SchedulerCore(PLAIN)
    admit_prefill(core, tokens)
    computed = min(cached_blocks, (tokens - 1) // BLOCK) * BLOCK
    held = -(-computed // BLOCK)
    sent: list[int] = []
    sent_tokens = 0
    is_fresh = True
    for size in [*chunks, tokens]:
        size = min(size, tokens - computed)
        if size == 0:
            break
        needed = -(-(computed + size) // BLOCK)
        blocks = range(needed) if is_fresh else range(held, needed)
        rows = (tuple(block + 1 for block in blocks),) if blocks or is_fresh else ()
        for push in core.step([Scheduled("p", rows, is_fresh, computed, size)]).pushes:
            assert push.chunk.first_token == sent_tokens
            assert push.chunk.groups[0].first_block == len(sent)
            assert push.chunk.end_token % BLOCK == 0 or push.chunk.end_token == tokens
            sent_tokens = push.chunk.end_token
            sent += push.chunk.groups[0].block_ids
        computed, held, is_fresh = computed + size, needed, False
    assert sent == list(range(1, -(-tokens // BLOCK) + 1))
    assert sent_tokens == tokens


# Several groups.

WINDOW = 100
HYBRID = KvGroups((KvGroup("window", WINDOW), KvGroup()), (32, 32))
CHUNKED = KvGroups((KvGroup("chunk", 64), KvGroup()), (32, 32))
UNEVEN = KvGroups((KvGroup("window", WINDOW), KvGroup()), (16, 32))


def rows_of(groups: KvGroups, computed_tokens: int, end_token: int) -> tuple[tuple[int, ...], ...]:
    """A block table as vLLM reserves it: null where a group needs nothing any more, ids of a hundred of its own else."""
    rows = []
    for group, block_tokens in enumerate(groups.block_tokens):
        kept = groups.first_kept_token(group, computed_tokens) // block_tokens
        ids = range(100 * (group + 1), 100 * (group + 1) + -(-end_token // block_tokens))
        rows.append(tuple(NULL_BLOCK if block < kept else block_id for block, block_id in enumerate(ids)))
    return tuple(rows)


def load(groups: KvGroups, prompt_tokens: int, cached_tokens: int = 0) -> tuple[SchedulerCore, int]:
    core, params = SchedulerCore(groups), decode_params(7, TOKEN, 3, 100.0)
    external = core.external_tokens("d", params, prompt_tokens, cached_tokens)
    end_token = cached_tokens + external
    rows = rows_of(groups, end_token, end_token)
    core.allocated("d", params, prompt_tokens=prompt_tokens, external_tokens=external, block_ids=rows)
    return core, external


@pytest.mark.parametrize(
    ("groups", "prompt_tokens", "wanted"),
    [
        (HYBRID, 1, 0),
        (HYBRID, 32, 0),
        (HYBRID, 33, 32),
        (HYBRID, 131, 128),
        (HYBRID, 193, 192),
        (CHUNKED, 64, 32),
        (CHUNKED, 65, 64),
        (UNEVEN, 49, 32),
        (KvGroups((KvGroup("window", WINDOW),), (32,)), 64, 32),
        (KvGroups((KvGroup(), KvGroup()), (16, 16)), 64, 48),
    ],
)
def test_with_windows_only_whole_blocks_before_the_last_token_are_wanted(
    groups: KvGroups, prompt_tokens: int, wanted: int
) -> None:
    assert load(groups, prompt_tokens)[1] == wanted


def test_blocks_before_the_window_are_not_expected() -> None:
    core, external = load(HYBRID, 199)
    assert external == 192  # The window of token 192 begins at 93, in block 2.
    assert core.step([]).receives == [
        Receive(
            "d",
            TOKEN,
            3,
            (GroupBlocks(2, (102, 103, 104, 105)), GroupBlocks(0, tuple(range(200, 206)))),
            0,
            192,
            100.0,
        )
    ]


def test_after_a_prefix_hit_the_wanted_blocks_begin_where_both_the_hit_and_the_window_allow() -> None:
    core, _ = load(HYBRID, 300, cached_tokens=160)
    (receive,) = core.step([]).receives
    # The window of token 288 begins at 189, in block 5, which the hit has; full attention goes on after the hit.
    assert receive.groups == (GroupBlocks(5, (105, 106, 107, 108)), GroupBlocks(5, (205, 206, 207, 208)))
    core, _ = load(HYBRID, 300, cached_tokens=96)
    (receive,) = core.step([]).receives
    assert receive.groups == (GroupBlocks(5, (105, 106, 107, 108)), GroupBlocks(3, tuple(range(203, 209))))
    assert (receive.first_token, receive.end_token) == (96, 288)


@pytest.mark.parametrize(("prompt_tokens", "cached_tokens"), [(20, 0), (32, 0), (100, 96)])
def test_when_there_is_nothing_to_load_the_prefill_side_is_let_go(prompt_tokens: int, cached_tokens: int) -> None:
    core, external = load(HYBRID, prompt_tokens, cached_tokens)
    assert external == 0
    (receive,) = core.step([]).receives
    assert [group.block_ids for group in receive.groups] == [(), ()]
    assert (receive.first_token, receive.end_token, receive.is_waiting) == (cached_tokens, cached_tokens, False)
    params = decode_params(7, TOKEN, 3, 100.0)
    rows = rows_of(HYBRID, prompt_tokens, prompt_tokens)
    core.allocated("d", params, prompt_tokens=prompt_tokens, external_tokens=0, block_ids=rows)
    assert core.step([]).receives == []
    assert core.finished("d", params) == (False, 7)
    assert core.step([]).cancels == []
    assert core.is_idle


def test_a_window_that_ends_with_the_load_may_want_nothing_of_a_group() -> None:
    core, _ = load(CHUNKED, 100, cached_tokens=0)
    (receive,) = core.step([]).receives
    assert receive.groups == (GroupBlocks(2, (102,)), GroupBlocks(0, (200, 201, 202)))
    core, _ = load(CHUNKED, 70, cached_tokens=0)  # An attention chunk begins at 64: nothing before it is looked at.
    (receive,) = core.step([]).receives
    assert receive.groups == (GroupBlocks(2, ()), GroupBlocks(0, (200, 201)))


def prefill_steps(
    groups: KvGroups, tokens: int, ends: list[int], *, cached_tokens: int = 0, decode_step_tokens: int = 0
) -> list[StepPlan]:
    core = SchedulerCore(groups)
    order = Open("", KEY, ("tcp://127.0.0.1:1",), 9, "f" * 32, 0, 100.0, decode_step_tokens)
    core.allocated("p", prefill_params(8, order), prompt_tokens=tokens, external_tokens=0, block_ids=[])
    plans, computed = [], cached_tokens
    held = [0] * len(groups.groups)
    for end in ends:
        table = rows_of(groups, computed, end)
        rows = tuple(row[count:] for row, count in zip(table, held, strict=True))
        plans.append(core.step([Scheduled("p", rows, computed == cached_tokens, computed, end - computed)]))
        held, computed = [len(row) for row in table], end
    return plans


def test_chunks_end_at_whole_blocks_of_every_group() -> None:
    plans = prefill_steps(UNEVEN, 96, [40, 60, 96])
    assert [push.chunk for plan in plans for push in plan.pushes] == [
        Chunk(0, 32, (GroupBlocks(0, (100, 101)), GroupBlocks(0, (200,)))),
        Chunk(32, 96, (GroupBlocks(2, (102, 103, 104, 105)), GroupBlocks(1, (201, 202)))),
    ]


def test_of_a_prefix_hit_on_prefill_only_what_is_still_there_is_sent() -> None:
    (plan,) = prefill_steps(HYBRID, 288, [288], cached_tokens=192)
    assert [push.chunk for push in plan.pushes] == [
        Chunk(0, 288, (GroupBlocks(2, tuple(range(102, 109))), GroupBlocks(0, tuple(range(200, 209)))))
    ]


def test_blocks_that_decode_wants_stay_while_both_sides_have_blocks_of_one_size() -> None:
    for tokens in range(32, 600, 32):
        for end in range(1, tokens):
            plans = prefill_steps(HYBRID, tokens, [end, tokens])
            assert not any(plan.preempted for plan in plans)


def test_a_hand_off_is_given_up_before_blocks_are_overwritten_that_decode_wants() -> None:
    # Decode's blocks of 128 tokens begin at 256, long before the window of token 384; a step at 370 takes 256..268 back.
    plans = prefill_steps(HYBRID, 384, [370, 384], decode_step_tokens=128)
    assert [plan.preempted for plan in plans] == [[], []]
    wide = KvGroups((KvGroup("window", 60), KvGroup()), (32, 32))
    plans = prefill_steps(wide, 384, [370, 384], decode_step_tokens=128)
    assert [plan.preempted for plan in plans] == [[], [KEY]]
    assert plans[1].pushes == []


@given(st.integers(1, 40), st.lists(st.integers(1, 150), max_size=12), st.sampled_from([HYBRID, CHUNKED, UNEVEN]))
def test_what_decode_wants_is_what_prefill_sends_however_the_prompt_is_chunked(
    prompt_blocks: int, chunks: list[int], groups: KvGroups
) -> None:
    tokens = prompt_blocks * groups.step_tokens
    ends, computed = [], 0
    for size in [*chunks, tokens]:
        computed = min(tokens, computed + size)
        if not ends or computed > ends[-1]:
            ends.append(computed)
    sent = [dict[int, int]() for _ in groups.groups]
    for plan in prefill_steps(groups, tokens, ends):
        for push in plan.pushes:
            for group, (first_block, block_ids) in enumerate(push.chunk.groups):
                sent[group] |= dict(enumerate(block_ids, first_block))
    core, _ = load(groups, tokens + 1)
    (receive,) = core.step([]).receives
    for group, (first_block, block_ids) in enumerate(receive.groups):
        wanted = dict(enumerate(block_ids, first_block))
        assert wanted == {block: sent[group][block] for block in wanted}
