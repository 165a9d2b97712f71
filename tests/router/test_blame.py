"""Who is blamed when workers die, and who is not."""

from __future__ import annotations

from hocket.bus.ids import RequestId
from hocket.bus.messages import SamplingParams, pack_tokens
from hocket.router.blame import REMEMBER_S, REMEMBERED_MAX, Aboard, Blame, Verdict
from hocket.router.generation import Generation

AGAIN, ALONE, GUILTY = Verdict.AGAIN, Verdict.ALONE, Verdict.GUILTY


def generation(content: int) -> Generation:
    return Generation(RequestId(f"r{content}"), "m", pack_tokens([content, 2, 3]), 3, SamplingParams(), 60.0)


def aboard(*streams: int, with_token: tuple[int, ...] = ()) -> list[Aboard]:
    return [Aboard(stream, generation(stream), stream in with_token) for stream in (*streams, *with_token)]


def lost(blame: Blame, on_board: list[Aboard], *, now: float = 0.0, is_shared: bool = False) -> dict[int, Verdict]:
    return blame.lost(on_board, now, is_shared=is_shared)


def test_who_was_the_only_one_on_two_workers_that_died_is_guilty():
    blame = Blame()
    assert set(lost(blame, aboard(1, 2, 3)).values()) == {AGAIN}
    assert lost(blame, aboard(1, 4, 5)) == {1: GUILTY, 4: AGAIN, 5: AGAIN}
    assert blame.is_guilty(generation(1), 1.0)


def test_who_died_along_with_somebody_worse_is_not_blamed():
    blame = Blame()
    lost(blame, aboard(1))
    lost(blame, aboard(1, 2))
    assert lost(blame, aboard(2)) == {2: AGAIN}  # Its first loss, as far as it is blamed.


def test_who_died_together_twice_is_tried_alone_and_the_third_loss_decides():
    blame = Blame()
    lost(blame, aboard(1, 2, 3))
    assert lost(blame, aboard(1, 2, 4)) == {1: ALONE, 2: ALONE, 4: AGAIN}
    assert not blame.must_wait(2)
    assert blame.must_wait(1)
    assert not blame.must_wait(3)
    assert lost(blame, aboard(2, 3)) == {2: GUILTY, 3: AGAIN}
    assert blame.leave(2) == 1
    assert not blame.must_wait(1)
    blame.clear(1)
    assert blame.leave(1) is None
    assert lost(blame, aboard(1)) == {1: AGAIN}


def test_the_turn_goes_on_with_the_first_token_and_past_who_has_left():
    blame = Blame()
    for _ in range(2):
        lost(blame, aboard(1, 2, 3))
    assert [blame.must_wait(stream) for stream in (1, 2, 3)] == [False, True, True]
    assert blame.leave(2) is None
    assert blame.moved_on(1) == 3
    assert blame.moved_on(1) is None


def test_who_has_a_token_is_not_blamed_while_somebody_has_none():
    blame = Blame()
    assert lost(blame, aboard(1, with_token=(2, 3))) == {1: AGAIN, 2: AGAIN, 3: AGAIN}
    assert lost(blame, aboard(with_token=(2, 3))) == {2: AGAIN, 3: AGAIN}
    assert lost(blame, aboard(2, with_token=(3,))) == {2: GUILTY, 3: AGAIN}


def test_where_other_routers_had_requests_two_losses_prove_nothing():
    blame = Blame()
    lost(blame, aboard(1))
    assert lost(blame, aboard(1), is_shared=True) == {1: ALONE}
    assert lost(blame, aboard(1), is_shared=True) == {1: GUILTY}


def test_a_client_that_tries_again_brings_its_losses_along_for_some_minutes():
    blame = Blame()
    lost(blame, aboard(1))
    blame.leave(1)
    blame.enter(7, generation(1), 1.0)
    assert lost(blame, [Aboard(7, generation(1), False)], now=1.0) == {7: GUILTY}
    blame.leave(7)
    assert blame.is_guilty(generation(1), 1.0)
    assert not blame.is_guilty(generation(2), 1.0)
    assert not blame.is_guilty(generation(1), 1.0 + REMEMBER_S)


def test_other_parameters_are_another_request():
    blame = Blame()
    lost(blame, aboard(1))
    lost(blame, aboard(1))
    same = generation(1)
    other = Generation(same.request_id, "m", same.packed_tokens, 3, SamplingParams(temperature=0.5), 60.0)
    assert blame.is_guilty(same, 1.0)
    assert not blame.is_guilty(other, 1.0)


def test_what_is_remembered_is_bounded():
    blame = Blame()
    for stream in range(REMEMBERED_MAX + 1):
        lost(blame, aboard(stream))
        blame.leave(stream)
    assert len(blame._records) == REMEMBERED_MAX


def test_a_worker_that_dies_idle_blames_nobody():
    assert lost(Blame(), []) == {}
