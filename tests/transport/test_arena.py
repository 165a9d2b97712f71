"""The arena that staging slots are cut from: any order of reserving and giving back, replayed against a plain model."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.transport.gpu.arena import Arena

CAPACITY = 1 << 16
# A run of that many bytes, or the n-th of the taken ones given back.
STEPS = st.lists(st.one_of(st.integers(1, CAPACITY // 3), st.integers(-40, -1)), max_size=200)


def rounded(nbytes: int, align_bytes: int = 256) -> int:
    return -(-nbytes // align_bytes) * align_bytes


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_runs_never_overlap_and_an_allocation_fails_only_when_no_hole_is_large_enough(steps: list[int]) -> None:
    arena, taken = Arena(CAPACITY), {}
    for step in steps:
        if step < 0:
            if taken:
                start = sorted(taken)[step % len(taken)]
                del taken[start]
                arena.release(start)
        elif (start := arena.reserve(step)) is not None:
            assert start % 256 == 0
            assert all(start + step <= other or end <= start for other, end in taken.items())
            assert start + step <= CAPACITY
            taken[start] = start + step
        else:
            edges = [0, *(edge for first in sorted(taken) for edge in (first, rounded(taken[first]))), CAPACITY]
            assert max(end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True)) < rounded(step)
        assert arena.free_bytes == CAPACITY - sum(rounded(end) - first for first, end in taken.items())
    for start in taken:
        arena.release(start)
    assert arena.free_bytes == arena.hole_bytes_max == CAPACITY


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=400), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_what_is_free_is_in_few_holes(sizes: list[int], picks: int) -> None:
    """A failure with n runs taken means that less than (n + 1) times the asked is free: no arena of small pieces."""
    arena, taken = Arena(CAPACITY), []
    for index, size in enumerate(sizes):
        start = arena.reserve(size)
        if start is None:
            assert arena.free_bytes < (len(taken) + 1) * rounded(size)
            arena.release(taken.pop((picks + index) % len(taken)))
        else:
            taken.append(start)


def test_slots_in_turn_leave_no_gap() -> None:
    """First in, first out, of sizes that change: as a link's messages come and go."""
    arena = Arena(8 << 20)
    waiting: list[int] = []
    for turn in range(1000):
        nbytes = (1 << 20) - 4096 * (turn % 50)
        while (start := arena.reserve(nbytes)) is None:
            arena.release(waiting.pop(0))
        waiting.append(start)
        assert len(waiting) >= 6 or turn < 6, "two messages' room is lost to gaps"


def test_giving_back_twice_and_senseless_sizes_are_refused() -> None:
    arena = Arena(1000, align_bytes=64)
    assert arena.capacity_bytes == 960
    start = arena.reserve(960)
    assert start == 0
    assert arena.reserve(1) is None
    arena.release(start)
    with pytest.raises(ValueError, match="no run begins at byte 0"):
        arena.release(start)
    for nbytes in (0, -1):
        with pytest.raises(ValueError, match="a run of"):
            arena.reserve(nbytes)
    with pytest.raises(ValueError, match="power of two"):
        Arena(1000, align_bytes=96)
    with pytest.raises(ValueError, match="cannot hold"):
        Arena(100)


def test_threads_share_an_arena() -> None:
    arena, owner, clashes = Arena(1 << 16), bytearray(1 << 8), []

    def work(name: int) -> None:
        for turn in range(2000):
            start = arena.reserve(256 * (1 + turn % 5))
            if start is None:
                continue
            pages = range(start >> 8, (start >> 8) + 1 + turn % 5)
            for page in pages:
                if owner[page]:
                    clashes.append((name, page))
                owner[page] = name
            for page in pages:
                owner[page] = 0
            arena.release(start)

    threads = [threading.Thread(target=work, args=(name,)) for name in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert clashes == []
    assert arena.hole_bytes_max == arena.capacity_bytes
