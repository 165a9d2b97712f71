"""A lending stager without a GPU: blocks in numpy arrays, a ring that other processes map, gathers that end when they are told.

Everything but the kernels is what runs over a GPU: slots with addresses, flags in shared memory, a mapping with a proof.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from hocket.transport import Extent, HostKvPool, KvLayout
from hocket.transport.base import Buffer, DeviceBuffer, HostBuffer
from hocket.transport.errors import TransportUnavailable
from hocket.transport.gpu.arena import Arena
from hocket.transport.gpu.digest import host_digest
from hocket.transport.host_memory import SharedPages, map_shared
from hocket.transport.stager import HostSlot, Lease, Slot, Ticket

FLAGS = 512  # words: one for each gather in turn
NONCE_BYTES = 16


@dataclass(slots=True)
class ShmSlot:
    """A slot of a ring, ours or mapped. `view` is the same bytes as an array."""

    buffer: Buffer
    view: HostBuffer
    offset: int = 0


@dataclass(slots=True)
class ShmTicket:
    """Speaks when its word of the flags is up."""

    flags: npt.NDArray[np.uint64]
    flag: int
    sequence: int
    digest: int
    armed: tuple[Sequence[Extent], HostBuffer, bool] | None = None

    def raise_flag(self) -> None:
        self.flags[self.flag] = self.sequence

    def poll(self) -> int | None:
        return self.digest if int(self.flags[self.flag]) >= self.sequence else None


class MappedShmRing:
    def __init__(self, memory: HostBuffer, flags: HostBuffer) -> None:
        self._memory, self._flags = memory, flags.view(np.uint64)
        self.is_closed = False

    def slot(self, lease: Lease) -> ShmSlot:
        if lease.offset + lease.nbytes > len(self._memory) - NONCE_BYTES or lease.flag >= FLAGS:
            raise ValueError(f"{lease} of a ring of {len(self._memory)} B")
        view = self._memory[lease.offset : lease.offset + lease.nbytes]
        return ShmSlot(DeviceBuffer(view.ctypes.data, lease.nbytes, self), view)

    def is_filled(self, lease: Lease) -> bool:
        return int(self._flags[lease.flag]) >= lease.sequence

    def close(self) -> None:
        assert not self.is_closed, "closed twice"
        self.is_closed = True


class ShmKvPool:
    """A `DevicePool` and `LendingStager`. With `is_slow` a gather's flag goes up when `finish` is called."""

    name = "cuda_ipc(shared memory)"
    is_on_device = False

    def __init__(self, layout: KvLayout, layers: Sequence[HostBuffer], staging_bytes: int = 64 << 20) -> None:
        self.layout = layout
        self.arrays = list(layers)
        self._inner = HostKvPool(msgspec.structs.replace(layout, digest="xxh3"), layers)
        self.blocks = self._inner.blocks
        self.staging_bytes, self.message_bytes_max = staging_bytes, staging_bytes
        self._arena = Arena(staging_bytes)
        self._pages, self._flag_pages = SharedPages(staging_bytes + NONCE_BYTES), SharedPages(FLAGS * 8)
        self._flags = self._flag_pages.array.view(np.uint64)
        self._sequences = itertools.count(1)
        self.nonce = os.urandom(NONCE_BYTES)
        self._pages.array[staging_bytes:] = np.frombuffer(self.nonce, np.uint8)
        self.refusal = ""  # why this process cannot map others'
        self.is_slow = False
        self.armed = 0  # and neither launched nor disarmed
        self.gathering: list[ShmTicket] = []
        self.scattering: list[ShmTicket] = []
        self.mapped: list[MappedShmRing] = []
        self.on_gathered: Callable[[HostBuffer], None] = lambda view: None

    def finish(self) -> None:
        """What was begun is through."""
        for ticket in (*self.gathering, *self.scattering):
            ticket.raise_flag()
        self.gathering.clear()
        self.scattering.clear()

    # `Stager`.

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        if not on_device:
            return HostSlot(np.empty(nbytes, np.uint8))
        offset = self._arena.reserve(nbytes)
        if offset is None:
            return None
        view = self._pages.array[offset : offset + nbytes]
        return ShmSlot(DeviceBuffer(self._pages.address + offset, nbytes, self), view, offset)

    def release(self, slot: Slot) -> None:
        if isinstance(slot, ShmSlot):
            self._arena.release(slot.offset)

    @property
    def free_bytes(self) -> int:
        return self._arena.free_bytes

    def prepare(self, extents: Sequence[Extent]) -> None:
        pass

    def gather(self, extents: Sequence[Extent], slot: Slot, *, stream: object | None = None) -> ShmTicket:
        return self.launch(self.arm(extents, slot, is_gather=True))

    def arm(self, extents: Sequence[Extent], slot: Slot, *, is_gather: bool) -> ShmTicket:
        ticket = self._ticket(0)
        ticket.armed = extents, _view(slot), is_gather
        self.armed += 1
        return ticket

    def launch(self, ticket: Ticket, *, stream: object | None = None) -> ShmTicket:
        assert isinstance(ticket, ShmTicket)
        assert ticket.armed, "launched twice"
        (extents, view, is_gather), ticket.armed = ticket.armed, None
        self.armed -= 1
        if is_gather:
            self._inner.pack(extents, view)
        else:
            self._inner.unpack(extents, view)
        ticket.digest = host_digest(view)
        if is_gather:
            self.on_gathered(view)
        self._begin(ticket, self.gathering if is_gather else self.scattering)
        return ticket

    def disarm(self, ticket: Ticket) -> None:
        assert isinstance(ticket, ShmTicket)
        assert ticket.armed, "launched already"
        ticket.armed = None
        self.armed -= 1
        ticket.raise_flag()

    def scatter(self, extents: Sequence[Extent], slot: Slot) -> ShmTicket:
        return self.launch(self.arm(extents, slot, is_gather=False))

    def _ticket(self, digest: int) -> ShmTicket:
        sequence = next(self._sequences)
        return ShmTicket(self._flags, sequence % FLAGS, sequence, digest)

    def _begin(self, ticket: ShmTicket, running: list[ShmTicket]) -> None:
        if self.is_slow:
            running.append(ticket)
        else:
            ticket.raise_flag()

    def bind_thread(self) -> None:
        pass

    def fence(self) -> None:
        pass

    def close(self) -> None:
        pass

    # `LendingStager` and `Ring`.

    def ring(self) -> ShmKvPool:
        return self

    @property
    def words(self) -> bytes:
        return self.nonce

    @property
    def fds(self) -> list[int]:
        return [self._pages.fd, self._flag_pages.fd]

    def lease(self, buffer: Buffer, ticket: Ticket | None) -> Lease:
        offset = buffer.address - self._pages.address if isinstance(buffer, DeviceBuffer) else -1
        if not 0 <= offset < self.staging_bytes:
            raise TypeError("this link moves no device memory but that of the ring")
        if ticket is None:
            return Lease(buffer.nbytes, offset, 0, 0)
        assert isinstance(ticket, ShmTicket)
        return Lease(buffer.nbytes, offset, ticket.flag, ticket.sequence)

    def map(self, words: bytes, fds: Sequence[int]) -> MappedShmRing:
        try:
            memory, flags = (map_shared(fd) for fd in fds)
        except ValueError as error:
            raise TransportUnavailable(str(error)) from error
        finally:
            for fd in fds:
                os.close(fd)
        if self.refusal:
            raise TransportUnavailable(self.refusal)
        if memory[-NONCE_BYTES:].tobytes() != words:
            raise TransportUnavailable("what was mapped is not the peer's memory")
        self.mapped.append(MappedShmRing(memory, flags))
        return self.mapped[-1]

    def warm_up(self) -> ShmTicket:
        ticket = self._ticket(0)
        self._begin(ticket, self.scattering)
        return ticket

    def copy(self, slot: Slot, buffers: Sequence[Buffer]) -> ShmTicket:
        (target,) = buffers
        view = _view(slot)
        if isinstance(target, DeviceBuffer):
            start = target.address - self._pages.address
            target = self._pages.array[start : start + target.nbytes]
        target[:] = view
        ticket = self._ticket(host_digest(view))
        self._begin(ticket, self.scattering)
        return ticket


def _view(slot: Slot) -> HostBuffer:
    if isinstance(slot, HostSlot):
        return slot.buffer
    assert isinstance(slot, ShmSlot)
    return slot.view


def make_shm_pool(
    layout: KvLayout, blocks: int, seed: int | None = None, *, staging_bytes: int = 64 << 20
) -> ShmKvPool:
    """Random bytes from `seed`; zeros without one."""
    rng = np.random.default_rng(seed)
    layers = []
    for layer in range(len(layout.layers)):
        shape = (blocks, layout.block_bytes(layer))
        layers.append(np.zeros(shape, np.uint8) if seed is None else rng.integers(0, 256, shape, np.uint8))
    return ShmKvPool(msgspec.structs.replace(layout, digest="weighted"), layers, staging_bytes)
