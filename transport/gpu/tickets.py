"""Messages under way on the GPU: a cell and a flag for each, and pinned memory for its lists of blocks.

The flags lie in memory that other processes can map (`ring.py`): who reads a slot of ours sees itself when it is filled. Of one
flag's messages each has a larger sequence than the one before it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import TransportError, TransportUnavailable
from ..host_memory import SharedPages
from . import driver
from .arena import Arena
from .kernel import Report

if TYPE_CHECKING:
    from .mover import Armed

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error

log = logging.getLogger(__name__)
CELLS = 1024  # 32 KiB of device memory; more messages than any link keeps under way
_CELL_BYTES = 32  # a memory sector each, so that atomics of two messages do not meet
_FLAG_WORDS = 8  # a cache line each: sequence, digest
_WAIT_S = 10.0  # for a cell, when all are taken: a GPU that finishes nothing for so long is broken


class GpuTicket:
    """One message's gather or scatter. `poll` reads pinned memory: 0.2 us, no CUDA call."""

    __slots__ = ("_digest", "_flag", "_owner", "_sequence", "_words", "armed", "cell", "table")

    def __init__(self, owner: Tickets, cell: int, table: int | None, sequence: int) -> None:
        self._owner = owner
        self._words = owner.flag_words
        self._flag = cell * _FLAG_WORDS
        self._sequence = sequence
        self._digest: int | None = None
        self.armed: Armed | None = None  # what is to be launched
        self.cell = cell
        self.table = table  # first byte of its part of the table

    @property
    def flag(self) -> int:
        """The word that the last program raises."""
        return self._flag

    @property
    def first_word(self) -> int:
        """Of its part of the table."""
        return (self.table or 0) // 8

    @property
    def sequence(self) -> int:
        """What the last program writes into the flag; unique and never 0."""
        return self._sequence

    def poll(self) -> int | None:
        """The digest once everything has moved, else None. Any thread."""
        if self._digest is None and self._words[self._flag] == self._sequence:
            self._owner.finish(self)
        return self._digest

    def settle(self) -> bool:
        """Keep the digest before the cell is reused; False when another thread did. Under the owner's lock."""
        if self._digest is not None:
            return False
        self._digest = self._words[self._flag + 1]
        return True


class Tickets:
    """Hands out cells, flags and parts of a pinned table, and takes them back when their message is through.

    Synchronise the device once before the first launch: the cells are zeroed on the current stream.
    """

    def __init__(self, device: torch.device, table_words: int) -> None:
        is_cuda = device.type == "cuda"
        self._cells = torch.zeros(CELLS * _CELL_BYTES // 8, dtype=torch.int64, device=device)
        self.pages: SharedPages | None = SharedPages(CELLS * _FLAG_WORDS * 8)  # the flags, if others can map them
        self._table = torch.zeros(table_words, dtype=torch.int64, pin_memory=is_cuda)
        self.flag_words = self.pages.array.data.cast("Q")
        self._cells_at: int = self._cells.data_ptr()
        self._flags_at = self.pages.address
        if is_cuda:
            self._register(self.pages)
        self._table_at: int = self._table.data_ptr()
        self.table: npt.NDArray[np.int64] = self._table.numpy()
        self._arena = Arena(table_words * 8, align_bytes=64)
        self._free = list(range(CELLS))
        self._running: dict[int, GpuTicket] = {}  # by cell
        self._sequences = itertools.count(1)
        self._lock = threading.Lock()

    def _register(self, pages: SharedPages) -> None:
        """Have the GPU write to these pages, or else to pinned memory that is ours alone."""
        try:
            self._flags_at = driver.register(pages.address, pages.array.nbytes)
        except driver.DriverError as error:
            log.warning("no other process can wait for this GPU's messages: %s", error)
            flags = torch.zeros(CELLS * _FLAG_WORDS, dtype=torch.int64, pin_memory=True)
            self.pages, self._flags_at = None, flags.data_ptr()
            self.flag_words = memoryview(flags.numpy()).cast("B").cast("Q")  # Holds the memory.

    def take(self, table_words: int) -> GpuTicket:
        """A ticket with room for so many words in the table. Waits only when 1024 messages are under way.

        Raises TransportError when the GPU then finishes none of them for 10 s, ValueError when the table is too small.
        """
        if table_words > len(self.table):
            raise ValueError(f"{table_words} blocks in one message; the table holds {len(self.table)}")
        ticket = self._try_take(table_words)
        if ticket is not None:
            return ticket
        deadline = time.monotonic() + _WAIT_S
        while True:
            self.reap()
            ticket = self._try_take(table_words)
            if ticket is not None:
                return ticket
            if time.monotonic() > deadline:
                raise TransportError(f"none of {len(self._running)} messages finished on the GPU in {_WAIT_S:.0f} s")
            time.sleep(50e-6)  # About what a large message takes.

    def _try_take(self, table_words: int) -> GpuTicket | None:
        with self._lock:
            if not self._free:
                return None
            table = self._arena.reserve(table_words * 8) if table_words else None
            if table is None and table_words:
                return None
            ticket = GpuTicket(self, self._free.pop(), table, next(self._sequences))
            self._running[ticket.cell] = ticket
            return ticket

    def report(self, ticket: GpuTicket, programs: int) -> Report:
        """What the ticket's launches need to know."""
        flag = self._flags_at + ticket.cell * _FLAG_WORDS * 8
        return Report(self._cells_at + ticket.cell * _CELL_BYTES, programs, flag, ticket.sequence)

    def table_address(self, word: int) -> int:
        """Where the GPU finds a word of the table."""
        return self._table_at + word * 8

    def finish(self, ticket: GpuTicket) -> None:
        """The ticket's flag is up: take its cell and table back, once."""
        with self._lock:
            if not ticket.settle():
                return
            del self._running[ticket.cell]
            self._free.append(ticket.cell)
            if ticket.table is not None:
                self._arena.release(ticket.table)

    def cancel(self, ticket: GpuTicket) -> None:
        """It will not be launched: its flag says that it is through."""
        ticket.armed = None
        self.flag_words[ticket.flag + 1] = 0
        self.flag_words[ticket.flag] = ticket.sequence
        ticket.poll()

    def lose(self, ticket: GpuTicket) -> None:
        """A launch failed: what the ticket holds may still be counted on by an earlier one, so nobody gets it again."""
        with self._lock:
            self._running.pop(ticket.cell, None)

    def reap(self) -> int:
        """Take back what is through though nobody polled it; how many are still under way."""
        for ticket in list(self._running.values()):
            ticket.poll()
        return len(self._running)

    def close(self) -> None:
        """No kernel raises a flag any more."""
        if self.pages is not None and self._table.is_pinned():
            driver.unregister(self.pages.address)
            self.pages = None
