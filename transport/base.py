"""The contracts of the data plane: a pool of KV blocks, a link between two processes, and what a hand-off is.

A link moves two things: small control frames (ordered, typed, `frames.py`) and messages of KV bytes, each sent from
and received into lists of host buffers that the caller names. A message's bytes go straight into the posted buffers.
`tests/transport/test_link_contract.py` is what every link owes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from .layout import KvLayout


@dataclass(frozen=True, slots=True)
class DeviceBuffer:
    """A contiguous run of GPU memory. Only a link with `moves_device_memory` takes it."""

    address: int
    nbytes: int
    owner: object  # keeps the memory alive


Buffer = npt.NDArray[np.uint8] | DeviceBuffer
"""A contiguous run of bytes; a view, never a copy."""
HostBuffer = npt.NDArray[np.uint8]
Done = Callable[[BaseException | None], None]
"""Called once, on the loop: None when all bytes have moved; else why not, and from then on the buffers are safe."""
ControlHandler = Callable[[bytes], None]
LostHandler = Callable[[Exception], None]


@dataclass(frozen=True, slots=True)
class Cut:
    """Some tokens and heads of the blocks of an `Extent`, in canonical order (K/V, token, head, dim)."""

    first_token: int  # within the first block
    tokens: int
    first_head: int  # of this rank's heads
    heads: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Blocks of one layer, as they lie in one pool."""

    layer: int
    block_ids: tuple[int, ...]
    cut: Cut | None = None  # None: the blocks' own bytes, whole


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message goes. Asked for when the message begins to arrive, so that who waits holds no memory."""

    nbytes: int
    take: Callable[[], Sequence[Buffer] | None]  # None: no room yet; `Link.retry_receives` says when to ask again

    @classmethod
    def of(cls, buffers: Sequence[Buffer]) -> Place:
        """These buffers, whenever it comes."""
        return cls(sum(buffer.nbytes for buffer in buffers), lambda: buffers)


class KvPool(Protocol):
    """The KV cache of one worker. Blocks are numbered 0..blocks-1 alike in every layer."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def blocks(self) -> int: ...


class Link(Protocol):
    """A connection to one peer process. All calls on the loop that made it."""

    @property
    def peer(self) -> str:
        """The other side, for logs: "ucx://127.0.0.1:4000"."""

    @property
    def transport(self) -> str:
        """What really moves the bytes, as far as it can be known: "tcp", "ucx(sysv,cma,tcp)", "inproc"."""

    @property
    def moves_device_memory(self) -> bool:
        """Whether it takes a `DeviceBuffer` at a device's speed (UCX with CUDA IPC or RDMA on both sides)."""

    @property
    def bytes_received(self) -> int:
        """Grows while bytes arrive, as far as can be seen: a slow peer is not a hung one."""

    def send_control(self, payload: bytes) -> None:
        """Queue one control frame of at most 1 MiB; delivered in order or the link is lost. Raises LinkLost."""

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        """Send one message of KV bytes; the buffers must not change until `done`. Raises LinkLost."""

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        """Receive the message with `tag` (any order) into the place; its length must be the place's. Raises LinkLost."""

    def retry_receives(self) -> None:
        """A place that had no room may have some now."""

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        """Begin to deliver. `on_lost` is called once, after every outstanding `done`."""

    async def abort(self) -> None:
        """Drop the link now. When this returns every `done` was called and the peer can write nothing more here."""

    async def aclose(self) -> None:
        """Send what is queued (bounded by one second), then `abort`."""


class Listener(Protocol):
    """Where peers connect."""

    @property
    def address(self) -> str:
        """What a peer passes to `connect`: "tcp://127.0.0.1:4000"."""

    async def aclose(self) -> None: ...


class Transport(Protocol):
    """One way to make links. One instance per process and loop; links of one instance share its progress engine."""

    scheme: str

    async def start(self) -> None:
        """Raises TransportUnavailable with the reason."""

    async def listen(self, host: str, on_link: Callable[[Link], None]) -> Listener:
        """Accept on a free port; `on_link` gets each link before it delivers (call its `start`)."""

    async def connect(self, address: str, *, timeout_s: float) -> Link:
        """Raises LinkLost when nobody answers in time, ValueError when the address is not of this scheme."""

    async def aclose(self) -> None: ...


