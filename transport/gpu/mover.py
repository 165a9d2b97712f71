"""Carries a message between blocks and a slot: lists on the device, launches in order, a ticket for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

from ..base import Extent
from ..errors import TransportUnavailable
from .cuts import cut_view, gather_cut, gather_whole, scatter_cut, scatter_whole
from .kernel import Kernels, Launch, Listed, Report, Staged, Whole, digest_programs
from .lists import BlockLists, ListRing, ListRings
from .passes import Layer, Pass, plan
from .slots import ForeignSlot, StagingSlot
from .tickets import GpuTicket, Tickets

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

_LIST_WORDS_MIN = 1 << 16  # 512 KiB pinned, and for each stream on the device: 64 messages of 16 KiB blocks
_PLANS_MAX = 4096
_LENT_BYTES_MAX, _LENT_BLOCK_BYTES = 64 << 20, 1 << 10
_LAYER_BYTES = 16  # address and stride
AnySlot = StagingSlot | ForeignSlot


class Plan(NamedTuple):
    """The launches of a message, and what they come to."""

    passes: list[Pass]
    nbytes: int
    programs: int
    list_words: int


class Armed(NamedTuple):
    """A message that is to be launched. Without passes, torch moves it."""

    extents: Sequence[Extent]
    slot: AnySlot
    plan: Plan
    report: Report
    is_gather: bool


class _Queue(NamedTuple):
    """Where a message's launches go."""

    stream: int
    ring: ListRing | None
    ticket: GpuTicket
    report: Report


