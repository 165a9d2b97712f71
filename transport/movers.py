"""Which mover a pool needs, and how large its messages are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from .base import Done, HandoffKey, KvPool, Link
from .handoff import MessageId
from .layout import KvShape
from .mover import DirectMover, Extents, Mover, OnDigest
from .pool import HostKvPool
from .stager import Slot, Stager
from .staging import HostStager, StagedMover
from .wire import MessageSizes

CUT_BYTES = 1 << 20  # copied on the loop: 0.3 to 1 ms
_HOST_SIZES = MessageSizes()
_CUT_SIZES = MessageSizes(CUT_BYTES, CUT_BYTES, CUT_BYTES)
_DEVICE_SIZES = MessageSizes(16 << 20, 4 << 20, 16 << 20)  # NVLink wants 16 MiB a message; reference: docs/transport.md


@runtime_checkable
class DevicePool(KvPool, Stager, Protocol):
    """A pool in device memory, which only its own kernels read and write."""


class HostMover:
    """Implements `Mover` for host memory: whole blocks directly, cuts through staging memory."""

    def __init__(self, pool: HostKvPool, staging_bytes: int) -> None:
        self._direct = DirectMover(pool)
        self._staged = StagedMover(HostStager(pool, staging_bytes))

    def _of(self, extents: Extents) -> Mover:
        return self._direct if extents[0].cut is None else self._staged

    def plan(self, link: Link, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        self._of(messages[0][1]).plan(link, messages)

    def gather_ahead(self, keys: Iterable[HandoffKey], layer: int, stream: object) -> None:
        self._staged.gather_ahead(keys, layer, stream)

    def forget(self, key: HandoffKey) -> None:
        self._staged.forget(key)

    def send(
        self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done, on_digest: OnDigest
    ) -> None:
        self._of(extents).send(link, message, extents, nbytes, done, on_digest)

    def receive(self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        self._of(extents).receive(link, message, extents, nbytes, done)

    def digest(self, message: MessageId, extents: Extents, on_digest: OnDigest) -> None:
        self._of(extents).digest(message, extents, on_digest)

    def drop(self, link: Link) -> None:
        self._staged.drop(link)

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


def sizes_for(pool: KvPool, theirs: KvShape) -> MessageSizes:
    """How large messages are on a link to a rank of this shape; alike on both sides."""
    if pool.layout.digest != "xxh3":
        return _DEVICE_SIZES
    return _HOST_SIZES if theirs == pool.layout.shape else _CUT_SIZES
