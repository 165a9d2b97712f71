"""KV blocks in GPU memory, and staging memory beside them: a `KvPool` and a `Stager` in one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import cycle

from ..base import Extent
from ..errors import TransportError, TransportUnavailable
from ..layout import KvLayout
from ..stager import Slot, Ticket
from .cuts import BlockShape
from .digest import host_digest
from .kernel import INTERPRETED
from .mover import Armed, Mover
from .passes import Layer
from .ring import GpuRing
from .slots import ForeignSlot, Staging, StagingSlot
from .tickets import GpuTicket

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

__all__ = ["MESSAGE_BYTES_MAX", "CudaKvPool", "StagingSlot", "host_digest"]

MESSAGE_BYTES_MAX = 64 << 20
_SCATTER_STREAMS = 2  # the end of a scatter does not leave the GPU to itself
_CLOSE_S = 10.0


class CudaKvPool:
    """Blocks as rows of uint8 tensors (blocks, block bytes) on one GPU, one tensor a layer; the tensors stay the caller's.

    A row must be contiguous and a multiple of 16 B; rows may lie apart, layers anywhere. The first call compiles two
    kernels for each block size (seconds, once a machine), so make it before the engine serves. `staging_bytes` of device
    memory are taken at once; as many of pinned host memory when a slot is first asked for there.
    """

    def __init__(
        self,
        layout: KvLayout,
        layers: Sequence[torch.Tensor],
        staging_bytes: int,
        *,
        verifies_blocks: bool = False,
    ) -> None:
        if layout.digest != "weighted":
            raise ValueError(f'a KV pool in GPU memory computes the digest "weighted", not {layout.digest!r}')
        self._layout = layout
        self._verifies_blocks = verifies_blocks
        self._layers = _checked(layout, layers)
        self._blocks = len(layers[0])
        self._device: torch.device = layers[0].device
        self._is_cuda = self._device.type == "cuda"
        if not self._is_cuda and not INTERPRETED:
            raise TransportUnavailable(
                f"KV is on {self._device}; the kernels run on CUDA, or anywhere with TRITON_INTERPRET=1"
            )
        self._thread = threading.local()
        self._is_closed = False
        self._enter()
        self._message_bytes_max = min(MESSAGE_BYTES_MAX, staging_bytes)
        self._mover = Mover(self._layers, self._blocks, self._message_bytes_max)
        self._staging_bytes = staging_bytes
        self._device_staging: Staging | None = Staging(staging_bytes, self._device, on_device=True)
        self._host_staging: Staging | None = None
        self._parked: list[StagingSlot] = []  # given back while a kernel used them
        self._lock = threading.Lock()
        # Gathers and scatters apart: a gather behind a fence must not hold up what has arrived.
        self._gathers = self._new_stream()
        self._scatters = cycle([self._new_stream() for _ in range(_SCATTER_STREAMS)])
        self._fence = torch.cuda.Event() if self._is_cuda else None
        self._fences = self._fences_seen = 0
        self._ring: GpuRing | None = None
        if self._is_cuda:
            # What was allocated may still be used by the stream that gave it back, and what was zeroed may not be yet.
            torch.cuda.synchronize(self._device)

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def blocks(self) -> int:
        return self._blocks

    @property
    def message_bytes_max(self) -> int:
        """64 MiB, or all of the staging memory when that is less."""
        return self._message_bytes_max

    @property
    def staging_bytes(self) -> int:
        """Of device memory, and of host memory once that is asked for."""
        return self._staging_bytes

    def reserve(self, nbytes: int, *, on_device: bool) -> StagingSlot | None:
        """A slot, or None when there is no room now. The first one in host memory pins it (64 ms for 128 MiB)."""
        if not 1 <= nbytes <= self._message_bytes_max:
            raise ValueError(f"a slot of {nbytes} B; messages have 1 to {self._message_bytes_max}")
        staging = self._device_staging if on_device else self._pinned_staging()
        if staging is None:
            raise TransportError("this KV pool's staging memory is closed")
        offset = staging.arena.reserve(nbytes)
        if offset is None and self._parked:
            self._unpark()
            offset = staging.arena.reserve(nbytes)
        return None if offset is None else StagingSlot(staging, offset, nbytes)

    def release(self, slot: Slot) -> None:
        """Give a slot back; while a kernel uses it, it waits for that. Raises ValueError the second time."""
        own = _own(slot)
        if own.is_released:
            raise ValueError(f"a slot of {own.buffer.nbytes} B was given back before")
        own.is_released = True
        if own.is_in_use:
            with self._lock:
                self._parked.append(own)
            return
        own.staging.arena.release(own.offset)

    def prepare(self, extents: Sequence[Extent]) -> None:
        """Plan its launches now: 15 to 30 us less when it is moved."""
        self._mover.prepare(extents)

    def gather(self, extents: Sequence[Extent], slot: Slot, *, stream: object | None = None) -> GpuTicket:
        """Copy these blocks into the slot on `stream` (a `torch.cuda.Stream`), else after the last `fence`."""
        return self.launch(self.arm(extents, slot, is_gather=True), stream=stream)

    def arm(self, extents: Sequence[Extent], slot: Slot, *, is_gather: bool) -> GpuTicket:
        """All of a gather, or of a scatter (out of another process's slot, too), but its launch."""
        self._enter()
        source = slot if isinstance(slot, ForeignSlot) and not is_gather else _own(slot)
        return self._mover.arm(extents, source, is_gather=is_gather)

    def disarm(self, ticket: Ticket) -> None:
        """It will not be launched."""
        assert isinstance(ticket, GpuTicket)
        self._mover.tickets.cancel(ticket)

    def launch(self, ticket: Ticket, *, stream: object | None = None) -> GpuTicket:
        """As `gather` and `scatter` do it; the ticket that speaks when it is through."""
        assert isinstance(ticket, GpuTicket)
        assert ticket.armed, "launched twice"
        self._enter()
        if not ticket.armed.is_gather:
            return self._scatter(ticket, ticket.armed)
        if stream is None and self._gathers is not None:
            stream = self._gathers
            fences = self._fences
            if fences != self._fences_seen:
                self._gathers.wait_event(self._fence)
                self._fences_seen = fences
        self._mover.launch(ticket, stream)
        return ticket

    def ring(self) -> GpuRing:
        """The device slots, as other processes of this host can map them. Raises TransportUnavailable."""
        if self._ring is None:
            self._enter()
            assert self._device_staging
            stream = next(self._scatters)
            handle = stream.cuda_stream if stream else 0
            self._ring = GpuRing(self._device_staging, self._mover, handle, self._enter)
        return self._ring

    def scatter(self, extents: Sequence[Extent], slot: Slot) -> GpuTicket:
        """Copy the slot's bytes into these blocks, on a stream where no gather is; in any order with other scatters.

        With `verifies_blocks` the digest is that of the blocks, read back.
        """
        return self.launch(self.arm(extents, slot, is_gather=False))

    def _scatter(self, ticket: GpuTicket, armed: Armed) -> GpuTicket:
        stream = next(self._scatters)
        self._mover.launch(ticket, stream)
        if self._verifies_blocks:
            is_own = isinstance(armed.slot, StagingSlot)
            target = armed.slot if is_own else self._spare(armed.slot.buffer.nbytes, stream)
            ticket = self._mover.move(armed.extents, target, stream, is_gather=True)
        return ticket

    def _spare(self, nbytes: int, stream: torch.cuda.Stream | None) -> ForeignSlot:
        """Memory to verify blocks through; this scatter's stream's own, so it is given back to that alone."""
        with torch.cuda.stream(stream):  # None changes nothing.
            memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        return ForeignSlot(memory.data_ptr(), nbytes, memory, self._device)

    def bind_thread(self) -> None:
        """The calling thread's current device becomes this pool's: UCX opens its CUDA transports there."""
        self._enter()

    def fence(self) -> None:
        """Later gathers wait for what the current stream was given so far (an event is recorded: 4 us)."""
        if self._fence is not None:
            self._fence.record(torch.cuda.current_stream(self._device))
            self._fences += 1

    def close(self) -> None:
        """Wait for what runs and free the staging memory. Raises TransportError when the GPU does not finish in 10 s.

        The memory then stays taken: a kernel may still write to it.
        """
        self._is_closed = True
        deadline = time.monotonic() + _CLOSE_S
        while self._mover.tickets.reap():
            if time.monotonic() > deadline:
                raise TransportError(
                    f"{self._mover.tickets.reap()} messages did not finish on the GPU in {_CLOSE_S:.0f} s"
                )
            time.sleep(50e-6)
        self._mover.tickets.close()
        with self._lock:
            self._parked.clear()
            self._device_staging = self._host_staging = None

    def _pinned_staging(self) -> Staging | None:
        with self._lock:
            if self._host_staging is None and not self._is_closed:
                self._enter()
                self._host_staging = Staging(self._staging_bytes, self._device, on_device=False)
            return self._host_staging

    def _unpark(self) -> None:
        with self._lock:
            parked, self._parked = self._parked, []
            for slot in parked:
                if slot.is_in_use:
                    self._parked.append(slot)
                else:
                    slot.staging.arena.release(slot.offset)

    def _enter(self) -> None:
        """Refuse what comes after `close`. CUDA calls go to the current device, and a new thread's is the first one."""
        if self._is_closed:
            raise TransportError("this KV pool's staging memory is closed")
        if self._is_cuda and not getattr(self._thread, "has_entered", False):
            torch.cuda.set_device(self._device)
            self._thread.has_entered = True

    def _new_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device, priority=-1) if self._is_cuda else None


