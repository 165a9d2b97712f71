"""One pool's staging memory, lent to other processes of this host: exported once, mapped once by each of them.

On a GPU it is an allocation's CUDA IPC handle; where kernels are interpreted, an anonymous file. What is mapped is proven by a
number that its owner wrote there and says: a kernel must find it, over NVLink where the ring is another GPU's.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Callable, Sequence

from ..base import Buffer, DeviceBuffer, HostBuffer
from ..errors import TransportError, TransportUnavailable
from ..host_memory import map_shared
from ..stager import Lease, Slot, Ticket
from . import driver
from .digest import host_digest
from .mover import Mover
from .slots import NONCE_BYTES, ForeignSlot, Staging, copy_bytes
from .tickets import GpuTicket

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

log = logging.getLogger(__name__)
_CHECK_S = 1.0
_ALIGN_BYTES = 16  # of a slot, for the kernels
# Process, GPU (its UUID; zeros: host memory), handle, where the ring begins there, its bytes, where the nonce is, the nonce.
_WORDS = struct.Struct(f"<Q16s{driver.HANDLE_BYTES}sQQQ{NONCE_BYTES}s")
_HOST = bytes(16)


class MappedGpuRing:
    """Implements `stager.MappedRing`."""

    def __init__(self, address: int, nbytes: int, flags: HostBuffer, owner: Callable[[], None] | HostBuffer) -> None:
        """`owner` unmaps the ring, or is its memory."""
        self._address, self._nbytes = address, nbytes
        self._flags = flags.data.cast("Q")
        self._owner: Callable[[], None] | HostBuffer | None = owner
        self.device = torch.device("cpu")

    def slot(self, lease: Lease) -> ForeignSlot:
        is_inside = lease.nbytes <= self._nbytes and lease.offset <= self._nbytes - lease.nbytes
        if not is_inside or lease.offset % _ALIGN_BYTES or lease.flag >= len(self._flags):
            raise ValueError(f"{lease.nbytes} B from byte {lease.offset} on are not a slot of a ring of {self._nbytes}")
        return ForeignSlot(self._address + lease.offset, lease.nbytes, self, self.device)

    def is_filled(self, lease: Lease) -> bool:
        return self._flags[lease.flag] >= lease.sequence

    def close(self) -> None:
        owner, self._owner = self._owner, None
        if callable(owner):
            owner()


class GpuRing:
    """Implements `stager.Ring` for the device slots of one pool."""

    name = "cuda_ipc"

    def __init__(self, staging: Staging, mover: Mover, stream: int, enter: Callable[[], None]) -> None:
        """`stream` is the CUDA handle of the one that reads; `enter` makes the calling thread's device the pool's."""
        self._staging = staging
        self._mover = mover
        self._stream = stream
        self._enter = enter
        self._device: torch.device = staging.memory.device
        self.is_on_device = self._device.type == "cuda"
        number = os.urandom(NONCE_BYTES)
        nonce = torch.frombuffer(bytearray(number), dtype=torch.uint8)
        staging.memory[staging.nonce_offset :].copy_(nonce)
        gpu, handle, first = _HOST, bytes(driver.HANDLE_BYTES), 0
        if self.is_on_device:
            torch.cuda.synchronize(self._device)
            gpu = bytes.fromhex(str(torch.cuda.get_device_properties(self._device).uuid).replace("-", ""))
            handle, first = driver.export(staging.address)
        self.words = _WORDS.pack(os.getpid(), gpu, handle, first, staging.memory.nbytes, staging.nonce_offset, number)
        if mover.tickets.pages is None:
            raise TransportUnavailable("the CUDA driver does not write to memory that other processes can map")
        flags = mover.tickets.pages.fd
        self.fds = [flags] if staging.pages is None else [flags, staging.pages.fd]

    def lease(self, buffer: Buffer, ticket: Ticket | None) -> Lease:
        offset = buffer.address - self._staging.address if isinstance(buffer, DeviceBuffer) else -1
        if not 0 <= offset <= self._staging.memory.nbytes - buffer.nbytes:
            raise TypeError("this link moves no device memory but slots of the ring that it has mapped")
        if ticket is None:
            return Lease(buffer.nbytes, offset, 0, 0)
        assert isinstance(ticket, GpuTicket)
        return Lease(buffer.nbytes, offset, ticket.flag, ticket.sequence)

    def map(self, words: bytes, fds: Sequence[int]) -> MappedGpuRing:
        try:
            self._enter()
            pid, gpu, handle, first, nbytes, nonce_offset, number = _WORDS.unpack(words)
            files = [map_shared(fd) for fd in fds]
            if gpu == _HOST:
                flags, memory = files
                mapped = MappedGpuRing(memory.ctypes.data, min(nbytes, memory.nbytes), flags, memory)
            else:
                (flags,) = files
                mapped = self._map_gpu(pid, handle, first, nbytes, flags)
            mapped.device = self._device
        except (ValueError, struct.error) as error:
            raise TransportUnavailable(f"not a ring of this version: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        try:
            self._check(mapped.slot(Lease(NONCE_BYTES, nonce_offset, 0, 0)), number)
        except BaseException:  # Whatever it was, nobody else knows of the mapping.
            mapped.close()
            raise
        return mapped

    def _map_gpu(self, pid: int, handle: bytes, first: int, nbytes: int, flags: HostBuffer) -> MappedGpuRing:
        if not self.is_on_device:
            raise TransportUnavailable("its KV is in GPU memory, this process's is not")
        if pid == os.getpid():
            raise TransportUnavailable("a process cannot map its own GPU memory")
        base = driver.open_handle(handle)

        def unmap() -> None:
            try:
                self._enter()
                driver.close_handle(base)
            except TransportError as error:  # The device has failed: there is nothing to unmap any more.
                log.warning("did not unmap another process's GPU memory: %s", error)

        return MappedGpuRing(base + first, nbytes, flags, unmap)

    def _check(self, slot: ForeignSlot, number: bytes) -> None:
        """Raises TransportUnavailable when a kernel does not find the number there."""
        ticket = self._mover.digest(slot.address, NONCE_BYTES, self._stream)
        deadline = time.monotonic() + _CHECK_S
        while (found := ticket.poll()) is None:
            if time.monotonic() > deadline:
                raise TransportUnavailable(f"a kernel did not read the mapped memory in {_CHECK_S:.0f} s")
            time.sleep(50e-6)
        if found != host_digest(number):
            raise TransportUnavailable("what was mapped is not the peer's memory")

    def warm_up(self) -> GpuTicket:
        return self._mover.digest(self._staging.address + self._staging.nonce_offset, NONCE_BYTES, self._stream)

    def copy(self, slot: Slot, buffers: Sequence[Buffer]) -> GpuTicket:
        (target,) = buffers
        assert isinstance(slot, ForeignSlot)
        assert isinstance(target, DeviceBuffer)
        copy_bytes(target.address, slot.address, target.nbytes, self._stream)
        return self._mover.digest(target.address, target.nbytes, self._stream)
