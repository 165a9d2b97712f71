"""Another process's staging memory, read by our kernels: over CUDA IPC where there is a GPU, else interpreted."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hocket.transport.base import DeviceBuffer
from hocket.transport.errors import TransportUnavailable
from hocket.transport.stager import Lease

torch = pytest.importorskip("torch")
HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
with pytest.MonkeyPatch.context() as patch:
    if not HAS_CUDA:
        patch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    from gpu_ring_rig import BLOCKS, EXTENTS, NBYTES, make_pool

    from hocket.transport.gpu.ring import MappedGpuRing
    from hocket.transport.gpu.tickets import GpuTicket


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    """Triton asks again while it runs."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_CUDA:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@dataclass
class Lent:
    """What the child has lent."""

    lease: Lease
    digest: int
    words: bytes
    fds: list[int]


@pytest.fixture(scope="module")
def lent() -> Iterator[Lent]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, str(Path(__file__).with_name("gpu_ring_child.py")), DEVICE, str(theirs.fileno())]
    environment = dict(os.environ) | ({} if HAS_CUDA else {"TRITON_INTERPRET": "1"})
    child = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
    theirs.close()
    ours.settimeout(60.0)
    said, fds, _, _ = socket.recv_fds(ours, 1024, 4)
    *lease, digest = struct.unpack_from("<5Q", said)
    yield Lent(Lease(*lease), digest, said[40:], fds)
    ours.close()
    assert child.wait(30) == 0
    for fd in fds:
        os.close(fd)


def dup(fds: list[int]) -> list[int]:
    return [os.dup(fd) for fd in fds]


def settled(ticket: GpuTicket) -> int:
    deadline = time.monotonic() + 30.0
    while (digest := ticket.poll()) is None:
        assert time.monotonic() < deadline
    return digest


@pytest.mark.parametrize("verifies_blocks", [False, True])
def test_blocks_come_straight_out_of_another_process(lent: Lent, verifies_blocks: bool) -> None:
    memory, pool = make_pool(DEVICE, seed=2, verifies_blocks=verifies_blocks)
    theirs, _ = make_pool("cpu" if not HAS_CUDA else DEVICE, seed=1)
    before = memory.clone()
    mapped = pool.ring().map(lent.words, dup(lent.fds))
    assert mapped.is_filled(lent.lease)
    ticket = pool.launch(pool.arm(EXTENTS, mapped.slot(lent.lease), is_gather=False))
    assert settled(ticket) == lent.digest
    written = {(extent.layer, block) for extent in EXTENTS for block in extent.block_ids}
    for layer in range(3):
        for block in range(BLOCKS):
            wanted = theirs if (layer, block) in written else before
            assert torch.equal(memory[layer, block], wanted[layer, block]), (layer, block)
    mapped.close()
    pool.close()


def test_a_mapped_slot_is_copied_into_one_of_ours(lent: Lent) -> None:
    _, pool = make_pool(DEVICE, seed=2)
    mapped = pool.ring().map(lent.words, dup(lent.fds))
    slot = pool.reserve(NBYTES, on_device=True)
    assert slot is not None
    assert isinstance(slot.buffer, DeviceBuffer)
    assert settled(pool.ring().copy(mapped.slot(lent.lease), [slot.buffer])) == lent.digest
    mapped.close()


def test_what_is_not_the_peers_is_refused(lent: Lent) -> None:
    _, pool = make_pool(DEVICE, seed=2)
    wrong = lent.words[:-1] + bytes([lent.words[-1] ^ 1])
    with pytest.raises(TransportUnavailable, match="not the peer's memory"):
        pool.ring().map(wrong, dup(lent.fds))
    with pytest.raises(TransportUnavailable, match="not a ring"):
        pool.ring().map(b"short", dup(lent.fds))
    with pytest.raises(TransportUnavailable, match="not a ring"):
        pool.ring().map(lent.words, [])


def test_a_slot_outside_of_the_ring_is_refused(lent: Lent) -> None:
    _, pool = make_pool(DEVICE, seed=2)
    mapped = pool.ring().map(lent.words, dup(lent.fds))
    assert isinstance(mapped, MappedGpuRing)
    for lease in (
        Lease(NBYTES, 1 << 20, 0, 0),
        Lease(2 << 20, 0, 0, 0),
        Lease(NBYTES, 8, 0, 0),
        Lease(NBYTES, 0, 1 << 20, 0),
        Lease(NBYTES, (1 << 64) - NBYTES, 0, 0),
    ):
        with pytest.raises(ValueError, match="not a slot"):
            mapped.slot(lease)
    mapped.close()


def test_an_armed_message_speaks_when_it_is_launched_or_given_up() -> None:
    _, pool = make_pool(DEVICE, seed=1)
    slots = [pool.reserve(NBYTES, on_device=True) for _ in range(2)]
    launched, given_up = (pool.arm(EXTENTS, slot, is_gather=True) for slot in slots if slot)
    lease = pool.ring().lease(slots[0].buffer, launched)  # type: ignore[union-attr]
    assert launched.poll() is None
    assert lease.sequence == launched.sequence
    pool.launch(launched)
    pool.disarm(given_up)
    settled(launched)
    settled(given_up)
    with pytest.raises(AssertionError, match="launched twice"):
        pool.launch(launched)
    for slot in slots:
        assert slot
        pool.release(slot)
    pool.close()


def test_memory_beside_the_ring_is_not_lent() -> None:
    memory, pool = make_pool(DEVICE, seed=1)
    with pytest.raises(TypeError, match="device memory"):
        pool.ring().lease(DeviceBuffer(memory.data_ptr(), 4096, memory), None)


@pytest.mark.skipif(not HAS_CUDA, reason="only a GPU's driver refuses it")
def test_a_process_does_not_map_its_own_gpu_memory() -> None:
    _, pool = make_pool(DEVICE, seed=1)
    ring = pool.ring()
    with pytest.raises(TransportUnavailable, match="its own GPU memory"):
        ring.map(ring.words, dup(list(ring.fds)))