def _checked(layout: KvLayout, layers: Sequence[torch.Tensor]) -> list[Layer]:
    if len(layers) != len(layout.layers):
        raise ValueError(f"{len(layers)} tensors for {len(layout.layers)} layers")
    checked = []
    for index, rows in enumerate(layers):
        name, block_bytes = layout.layers[index].name, layout.block_bytes(index)
        if rows.dtype != torch.uint8 or tuple(rows.shape) != (len(layers[0]), block_bytes):
            raise ValueError(
                f"layer {name} is {rows.dtype}{tuple(rows.shape)}, not uint8{(len(layers[0]), block_bytes)}"
            )
        if rows.device != layers[0].device:
            raise ValueError(f"layer {name} is on {rows.device}, the first one on {layers[0].device}")
        if rows.stride(1) != 1:
            raise ValueError(f"rows of layer {name} are not contiguous: strides {rows.stride()}")
        if block_bytes % 16 or rows.stride(0) % 16 or rows.data_ptr() % 16:
            raise ValueError(
                f"layer {name}: blocks of {block_bytes} B, {rows.stride(0)} B apart, are not multiples of 16 B"
            )
        shape = BlockShape.of(layout, index)
        checked.append(Layer(rows, rows.data_ptr(), rows.stride(0), block_bytes, shape))
    return checked


def _own(slot: Slot) -> StagingSlot:
    if not isinstance(slot, StagingSlot):
        raise TypeError(f"{type(slot).__name__} is not a slot of this pool")
    return slot
