"""KV blocks in GPU memory, and staging memory beside them: a `KvPool` and a `Stager` in one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..base import Buffer, DeviceBuffer, Extent
from ..errors import TransportError, TransportUnavailable
from ..layout import KvLayout
from ..stager import Slot
from .arena import Arena
from .cuts import BlockShape, cut_view, gather_cut, gather_whole, scatter_cut, scatter_whole
from .digest import host_digest
from .kernel import INTERPRETED, Cutting, Kernels, Where, cut_programs, digest_programs, move_programs
from .tickets import GpuTicket, Tickets

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

__all__ = ["MESSAGE_BYTES_MAX", "CudaKvPool", "StagingSlot", "host_digest"]

MESSAGE_BYTES_MAX = 16 << 20  # the shortest time on NVLink: a message costs the busier side about 20 us
_TABLE_WORDS_MIN = 1 << 16  # 512 KiB: 64 messages of 16 KiB blocks
_KNOWN_IDS_MAX = 64  # lists of block ids kept as arrays: layers of one group have the same
_CLOSE_S = 10.0


class StagingSlot:
    """Staging memory for one message. `view` is the same bytes as a torch tensor (uint8), pinned when on the host."""

    __slots__ = ("_address", "buffer", "offset", "staging", "ticket", "view")

    def __init__(self, staging: _Staging, offset: int, nbytes: int) -> None:
        self.staging = staging
        self.offset = offset
        self.view: torch.Tensor = staging.memory[offset : offset + nbytes]
        self._address = staging.address + offset
        self.buffer: Buffer = (
            DeviceBuffer(self._address, nbytes, self.view)
            if staging.on_device
            else staging.array[offset : offset + nbytes]
        )
        self.ticket: GpuTicket | None = None  # the last gather or scatter

    @property
    def address(self) -> int:
        """As the GPU sees it (pinned host memory has the same address there)."""
        return self._address

    @property
    def is_in_use(self) -> bool:
        """Whether a kernel may still read or write it."""
        return self.ticket is not None and self.ticket.poll() is None


class _Staging:
    """One allocation that slots are cut from."""

    def __init__(self, nbytes: int, device: torch.device, *, on_device: bool) -> None:
        self.on_device = on_device
        self.arena = Arena(nbytes)
        is_cuda = device.type == "cuda"
        # A multiple of 16 B is read at once; the arena's alignment is the memory's own.
        if on_device:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.array: npt.NDArray[np.uint8] = np.empty(0, np.uint8) if on_device else self.memory.numpy()
        self.address: int = self.memory.data_ptr()
        if on_device and is_cuda and _is_expandable(self.address):
            raise TransportUnavailable(
                "staging memory came from expandable segments, which no other process can open; "
                "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
            )


class _Layer(NamedTuple):
    rows: torch.Tensor
    address: int
    stride_bytes: int
    block_bytes: int


class _Pass:
    """One launch."""

    __slots__ = ("block_bytes", "blocks", "cutting", "extents", "nbytes", "programs")

    def __init__(self, block_bytes: int, cutting: Cutting | None) -> None:
        self.block_bytes = block_bytes
        self.cutting = cutting
        self.blocks = self.extents = self.nbytes = self.programs = 0


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
        self._shapes = [BlockShape.of(layout, layer) for layer in range(len(layers))]
        self._blocks = len(layers[0])
        self._device: torch.device = layers[0].device
        self._is_cuda = self._device.type == "cuda"
        if not self._is_cuda and not INTERPRETED:
            raise TransportUnavailable(
                f"KV is on {self._device}; the kernels run on CUDA, or anywhere with TRITON_INTERPRET=1"
            )
        self._thread = threading.local()
        self._enter_device()
        sizes = [layer.block_bytes for layer in self._layers]
        self._message_bytes_max = min(MESSAGE_BYTES_MAX, staging_bytes)
        self._kernels = Kernels(sizes)
        table_words = max(_TABLE_WORDS_MIN, 2 * self._message_bytes_max // min(sizes))
        self._tickets = Tickets(self._device, table_words)
        self._staging_bytes = staging_bytes
        self._device_staging: _Staging | None = _Staging(staging_bytes, self._device, on_device=True)
        self._host_staging: _Staging | None = None
        self._parked: list[StagingSlot] = []  # given back while a kernel used them
        self._known_ids: dict[int, tuple[tuple[int, ...], npt.NDArray[np.int64]]] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        # Gathers and scatters apart: a gather behind a fence must not hold up what has arrived.
        self._gathers, self._scatters = (self._new_stream() for _ in range(2))
        self._fence = torch.cuda.Event() if self._is_cuda else None
        self._fences = self._fences_seen = 0

    @property
    def layout(self) -> KvLayout:
        return self._layout

    @property
    def blocks(self) -> int:
        return self._blocks

    @property
    def message_bytes_max(self) -> int:
        """16 MiB, or all of the staging memory when that is less."""
        return self._message_bytes_max

    @property
    def staging_bytes(self) -> int:
        """Of device memory, and of host memory once that is asked for."""
        return self._staging_bytes

    def reserve(self, nbytes: int, *, on_device: bool) -> StagingSlot | None:
        """A slot, or None when there is no room now. The first one in host memory pins it (about 50 ms)."""
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
        if own.is_in_use:
            with self._lock:
                self._parked.append(own)
            return
        own.staging.arena.release(own.offset)

    def gather(self, extents: Sequence[Extent], slot: Slot, *, stream: object | None = None) -> GpuTicket:
        """Copy these blocks into the slot on `stream` (a `torch.cuda.Stream`), else after the last `fence`."""
        if stream is None and self._gathers is not None:
            stream = self._gathers
            fences = self._fences
            if fences != self._fences_seen:
                self._gathers.wait_event(self._fence)
                self._fences_seen = fences
        return self._move(extents, _own(slot), stream, is_gather=True)

    def scatter(self, extents: Sequence[Extent], slot: Slot) -> GpuTicket:
        """Copy the slot's bytes into these blocks, on a stream of its own.

        With `verifies_blocks` the digest is that of the blocks, read back.
        """
        ticket = self._move(extents, _own(slot), self._scatters, is_gather=False)
        if self._verifies_blocks:
            ticket = self._move(extents, _own(slot), self._scatters, is_gather=True)
        return ticket

    def bind_thread(self) -> None:
        """The calling thread's current device becomes this pool's: UCX opens its CUDA transports there."""
        self._enter_device()

    def fence(self) -> None:
        """Later gathers wait for what the current stream was given so far (an event is recorded: 1-2 us)."""
        if self._fence is not None:
            self._fence.record(torch.cuda.current_stream(self._device))
            self._fences += 1

    def close(self) -> None:
        """Wait for what runs and free the staging memory. Raises TransportError when the GPU does not finish in 10 s.

        The memory then stays taken: a kernel may still write to it.
        """
        self._is_closed = True
        deadline = time.monotonic() + _CLOSE_S
        while self._tickets.reap():
            if time.monotonic() > deadline:
                raise TransportError(f"{self._tickets.reap()} messages did not finish on the GPU in {_CLOSE_S:.0f} s")
            time.sleep(50e-6)
        with self._lock:
            self._parked.clear()
            self._device_staging = self._host_staging = None

    def _move(
        self, extents: Sequence[Extent], slot: StagingSlot, stream: object | None, *, is_gather: bool
    ) -> GpuTicket:
        if self._is_closed:
            raise TransportError("this KV pool's staging memory is closed")
        self._enter_device()
        passes = self._passes(extents)
        if passes is None:
            return self._move_by_torch(extents, slot, stream, is_gather=is_gather)
        nbytes = programs = blocks = 0
        for item in passes:
            blocks += item.blocks
            nbytes += item.nbytes
            programs += item.programs
        _check_slot(slot, nbytes)
        ticket = self._tickets.take(blocks)
        try:
            self._fill_table(ticket, extents)
            slot.ticket = ticket
            report = self._tickets.report(ticket, programs)
            handle, table, staged = _handle(stream), self._tickets.table_address(ticket), slot.address
            for item in passes:
                where = Where(handle, table, staged, (staged - slot.address) // 8)
                if item.cutting is None:
                    self._kernels.move(where, report, item.block_bytes, item.blocks, is_gather=is_gather)
                else:
                    self._kernels.move_cut(where, report, item.cutting, item.extents, is_gather=is_gather)
                table += item.blocks * 8
                staged += item.nbytes
        except BaseException:
            self._tickets.lose(ticket)
            raise
        return ticket

    def _passes(self, extents: Sequence[Extent]) -> list[_Pass] | None:
        """One launch for neighbouring extents of one block size, or of one cut. None: torch must do it."""
        passes: list[_Pass] = []
        last: _Pass | None = None
        for extent in extents:
            layer, count, cutting = self._layers[extent.layer], len(self._ids(extent.block_ids)), None
            if extent.cut is None:
                nbytes, programs = count * layer.block_bytes, move_programs(layer.block_bytes, count)
            else:
                shape = self._shapes[extent.layer]
                nbytes = shape.cut_bytes(extent.cut, count)
                if not shape.is_for_the_kernel:
                    return None
                cutting = shape.cutting(extent.cut, count)
                programs = cut_programs(cutting)
            if last is None or last.block_bytes != layer.block_bytes or last.cutting != cutting:
                last = _Pass(layer.block_bytes, cutting)
                passes.append(last)
            last.blocks += count
            last.nbytes += nbytes
            last.programs += programs
            last.extents += 1
        return passes

    def _fill_table(self, ticket: GpuTicket, extents: Sequence[Extent]) -> None:
        """The address of every block, in order, for the kernels to read."""
        table = self._tickets.table
        at = (ticket.table or 0) // 8
        for extent in extents:
            layer, ids = self._layers[extent.layer], self._ids(extent.block_ids)
            part = table[at : at + len(ids)]
            np.multiply(ids, layer.stride_bytes, out=part)
            part += layer.address
            at += len(ids)

    def _move_by_torch(
        self, extents: Sequence[Extent], slot: StagingSlot, stream: object | None, *, is_gather: bool
    ) -> GpuTicket:
        """A message with cuts that the kernel does not take: torch moves all of it, then a kernel reads the slot."""
        sizes = [self._extent_bytes(extent) for extent in extents]
        _check_slot(slot, sum(sizes))
        with torch.cuda.stream(stream):  # None changes nothing.
            offset = 0
            for extent, nbytes in zip(extents, sizes, strict=True):
                self._move_extent(extent, slot.view[offset : offset + nbytes], offset, is_gather=is_gather)
                offset += nbytes
        ticket = self._tickets.take(0)
        try:
            slot.ticket = ticket
            report = self._tickets.report(ticket, digest_programs(offset))
            self._kernels.digest(_handle(stream), slot.address, offset, report)
        except BaseException:
            self._tickets.lose(ticket)
            raise
        return ticket

    def _move_extent(self, extent: Extent, staged: torch.Tensor, offset: int, *, is_gather: bool) -> None:
        rows, ids = self._layers[extent.layer].rows, self._ids(extent.block_ids)
        if extent.cut is None:
            (gather_whole if is_gather else scatter_whole)(rows, ids, staged)
            return
        view = cut_view(rows, self._shapes[extent.layer], ids, extent.cut, slot_offset=offset)
        (gather_cut if is_gather else scatter_cut)(view, staged)

    def _extent_bytes(self, extent: Extent) -> int:
        if extent.cut is None:
            return len(extent.block_ids) * self._layers[extent.layer].block_bytes
        return self._shapes[extent.layer].cut_bytes(extent.cut, len(extent.block_ids))

    def _ids(self, block_ids: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """The ids as an array, checked. Raises IndexError."""
        known = self._known_ids.get(id(block_ids))
        if known is not None and known[0] is block_ids:
            return known[1]
        ids = np.fromiter(block_ids, np.int64, len(block_ids))
        # A negative one is huge as an unsigned one.
        if not len(ids) or ids.view(np.uint64).max() >= self._blocks:
            raise IndexError(
                f"blocks {min(block_ids, default=0)}..{max(block_ids, default=0)} of a pool of {self._blocks}"
            )
        if len(self._known_ids) >= _KNOWN_IDS_MAX:
            self._known_ids = {}
        self._known_ids[id(block_ids)] = (block_ids, ids)  # Held, so that its id stays its own.
        return ids

    def _pinned_staging(self) -> _Staging | None:
        with self._lock:
            if self._host_staging is None and not self._is_closed:
                self._enter_device()
                self._host_staging = _Staging(self._staging_bytes, self._device, on_device=False)
            return self._host_staging

    def _unpark(self) -> None:
        with self._lock:
            parked, self._parked = self._parked, []
            for slot in parked:
                if slot.is_in_use:
                    self._parked.append(slot)
                else:
                    slot.staging.arena.release(slot.offset)

    def _enter_device(self) -> None:
        """A thread's first call: CUDA calls go to the current device, and a new thread's is the first one."""
        if self._is_cuda and not getattr(self._thread, "has_entered", False):
            torch.cuda.set_device(self._device)
            self._thread.has_entered = True

    def _new_stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.Stream(self._device, priority=-1) if self._is_cuda else None


def _checked(layout: KvLayout, layers: Sequence[torch.Tensor]) -> list[_Layer]:
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
        checked.append(_Layer(rows, rows.data_ptr(), rows.stride(0), block_bytes))
    return checked


def _own(slot: Slot) -> StagingSlot:
    if not isinstance(slot, StagingSlot):
        raise TypeError(f"{type(slot).__name__} is not a slot of this pool")
    return slot


def _handle(stream: object | None) -> int:
    return stream.cuda_stream if isinstance(stream, torch.cuda.Stream) else 0


def _check_slot(slot: StagingSlot, nbytes: int) -> None:
    if slot.buffer.nbytes != nbytes:
        raise ValueError(f"extents of {nbytes} B for a slot of {slot.buffer.nbytes}")


def _is_expandable(address: int) -> bool:
    return any(
        segment.get("is_expandable", False)
        and segment["address"] <= address < segment["address"] + segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
    )
