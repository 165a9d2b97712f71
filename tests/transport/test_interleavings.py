"""Both machines under every order of events that a seed can find."""

from __future__ import annotations

from collections import Counter

import pytest
from handoff_world import World

SEEDS, GROUPS = 500, 20
QUICK_SEEDS = 400


def run_world(seed: int) -> World:
    try:
        world = World(seed)
        world.run()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    return world


def test_some_orders_of_events_reach_every_way_to_end_and_no_wrong_bytes() -> None:
    ends: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for seed in range(QUICK_SEEDS):
        world = run_world(seed)
        ends.update(request.end.reason or "landed" for request in world.requests if request.end)
        seen += world.seen
    assert set(ends) == {"landed", "timeout", "cancelled", "digest", "sender_failed", "link_lost", "stalled"}, ends
    assert ends["landed"] > QUICK_SEEDS / 2, ends
    for event in ("regrant", "replaced", "half written at the end of its link", "reused", "kept a good part", "pause"):
        assert seen[event] > 10, seen


@pytest.mark.slow
@pytest.mark.parametrize("group", range(GROUPS))
def test_no_order_of_events_lands_wrong_bytes_or_frees_blocks_early(group: int) -> None:
    first = QUICK_SEEDS + group * SEEDS
    for seed in range(first, first + SEEDS):
        run_world(seed)
