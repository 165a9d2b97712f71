"""Staging: what lies between paged KV in GPU memory and a link, which moves one contiguous run of bytes at a time.

A message's blocks are gathered into a slot before a link sends it, and scattered out of a slot after a link filled it; both
passes compute the message's digest on the way. `gpu.pool.CudaKvPool` is the stager of NVIDIA GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .base import Buffer, Extent, HostBuffer


class Slot(Protocol):
    """Staging memory for one message."""

    @property
    def buffer(self) -> Buffer:
        """Exactly as long as was asked for: what a link sends or fills."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """Plain memory for one message."""

    buffer: HostBuffer


class Ticket(Protocol):
    """A gather or scatter under way."""

    def poll(self) -> int | None:
        """The digest (64 bits) of the message's bytes once all of them have moved, else None. Never blocks; any thread."""


class Stager(Protocol):
    """Gathers and scatters the blocks of one KV pool. Every method but `fence` may be called on any thread."""

    @property
    def message_bytes_max(self) -> int:
        """A slot is never larger."""

    @property
    def staging_bytes(self) -> int:
        """Of each kind of memory, device and host."""

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        """A slot, or None when there is no room now; `on_device` False: host memory, for links that take no other."""

    def release(self, slot: Slot) -> None:
        """Give a slot back; memory that a kernel still uses is reused only after it. Once for each slot."""

    def gather(self, extents: Sequence[Extent], slot: Slot, *, stream: object | None = None) -> Ticket:
        """Copy these blocks into the slot, in this order, on the compute stream that is given or after the last `fence`.

        Raises ValueError when the slot is not exactly as long as the extents, IndexError for a block outside of the pool.
        """

    def scatter(self, extents: Sequence[Extent], slot: Slot) -> Ticket:
        """Copy the slot's bytes into these blocks. They are written before the digest is known: publish them only after."""

    def bind_thread(self) -> None:
        """The calling thread makes links for this memory: choose its device."""

    def fence(self) -> None:
        """What the current stream was given so far comes before later gathers. On the thread that drives that stream."""

    def close(self) -> None:
        """Wait for what runs (bounded) and give the memory back; no slot may be used after it."""