class Mover:
    """Gathers and scatters for one pool. Thread-safe, on threads whose current device is the pool's.

    Synchronise the device once before the first message: what is on it is written on the current stream.
    """

    def __init__(self, layers: Sequence[Layer], blocks: int, message_bytes_max: int) -> None:
        device: torch.device = layers[0].rows.device
        sizes = [layer.block_bytes for layer in layers]
        # A peer's message may be longer than ours (`movers.LENT_BYTES_MAX`).
        lent_words = 2 * _LENT_BYTES_MAX // max(_LENT_BLOCK_BYTES, min(sizes))
        list_words = max(_LIST_WORDS_MIN, lent_words, 2 * message_bytes_max // min(sizes))
        self._layers = layers
        self._kernels = Kernels(sizes)
        self.tickets = Tickets(device, list_words)
        self._rings = ListRings(device, list_words)
        # Where each layer lies; the last one is for lists of addresses.
        places = [(layer.address, layer.stride_bytes) for layer in layers]
        self._places = torch.tensor([*places, (0, 1)], dtype=torch.int64).to(device)
        self._places_at: int = self._places.data_ptr()
        self._lists = BlockLists(blocks)
        self._plans: dict[int, tuple[Sequence[Extent], Plan | None]] = {}  # by id() of the extents, which are held

    def move(self, extents: Sequence[Extent], slot: AnySlot, stream: object | None, *, is_gather: bool) -> GpuTicket:
        """Queue a message on the stream. Raises ValueError or IndexError for what does not fit, before anything moves."""
        ticket = self.arm(extents, slot, is_gather=is_gather)
        self.launch(ticket, stream)
        return ticket

    def arm(self, extents: Sequence[Extent], slot: AnySlot, *, is_gather: bool) -> GpuTicket:
        """All of `move` but the launch, on any stream. Raises as it does."""
        kept = self._plans.pop(id(extents), None)
        found = kept[1] if kept is not None and kept[0] is extents else self._plan(extents)
        if found is None:
            sizes = [self._layers[extent.layer].extent_bytes(extent) for extent in extents]
            found = Plan([], sum(sizes), digest_programs(sum(sizes)), 0)
        _check_slot(slot, found.nbytes)
        ticket = slot.ticket = self.tickets.take(found.list_words)
        ticket.armed = Armed(extents, slot, found, self.tickets.report(ticket, found.programs), is_gather)
        return ticket

    def launch(self, ticket: GpuTicket, stream: object | None) -> None:
        """Of what was armed, once."""
        armed, ticket.armed = ticket.armed, None
        assert armed, "launched twice"
        try:
            if armed.plan.passes:
                handle = _handle(stream)
                ring = self._rings.of(handle)
                with nullcontext() if ring is None else ring.lock:
                    self._launch(armed, _Queue(handle, ring, ticket, armed.report))
            else:
                self._launch_by_torch(armed, stream)
        except BaseException:  # Whatever it was, the kernel may or may not run: its cell is not used again.
            self.tickets.lose(ticket)
            raise

    def prepare(self, extents: Sequence[Extent]) -> None:
        """Plan a message that will be moved once. Raises as `move` does."""
        if len(self._plans) >= _PLANS_MAX:  # Of messages that were given up.
            self._plans.clear()
        self._plans[id(extents)] = extents, self._plan(extents)

    def _plan(self, extents: Sequence[Extent]) -> Plan | None:
        """None: torch must move it."""
        lists = [self._lists.of(extent.block_ids) for extent in extents]
        passes = plan(extents, lists, self._layers)
        if passes is None:
            return None
        nbytes, programs, words = (
            sum(item.nbytes for item in passes),
            sum(item.programs for item in passes),
            sum(item.list_words for item in passes),
        )
        return Plan(passes, nbytes, programs, words)

    def _launch(self, armed: Armed, queue: _Queue) -> None:
        slot, is_gather = armed.slot.address, armed.is_gather
        nbytes = words = 0
        for item in armed.plan.passes:
            ids = queue.ring.find(item.shared) if queue.ring is not None else None
            if ids is None:
                ids = self._list(item, words, queue)
                words += item.list_words
            if item.shared is not None:
                listed = Listed(ids, self._place_of(item.layer), item.layer_step * _LAYER_BYTES, 0)
            else:
                listed = Listed(ids, self._place_of(len(self._layers)), 0, item.blocks // len(item.parts))
            launch = Launch(queue.stream, listed, Staged(slot + nbytes, nbytes // 8), queue.report)
            if item.cutting is not None:
                self._kernels.move_cut(launch, item.cutting, len(item.parts), is_gather=is_gather)
            else:  # A list of addresses is one long extent.
                whole = Whole(item.whole_bytes, item.blocks, item.list_words)
                self._kernels.move(launch, whole, is_gather=is_gather)
            nbytes += item.nbytes

    def _place_of(self, layer: int) -> int:
        return self._places_at + layer * _LAYER_BYTES

    def _list(self, item: Pass, word: int, queue: _Queue) -> int:
        """Write a list into the ticket's part of the table, from `word` on; where the kernel reads it."""
        first = queue.ticket.first_word + word
        item.fill(self.tickets.table[first : first + item.list_words], self._layers)
        pinned = self.tickets.table_address(first)
        if queue.ring is None or item.shared is None:
            return pinned  # Nobody will ask for these addresses again.
        address = queue.ring.room(item.list_words)
        self._kernels.fetch(queue.stream, pinned, address, item.list_words)
        queue.ring.keep(item.shared, address)
        return address

    def _launch_by_torch(self, armed: Armed, stream: object | None) -> None:
        """A message with cuts that the kernel does not take: torch moves all of it, then a kernel reads the slot."""
        with torch.cuda.stream(stream):  # None changes nothing.
            offset, view = 0, armed.slot.view
            for extent in armed.extents:
                end = offset + self._layers[extent.layer].extent_bytes(extent)
                self._move_extent(extent, view[offset:end], offset, is_gather=armed.is_gather)
                offset = end
        self._kernels.digest(_handle(stream), armed.slot.address, armed.plan.nbytes, armed.report)

    def digest(self, address: int, nbytes: int, stream: int) -> GpuTicket:
        """Queue a digest of this memory, on the stream with that handle."""
        ticket = self.tickets.take(0)
        try:
            report = self.tickets.report(ticket, digest_programs(nbytes))
            self._kernels.digest(stream, address, nbytes, report)
        except BaseException:  # As above.
            self.tickets.lose(ticket)
            raise
        return ticket

    def _move_extent(self, extent: Extent, staged: torch.Tensor, offset: int, *, is_gather: bool) -> None:
        rows, ids = self._layers[extent.layer].rows, self._lists.of(extent.block_ids).ids
        if extent.cut is None:
            (gather_whole if is_gather else scatter_whole)(rows, ids, staged)
            return
        view = cut_view(rows, self._layers[extent.layer].shape, ids, extent.cut, slot_offset=offset)
        (gather_cut if is_gather else scatter_cut)(view, staged)


def _handle(stream: object | None) -> int:
    if stream is None:
        return 0
    if not isinstance(stream, torch.cuda.Stream):
        raise TypeError(f"a {type(stream).__name__} is not a torch.cuda.Stream")
    handle: int = stream.cuda_stream
    return handle


def _check_slot(slot: AnySlot, nbytes: int) -> None:
    if slot.buffer.nbytes != nbytes:
        raise ValueError(f"extents of {nbytes} B for a slot of {slot.buffer.nbytes}")
