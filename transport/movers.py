"""Which mover a pool needs, and how large its messages are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm
from typing import Protocol, runtime_checkable

from .base import Done, HandoffKey, KvPool, Link, Transport
from .handoff import MessageId
from .layout import KvShape
from .mover import DirectMover, Extents, Mover, OnDigest
from .poller import Poller
from .pool import HostKvPool
from .stager import LendingLink, LendingStager, Slot, Stager
from .staging import HostStager, StagedMover
from .wire import MessageSizes

CUT_BYTES = 1 << 20  # copied on the loop: 0.3 to 1 ms
HOST_BYTES = 8 << 20  # a run of it costs less in parts whose digests overlap with the next part's way
# A message costs both sides 0.2 ms of CPU together; after the last layer, what is left of so much takes about 1 ms.
COMPUTED_BYTES = 4 << 20
RUN_BYTES = 128 << 10  # shorter runs are put together: each one costs Python 2 us or more on either side
_CUT_SIZES = MessageSizes(CUT_BYTES, CUT_BYTES, CUT_BYTES)
_DEVICE_SIZES = MessageSizes(16 << 20, 4 << 20, 16 << 20)  # NVLink wants 16 MiB a message; reference: docs/transport.md
# A lent slot takes no room on the other side, so its size is the sender's affair; each one costs either side 50-100 us of Python.
LENT_BYTES_MAX = 64 << 20
_BORROWED_SIZES = MessageSizes(LENT_BYTES_MAX, 4 << 20, 16 << 20)


@runtime_checkable
class DevicePool(KvPool, Stager, Protocol):
    """A pool in device memory, which only its own kernels read and write."""


class HostMover:
    """Implements `Mover` for host memory: long runs of blocks directly; cuts and short runs through staging memory."""

    def __init__(self, pool: HostKvPool, staging_bytes: int) -> None:
        self._pool = pool
        self._direct = DirectMover(pool)
        self._staged = StagedMover(HostStager(pool, staging_bytes))
        self._staged_bytes_max = staging_bytes // 4  # of a message of whole blocks: several must be under way
        self._received: dict[MessageId, Mover] = {}  # until their digest is asked for

    def _of(self, link: Link, extents: Extents, nbytes: int) -> Mover:
        if extents[0].cut is not None:
            return self._staged
        if nbytes > self._staged_bytes_max or self._direct.digesting(link):  # Who reads takes blocks where they lie.
            return self._direct
        return self._staged if self._pool.is_scattered(extents, RUN_BYTES) else self._direct

    def plan(self, link: Link, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        if messages[0][1][0].cut is not None:
            self._staged.plan(link, messages)

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        self._staged.gather_ahead(keys, layers, stream)

    def start(self, key: HandoffKey, layers: frozenset[int]) -> None:
        pass

    def skip(self, message: MessageId) -> None:
        pass

    def forget(self, key: HandoffKey) -> None:
        self._staged.forget(key)

    def send(
        self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done, on_digest: OnDigest
    ) -> None:
        self._of(link, extents, nbytes).send(link, message, extents, nbytes, done, on_digest)

    def receive(self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        mover = self._of(link, extents, nbytes)

        def received(error: BaseException | None) -> None:
            if error is None:
                self._received[message] = mover
            done(error)

        mover.receive(link, message, extents, nbytes, received)

    def digest(self, message: MessageId, extents: Extents, on_digest: OnDigest) -> None:
        self._received.pop(message).digest(message, extents, on_digest)

    def drop(self, link: Link) -> None:
        self._staged.drop(link)
        self._direct.drop(link)

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        return self._direct.reserve(nbytes, on_device=on_device)

    def release(self, slot: Slot) -> None:
        self._direct.release(slot)

    def close(self) -> None:
        self._direct.close()
        self._staged.close()


def mover_for(pool: KvPool, staging_bytes: int) -> Mover:
    """On the endpoint's loop; a pool in device memory brings its own staging memory."""
    if isinstance(pool, HostKvPool):
        return HostMover(pool, staging_bytes)
    assert isinstance(pool, DevicePool), f"nothing moves a {type(pool).__name__}"
    if pool.message_bytes_max < _DEVICE_SIZES.bytes_max:
        raise ValueError(
            f"{pool.staging_bytes} B of staging memory are less than a message, {_DEVICE_SIZES.bytes_max} B"
        )
    return StagedMover(pool)


@runtime_checkable
class RingTransport(Protocol):
    """A transport whose links lend slots."""

    def bind(self, stager: LendingStager, poller: Poller) -> None:
        """Before its `start`, which is refused without."""


def _lent_sizes(pool: KvPool) -> MessageSizes:
    """A quarter of a chunk: one is gathered while others are read and on their way back, and each costs 50 us of Python."""
    assert isinstance(pool, DevicePool)
    bytes_max = min(pool.message_bytes_max, max(_DEVICE_SIZES.bytes_max, pool.staging_bytes // 8))
    least = min(bytes_max, _DEVICE_SIZES.bytes_max)
    return MessageSizes(bytes_max, least, least, chunk_parts=4)


def lend_slots(transports: Sequence[Transport], pool: KvPool, mover: Mover) -> None:
    """Give the transports that lend slots this pool's, if it has such."""
    if isinstance(pool, LendingStager) and isinstance(mover, StagedMover):
        for transport in transports:
            if isinstance(transport, RingTransport):
                transport.bind(pool, mover.poller)


def sizes_for(pool: KvPool, theirs: KvShape, link: Link, *, i_send: bool) -> MessageSizes:
    """How large messages are on this link to a rank of this shape; what one side sends the other one takes."""
    layout = pool.layout
    if isinstance(link, LendingLink):
        return _lent_sizes(pool) if i_send else _BORROWED_SIZES
    if layout.digest != "xxh3":
        return _DEVICE_SIZES
    if theirs != layout.shape:
        return _CUT_SIZES
    # A message is one layer of the fewest tokens that whole blocks of all groups have, at the least.
    unit = lcm(*layout.shape.block_tokens)
    least = max(unit // layout.block_tokens(layer) * layout.block_bytes(layer) for layer in range(len(layout.layers)))
    return MessageSizes(bytes_max=max(HOST_BYTES, least), computed_bytes=COMPUTED_BYTES)
