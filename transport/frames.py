"""The frames of a link's control channel, and the only place where bytes from a peer become values.

Both sides say `Hello` first. The prefill side claims, the decode side grants; every frame after a grant names the
link-unique `transfer`. Frames of one link arrive in order; KV messages may overtake them or be overtaken.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import xxhash

from .base import HandoffKey
from .errors import TransportError
from .layout import GROUPS_MAX, KvShape

FRAME_BYTES_MAX = 1 << 20
_DIGEST_BYTES = 8
LAYERS_MAX = 1 << 10
CHUNKS_MAX = 1 << 12
TRANSFERS_MAX = (1 << 18) - 1
PROBE_TRANSFER = TRANSFERS_MAX  # the one number of 18 bits that no transfer has: the tags of probes
PROBE_MESSAGES_MAX = 1 << 10
PROBE_MESSAGE_BYTES_MAX = 16 << 20
MESSAGES_MAX = LAYERS_MAX
BLOCKS_MAX = 1 << 24
TOKENS_MAX = 1 << 24

RefuseReason = Literal[
    "unknown_token", "spent_token", "stale_attempt", "wrong_epoch", "fingerprint", "busy", "bad_claim", "closing"
]
ProbeRefuseReason = Literal["busy", "no_room", "wrong_epoch", "bad_probe"]
CancelReason = Literal["cancelled", "timeout", "replaced", "digest", "protocol", "closing"]

Token = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Count = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
TransferNumber = Annotated[int, msgspec.Meta(ge=0, lt=TRANSFERS_MAX)]
ChunkNumber = Annotated[int, msgspec.Meta(ge=0, lt=CHUNKS_MAX)]
Fingerprint = Annotated[str, msgspec.Meta(min_length=32, max_length=32)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
Digests = Annotated[bytes, msgspec.Meta(max_length=8 * LAYERS_MAX)]


class BadFrame(TransportError):
    """A peer sent bytes that are no frame of this protocol; the link is dropped."""


class _Frame(msgspec.Struct, frozen=True, array_like=True, tag_field="frame"):
    pass


class WireKey(msgspec.Struct, frozen=True, array_like=True):
    """A `HandoffKey` as it travels, with its limits checked."""

    token: Token
    attempt: Number
    delivery: Number

    @classmethod
    def of(cls, key: HandoffKey) -> WireKey:
        return cls(key.token, key.attempt, key.delivery)

    @property
    def key(self) -> HandoffKey:
        return HandoffKey(self.token, self.attempt, self.delivery)


class Hello(_Frame, frozen=True, tag="hello"):
    """Either side, first on every link: who is talking."""

    protocol: Number
    worker: Text
    nonce: Token
    fingerprint: Fingerprint
    epoch: Number
    shape: KvShape


class Claim(_Frame, frozen=True, tag="claim"):
    """Prefill to decode: I compute this prompt; may I write its KV?"""

    key: WireKey
    tokens: Count  # of the whole prompt
    fingerprint: Fingerprint
    decode_epoch: Number


class Grant(_Frame, frozen=True, tag="grant"):
    """Decode to prefill: send each group's tokens from its first up to `end_token`, with tags of `transfer`."""

    key: WireKey
    transfer: TransferNumber
    first_tokens: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=GROUPS_MAX)]
    end_token: Count


class Refuse(_Frame, frozen=True, tag="refuse"):
    """Decode to prefill: not you, not now, or not this."""

    key: WireKey
    reason: RefuseReason


class Landed(_Frame, frozen=True, tag="landed"):
    """Decode to prefill: every block is here and verified. Also the answer to a claim of what has landed before."""

    key: WireKey


class ChunkStart(_Frame, frozen=True, tag="chunk_start"):
    """Prefill to decode: these tokens come, so many layers to a message (an empty message if I give up)."""

    transfer: TransferNumber
    chunk: ChunkNumber
    first_token: Count
    end_token: Count
    layers_per_message: Annotated[int, msgspec.Meta(ge=1, le=LAYERS_MAX)]


class ChunkDone(_Frame, frozen=True, tag="chunk_done"):
    """Prefill to decode: the digest of each message, little-endian u64 in their order."""

    transfer: TransferNumber
    chunk: ChunkNumber
    digests: Digests


class Done(_Frame, frozen=True, tag="done"):
    """Prefill to decode: there are no more chunks."""

    transfer: TransferNumber


class Failed(_Frame, frozen=True, tag="failed"):
    """Prefill to decode: I give up; no message that I did not announce will come, the announced ones all come."""

    key: WireKey
    reason: Text


class CancelTransfer(_Frame, frozen=True, tag="cancel"):
    """Decode to prefill: stop writing and tell me when you have. After `digest` you may claim again."""

    transfer: TransferNumber
    reason: CancelReason


class Drained(_Frame, frozen=True, tag="drained"):
    """Prefill to decode: all announced messages of this transfer have been sent; nothing more will come."""

    transfer: TransferNumber


class Keepalive(_Frame, frozen=True, tag="keepalive"):
    """Either side, every half second while a hand-off is open on this link: I am here, it just takes time."""


class Probe(_Frame, frozen=True, tag="probe"):
    """Prefill to decode: I measure this link; take so many messages into scratch memory (none: only answer)."""

    serial: Number  # echoed in the answers; a probe is a run of these frames with growing numbers, then `ProbeEnd`
    decode_epoch: Number
    messages: Annotated[int, msgspec.Meta(ge=0, le=PROBE_MESSAGES_MAX)]
    message_bytes: Annotated[int, msgspec.Meta(ge=0, le=PROBE_MESSAGE_BYTES_MAX)]


class ProbeReady(_Frame, frozen=True, tag="probe_ready"):
    """Decode to prefill: send them now, with the tags of probes."""

    serial: Number


class ProbeRefused(_Frame, frozen=True, tag="probe_refused"):
    """Decode to prefill: not now; nothing was posted."""

    serial: Number
    reason: ProbeRefuseReason


class ProbeDone(_Frame, frozen=True, tag="probe_done"):
    """Decode to prefill: all of them are here, whole."""

    serial: Number


class ProbeEnd(_Frame, frozen=True, tag="probe_end"):
    """Prefill to decode: I have measured; the scratch memory is free when what was announced has come."""


Frame = (
    Hello
    | Claim
    | Grant
    | Refuse
    | Landed
    | ChunkStart
    | ChunkDone
    | Done
    | Failed
    | CancelTransfer
    | Drained
    | Keepalive
    | Probe
    | ProbeReady
    | ProbeRefused
    | ProbeDone
    | ProbeEnd
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """One frame as bytes for `Link.send_control`: its digest, then itself."""
    body = _encoder.encode(frame)
    return xxhash.xxh3_64_digest(body) + body


def decode(payload: bytes) -> Frame:
    """Raises BadFrame for anything that is not exactly one frame within the limits, as it was sent."""
    if len(payload) > FRAME_BYTES_MAX:
        raise BadFrame(f"control frame of {len(payload)} B; at most {FRAME_BYTES_MAX}")
    body = payload[_DIGEST_BYTES:]
    # One wrong bit in a number, and both sides would wait for each other until the hand-off's deadline.
    if payload[:_DIGEST_BYTES] != xxhash.xxh3_64_digest(body):
        raise BadFrame(f"control frame of {len(payload)} B with a wrong digest")
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(f"bad control frame of {len(payload)} B: {error}") from error


TAG_BITS = 40
