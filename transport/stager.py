"""Staging: what lies between paged KV in GPU memory and a link, which moves one contiguous run of bytes at a time.

A message's blocks are gathered into a slot before a link sends it, and scattered out of a slot after a link filled it; both
passes compute the message's digest on the way. `gpu.pool.CudaKvPool` is the stager of NVIDIA GPUs.

Between two processes of one host a stager may lend its slots: the other one maps the whole ring once and scatters straight
out of it, so that nothing is copied in between (`links/ring_link.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from .base import Buffer, Done, Extent, HostBuffer


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

    def prepare(self, extents: Sequence[Extent]) -> None:
        """A message of just this object will be moved: work out beforehand how, where that takes time."""

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


RING_WORDS_MAX = 512


class Lease(NamedTuple):
    """Where in a ring a message lies, and how a reader sees that it is there."""

    nbytes: int
    offset: int
    flag: int  # a word of the ring's flags, ...
    sequence: int  # ... which is at least this when the message has been gathered


class MappedRing(Protocol):
    """Another process's ring, mapped here. It can be read from, never written to."""

    def slot(self, lease: Lease) -> Slot:
        """For `Stager.scatter`. Raises ValueError for what the ring does not have; the other methods expect that it has."""

    def is_filled(self, lease: Lease) -> bool:
        """Whether it was gathered; 0.2 us, no call of the device."""

    def close(self) -> None:
        """Unmap it. No kernel may read it any more; once."""


class Ring(Protocol):
    """A stager's staging memory, as other processes of this host may map it."""

    @property
    def name(self) -> str:
        """What moves the bytes: "cuda_ipc"."""

    @property
    def is_on_device(self) -> bool: ...

    @property
    def words(self) -> bytes:
        """What the other side's `map` needs, at most `RING_WORDS_MAX` bytes."""

    @property
    def fds(self) -> Sequence[int]:
        """Descriptors that go with the words."""

    def lease(self, buffer: Buffer, ticket: Ticket | None) -> Lease:
        """Of a slot's buffer; `ticket` is its gather, None: the bytes are there. Raises TypeError for other memory."""

    def map(self, words: bytes, fds: Sequence[int]) -> MappedRing:
        """Map a ring and prove that it can be read (milliseconds; any thread). Takes the descriptors.

        Raises TransportUnavailable with the reason.
        """

    def warm_up(self) -> Ticket:
        """Give the device something to do: the first launch after a pause takes 100 us longer than the next one."""

    def copy(self, slot: Slot, buffers: Sequence[Buffer]) -> Ticket:
        """Copy a mapped slot into memory of the same length."""


@runtime_checkable
class LendingStager(Stager, Protocol):
    """A stager whose device slots other processes can map."""

    def arm(self, extents: Sequence[Extent], slot: Slot, *, is_gather: bool) -> Ticket:
        """All of a `gather` or `scatter` but its launch. Raises as they do."""

    def launch(self, ticket: Ticket, *, stream: object | None = None) -> Ticket:
        """Launch it, once, as `gather` or `scatter` do; the ticket that speaks when it is through."""

    def disarm(self, ticket: Ticket) -> None:
        """It will not be launched."""

    def ring(self) -> Ring:
        """Always the same. Raises TransportUnavailable with the reason why they cannot."""


class Reader(Protocol):
    """Reads one lent slot into memory of ours: `arm`, then `launch` or `cancel`."""

    def arm(self, slot: Slot) -> None:
        """It will lie there."""

    def launch(self) -> Ticket | None:
        """It is there; None: no room for it now, ask again. Raises TransportError, RuntimeError, and is over then."""

    def cancel(self) -> None:
        """It will not come."""


@runtime_checkable
class LendingLink(Protocol):
    """A link whose receiver reads the sender's slots in place. A message that was lent must be borrowed.

    An empty message with the tag of one that was lent takes the offer back: its receive ends with an error, if it is not
    being read already.
    """

    def lend(self, tag: int, slot: Slot, ticket: Ticket, done: Done) -> None:
        """Offer a message that is, or will be, gathered; the slot must not change until `done`. Raises LinkLost."""

    def go(self, tags: Sequence[int]) -> None:
        """Those that were lent are being gathered now: the peer wakes up and watches them. Raises LinkLost."""

    def borrow(
        self,
        tag: int,
        nbytes: int,
        reader: Reader,
        done: Callable[[BaseException | None, int], None],
    ) -> None:
        """Receive one: when it is there it is read, and when that is through `done` is called with the digest.

        `done` comes once, with an error when it was not read or may be incomplete; from then on nothing is written.
        Raises LinkLost.
        """
