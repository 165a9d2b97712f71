"""Both machines under every order of events that a seed can find."""

from __future__ import annotations

from collections import Counter

import pytest
from handoff_world import World

SEEDS = 60


@pytest.mark.parametrize("group", range(10))
def test_no_order_of_events_lands_wrong_bytes_or_frees_blocks_early(group: int) -> None:
    for seed in range(group * SEEDS, (group + 1) * SEEDS):
        try:
            World(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_the_world_reaches_every_way_to_end() -> None:
    ends: Counter[str] = Counter()
    for seed in range(400):
        world = World(seed)
        world.run()
        ends[world.received[0].reason or "landed"] += 1
    assert set(ends) >= {"landed", "timeout", "cancelled", "sender_failed", "link_lost"}, ends
    assert ends["landed"] > 200, ends
