"""The block pool: every block has one owner, the prefix cache tells what it holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.messages import BlockRemoved, BlockStored
from hocket.workers.engines.sim.blocks import BlockPool


def chain(blocks: int, seed: int = 0) -> list[int]:
    return block_hashes_of([seed] + list(range(1, blocks * 4)), 4)


def test_a_released_chain_is_hit_again():
    pool = BlockPool(8)
    blocks = pool.allocate([], 4)
    pool.store(blocks, chain(4), None)
    pool.release(blocks)
    assert pool.free_blocks == 8
    assert pool.hit(chain(4)) == blocks
    assert pool.take_events() == [BlockStored(chain(4))]


def test_the_end_of_the_longest_unused_chain_is_evicted_first():
    pool = BlockPool(4)
    old = pool.allocate([], 2)
    pool.store(old, chain(2, 1), None)
    new = pool.allocate([], 2)
    pool.store(new, chain(2, 2), None)
    pool.release(old)
    pool.release(new)
    pool.take_events()
    assert pool.allocate([], 1) == [old[1]]
    assert pool.take_events() == [BlockRemoved([chain(2, 1)[1]])]
    assert pool.hit(chain(2, 2)) == new


def test_hits_are_held_and_not_evicted():
    pool = BlockPool(4)
    blocks = pool.allocate([], 3)
    pool.store(blocks, chain(3), None)
    pool.release(blocks)
    again = pool.allocate(pool.hit(chain(2)), 2)
    assert again[:2] == blocks[:2]
    assert pool.allocate([], 1) is None
    assert pool.free_blocks == 0


def test_too_few_blocks_change_nothing():
    pool = BlockPool(3)
    blocks = pool.allocate([], 1)
    pool.store(blocks, chain(1), None)
    pool.release(blocks)
    assert pool.allocate(pool.hit(chain(1)), 3) is None
    assert pool.free_blocks == 3


def test_content_known_twice_is_told_once():
    pool = BlockPool(4)
    first, second = pool.allocate([], 2), pool.allocate([], 2)
    pool.store(first[:1], chain(1), None)
    pool.store(second, chain(2), None)
    assert pool.take_events() == [BlockStored(chain(1)), BlockStored(chain(2)[1:], chain(1)[0])]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.booleans()), max_size=60))
def test_events_always_tell_what_is_cached_and_no_block_is_lost(steps: list[tuple[int, int, bool]]):
    pool = BlockPool(12)
    held: list[list[int]] = []
    cached: set[int] = set()
    for seed, blocks, gives_back in steps:
        if gives_back and held:
            pool.release(held.pop(0))
        else:
            hashes = chain(blocks, seed)
            hits = pool.hit(hashes)
            got = pool.allocate(hits, blocks - len(hits))
            if got is not None:
                assert len(set(got)) == blocks
                pool.store(got[len(hits) :], hashes[len(hits) :], hashes[len(hits) - 1] if hits else None)
                held.append(got)
        for event in pool.take_events():
            if isinstance(event, BlockStored):
                assert cached.isdisjoint(event.hashes)
                assert event.parent is None or event.parent in cached
                cached.update(event.hashes)
            else:
                assert isinstance(event, BlockRemoved)
                assert cached.issuperset(event.hashes)
                cached.difference_update(event.hashes)
        assert len(cached) == pool.cached_blocks
        in_use = {block for blocks_held in held for block in blocks_held}
        assert pool.free_blocks == 12 - len(in_use)
    for blocks_held in held:
        pool.release(blocks_held)
    assert pool.free_blocks == 12
