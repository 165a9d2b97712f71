"""Staging memory: what a message is gathered into and scattered from where blocks cannot travel as they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .base import Buffer, Extent, HostBuffer


class Slot(Protocol):
    """Some staging memory, reserved for one message."""

    @property
    def buffer(self) -> Buffer:
        """Exactly as long as was asked for."""


@dataclass(frozen=True, slots=True)
class HostSlot:
    """Plain memory for one message."""

    buffer: HostBuffer


class Ticket(Protocol):
    """A gather or scatter under way."""

    def poll(self) -> int | None:
        """The digest of the message once all of it has been moved, else None. Cheap, from any thread."""


class Stager(Protocol):
    """Moves bytes between the blocks of one pool and slots. Every method from any thread."""

    @property
    def staging_bytes(self) -> int:
        """Of each kind of memory."""

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        """None: no room now. `on_device` False: host memory, for links that cannot move device memory."""

    def release(self, slot: Slot) -> None: ...

    def gather(self, extents: Sequence[Extent], slot: Slot, *, stream: object | None = None) -> Ticket:
        """Blocks to slot, on a device's `stream`; None: on its own, after the last `fence`."""

    def scatter(self, extents: Sequence[Extent], slot: Slot) -> Ticket: ...

    def fence(self) -> None:
        """What was enqueued on the device's current stream until now comes before later gathers."""

    def close(self) -> None: ...
