"""Memory of another process that is mapped instead of read by a system call; and what must never be mapped."""

from __future__ import annotations

import mmap
import os
import signal

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.transport.host_memory import SharedPages
from hocket.transport.links.mapped import PIECE_BYTES, Copy, PeerMemory
from hocket.transport.views import Part, Views


def ranges(*pairs: tuple[int, int]) -> np.ndarray:
    return np.array(pairs, np.uint64)


def test_the_sealed_memory_of_another_process_is_read_in_place():
    memory = SharedPages(1 << 20).array
    address = memory.ctypes.data
    told, tell = os.pipe()
    child = os.fork()
    if not child:  # Memory that is shared with a fork stays the same memory.
        memory[4096:8192] = 7
        os.write(tell, b"!")
        signal.pause()
    try:
        assert os.read(told, 1) == b"!"
        peer = PeerMemory(child)
        here = peer.here(ranges((address + 4096, 100), (address, 50)))
        assert here is not None
        target = np.zeros(150, np.uint8)
        copy = Copy(here, ranges((target.ctypes.data, 150)))
        assert copy.step(None) == 150
        assert copy.is_done
        assert target.tolist() == [7] * 100 + [0] * 50
        assert peer.here(ranges((address + (1 << 20) - 8, 16))) is None  # Past its end.
        assert peer.here(ranges((address, 8), ((1 << 64) - 8, 16))) is None
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_memory_that_could_be_cut_short_or_is_private_is_not_mapped():
    private = np.zeros(1 << 20, np.uint8)
    descriptor = os.memfd_create("unsealed")
    os.ftruncate(descriptor, 1 << 20)
    unsealed = np.frombuffer(mmap.mmap(descriptor, 1 << 20), np.uint8)
    os.close(descriptor)
    peer = PeerMemory(os.getpid())
    assert peer.here(ranges((private.ctypes.data, 8))) is None
    assert peer.here(ranges((unsealed.ctypes.data, 8))) is None


def test_sealed_memory_can_not_be_cut_short():
    memory = SharedPages(1 << 16, touch=True).array
    for name in os.listdir("/proc/self/fd"):
        try:
            is_ours = "memfd:hocket" in os.readlink(f"/proc/self/fd/{name}") and os.fstat(int(name)).st_size == 1 << 16
        except OSError:
            continue
        if is_ours:
            with pytest.raises(PermissionError):
                os.ftruncate(int(name), 0)
    assert not memory.any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_copy_puts_every_byte_where_it_belongs_and_digests_what_it_wrote(data: st.DataObject):
    is_even = data.draw(st.booleans())
    if is_even:  # Blocks of one size: moved by rows.
        size, count = data.draw(st.sampled_from([16, 4096, 40 << 10])), data.draw(st.integers(1, 40))
        lengths = [[size] * count] * 2
    else:
        total = data.draw(st.integers(1, 3 * PIECE_BYTES))
        lengths = []
        for _ in range(2):
            cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=6)) | {0, total})
            lengths.append([end - start for start, end in zip(cuts, cuts[1:], strict=False)])
    total = sum(lengths[0])
    sides = []
    for side in lengths:
        order = data.draw(st.permutations(range(len(side))))
        memory = np.zeros(total + (64 if not is_even else 0), np.uint8)
        offset, places = 0, {}
        for number in order:
            places[number] = offset
            offset += side[number]
        sides.append((memory, [(places[number], side[number]) for number in range(len(side))]))
    (source, reads), (target, writes) = sides
    source[:] = np.random.default_rng(total).integers(0, 256, len(source), np.uint8)
    at = [[(memory.ctypes.data + start, n) for start, n in spans] for memory, spans in sides]
    digest, copy = xxhash.xxh3_64(), Copy(ranges(*at[0]), ranges(*at[1]))
    moved = 0
    while not copy.is_done:
        moved += copy.step(digest)
    message = b"".join(bytes(source[start : start + n]) for start, n in reads)
    assert moved == total
    assert b"".join(bytes(target[start : start + n]) for start, n in writes) == message
    assert digest.intdigest() == xxhash.xxh3_64_intdigest(message)


def test_views_are_made_when_asked_for():
    array = np.arange(100, dtype=np.uint8)
    runs = [np.array([[10, 5], [50, 20]], np.uint64), np.array([[0, 2]], np.uint64)]
    views = Views([Part(array, array.ctypes.data, each) for each in runs])
    assert [view.tolist() for view in views] == [list(range(10, 15)), list(range(50, 70)), [0, 1]]
    assert views.nbytes == 27
    assert views.ranges.tolist() == [[array.ctypes.data + start, n] for start, n in ((10, 5), (50, 20), (0, 2))]
    assert views[-1].tolist() == [0, 1]
    with pytest.raises(IndexError):
        views[3]