class HandoffKey(msgspec.Struct, frozen=True, array_like=True):
    """One try at one hand-off. Order: a larger (attempt, delivery) of the same token replaces a smaller one."""

    token: bytes  # 16 random bytes from the router
    attempt: int  # router-issued
    delivery: int  # of the prefill job by the queue, from 1


class GroupBlocks(NamedTuple):
    """Blocks of one KV group of a prompt: logical blocks `first_block`, `first_block + 1`, ... lie in `block_ids`."""

    first_block: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Expectation:
    """Decode side: KV that somebody will bring, and where it goes.

    Of group g the tokens from `groups[g].first_block` (what lies before is here already, or out of its window) up to
    `end_token` are wanted, and the blocks are exactly theirs.
    """

    token: bytes
    attempt: int
    groups: tuple[GroupBlocks, ...]
    end_token: int
    timeout_s: float  # until it must have landed, however often the sender changes


@dataclass(frozen=True, slots=True)
class ReceiveEnd:
    """Decode side: the expectation is over and no writer can touch its blocks any more."""

    token: bytes
    is_landed: bool  # every wanted token of every layer is here and every digest fits
    good_token: int  # the wanted tokens before this one are complete and verified in all layers
    kv_bytes: int  # received
    reason: str = (
        ""  # when not landed: "timeout", "cancelled", "digest", "sender_failed", "link_lost", "stalled", "closing"
    )


@dataclass(frozen=True, slots=True)
class SendOrder:
    """Prefill side: where a prompt's KV goes."""

    key: HandoffKey
    addresses: tuple[str, ...]  # of the decode worker, best first
    decode_epoch: int
    fingerprint: str
    tokens: int  # of the whole prompt; what decode does not want of it is not sent
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prefill side: tokens that the engine computes in one forward pass, and the blocks that hold them.

    `end_token` is a multiple of every group's block, or the prompt's end. A group may lack its first blocks (out of
    its window already); its last block is that of `end_token`.
    """

    first_token: int
    end_token: int
    groups: tuple[GroupBlocks, ...]


@dataclass(frozen=True, slots=True)
class SendReleased:
    """Prefill side: nothing reads this key's source blocks any more. Comes exactly once for each opened key."""

    key: HandoffKey


@dataclass(frozen=True, slots=True)
class SendEnd:
    """Prefill side: the hand-off is over. Comes exactly once for each opened key."""

    key: HandoffKey
    is_landed: bool
    kv_bytes: int
    reason: str = ""  # "refused:<why>", "cancelled", "link_lost", "timeout", "aborted", "missing_blocks", "closing"


class HandoffEndpointLike(Protocol):
    """One process's side of every hand-off (`endpoint.HandoffEndpoint`). All calls and callbacks on its own loop."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where prefill workers connect, best first; empty when it does not listen."""

    async def start(self) -> None: ...

    async def aclose(self) -> None: ...

    # decode side
    def expect(self, expectation: Expectation, on_end: Callable[[ReceiveEnd], None]) -> None:
        """Grant the blocks to whoever claims the token. `on_end` comes exactly once."""

    def cancel(self, token: bytes) -> None:
        """Give up; `on_end` follows as soon as the blocks are safe. Unknown tokens are ignored."""

    # prefill side
    def open(self, order: SendOrder, on_event: Callable[[SendReleased | SendEnd], None]) -> None:
        """Connect and claim; chunks may be announced at once and are sent when granted."""

    def announce(self, key: HandoffKey, chunk: Chunk) -> None:
        """A forward pass for these blocks begins; they must stay until SendReleased."""

    def layer_ready(self, key: HandoffKey, layer: int) -> None:
        """The announced chunk's KV of that layer is in memory (layers may come in any order)."""

    def layers_ready(self, key: HandoffKey, layers: Iterable[int]) -> None:
        """Several layers of one chunk at once (at least one)."""

    def abort(self, key: HandoffKey, reason: str) -> None:
        """There will be no more chunks; SendReleased and SendEnd follow."""
