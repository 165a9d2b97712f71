"""Between instructions and links: how the bytes of a message get from a pool to a link and back, with their digest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from .base import Done, Extent, HandoffKey, Link, Place
from .errors import LinkLost
from .frames import PROBE_TRANSFER
from .handoff import MessageId
from .pool import HostKvPool
from .stager import HostSlot, Slot

Extents = tuple[Extent, ...]
OnDigest = Callable[[int], None]
DIGEST_INLINE_BYTES = 2 << 20  # 0.1-0.4 ms; more goes to a thread, which holds no GIL meanwhile
_TRANSFER_SHIFT, _CHUNK_SHIFT = 22, 10


class Mover(Protocol):
    """Every call on the endpoint's loop; each `done` and `on_digest` comes exactly once, also when the link is gone."""

    def plan(self, link: Link, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        """These will be sent when their layers are computed."""

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        """From any thread: so far these layers of what is planned for these keys are on a device's stream, the last one now."""

    def start(self, key: HandoffKey, layers: frozenset[int]) -> None:
        """These layers are in memory. Before the machine is told: what can be launched at once is."""

    def skip(self, message: MessageId) -> None:
        """A planned message is given up: an empty one goes in its place."""

    def forget(self, key: HandoffKey) -> None:
        """Nothing more is sent of this key."""

    def send(
        self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done, on_digest: OnDigest
    ) -> None:
        """The blocks are read until both have come."""

    def receive(self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        """After `done` without an error `digest` must follow."""

    def digest(self, message: MessageId, extents: Extents, on_digest: OnDigest) -> None:
        """Of a message that was received; when it comes, the bytes are in the blocks."""

    def drop(self, link: Link) -> None:
        """The link is lost: what was not yet given to it ends now."""

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        """Scratch memory of the kind that this mover's messages come from; None: no room now."""

    def release(self, slot: Slot) -> None:
        """No message uses it any more."""

    def close(self) -> None:
        """No call is under way any more."""


def tag_of(message: MessageId) -> int:
    """The link tag of a message: 18 + 12 + 10 bits."""
    assert max(message.transfer >> 18, message.chunk >> 12, message.number >> 10) == 0, message
    return message.transfer << _TRANSFER_SHIFT | message.chunk << _CHUNK_SHIFT | message.number


@runtime_checkable
class DigestingLink(Protocol):
    """A link that brings the bytes into host memory itself, and so can digest them while they are in the cache."""

    makes_digests: bool  # may be set until a receive is posted

    def received_digest(self, tag: int) -> int | None:
        """xxh3-64 of a message, within its `done`."""


def probe_tag(number: int) -> int:
    """The link tag of a probe's message, which no hand-off has: its transfer number is never given out."""
    assert number >> _TRANSFER_SHIFT == 0, number
    return PROBE_TRANSFER << _TRANSFER_SHIFT | number


class DirectMover:
    """Host memory, whole blocks: the link reads and writes the pool itself."""

    def __init__(self, pool: HostKvPool) -> None:
        self._pool = pool
        self._digests: dict[MessageId, int] = {}  # that links made, until they are asked for
        self._digesting: dict[Link, DigestingLink | None] = {}  # isinstance of a protocol takes 10 us
        self._loop = asyncio.get_running_loop()
        self._digesters = ThreadPoolExecutor(2, "kv-digest")  # Starts its threads on first use.

    def plan(self, link: Link, messages: Sequence[tuple[MessageId, Extents, int]]) -> None:
        pass

    def gather_ahead(self, keys: Iterable[HandoffKey], layers: Sequence[int], stream: object) -> None:
        pass

    def start(self, key: HandoffKey, layers: frozenset[int]) -> None:
        pass

    def skip(self, message: MessageId) -> None:
        pass

    def forget(self, key: HandoffKey) -> None:
        pass

    def send(
        self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done, on_digest: OnDigest
    ) -> None:
        try:
            link.post_send(tag_of(message), self._pool.buffers(extents), done)
        except LinkLost as error:
            done(error)
        if nbytes <= DIGEST_INLINE_BYTES:  # The link's next turn comes first: the peer reads meanwhile.
            self._loop.call_soon(self._digest, extents, nbytes, on_digest)
        else:
            self._digest(extents, nbytes, on_digest)

    def receive(self, link: Link, message: MessageId, extents: Extents, nbytes: int, done: Done) -> None:
        buffers = self._pool.buffers(extents)
        tag = tag_of(message)
        digesting = self.digesting(link)

        def received(error: BaseException | None) -> None:
            if error is None and digesting and (digest := digesting.received_digest(tag)) is not None:
                self._digests[message] = digest
            done(error)

        try:
            if digesting:
                digesting.makes_digests = True
            link.post_receive(tag, Place(nbytes, lambda: buffers), received)
        except LinkLost as error:
            done(error)

    def digest(self, message: MessageId, extents: Extents, on_digest: OnDigest) -> None:
        if message in self._digests:
            on_digest(self._digests.pop(message))
            return
        sizes = (len(extent.block_ids) * self._pool.layout.block_bytes(extent.layer) for extent in extents)
        self._digest(extents, sum(sizes), on_digest)

    def drop(self, link: Link) -> None:
        self._digesting.pop(link, None)

    def digesting(self, link: Link) -> DigestingLink | None:
        """The link, if it is one of those."""
        if link not in self._digesting:
            self._digesting[link] = link if isinstance(link, DigestingLink) else None
        return self._digesting[link]

    def reserve(self, nbytes: int, *, on_device: bool) -> Slot | None:
        return HostSlot(np.empty(nbytes, np.uint8))

    def release(self, slot: Slot) -> None:
        pass

    def close(self) -> None:
        self._digesters.shutdown(wait=True)

    def _digest(self, extents: Extents, nbytes: int, on_digest: OnDigest) -> None:
        if nbytes <= DIGEST_INLINE_BYTES:
            on_digest(self._pool.digest(extents))
            return

        def home(future: Future[int]) -> None:
            self._loop.call_soon_threadsafe(on_digest, future.result())

        self._digesters.submit(self._pool.digest, extents).add_done_callback(home)
