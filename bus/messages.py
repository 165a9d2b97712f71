"""Every message of the control plane, as data.

Grow by adding a field with a default; never rename, retype or reuse one. A decoder ignores fields it does not know and
raises `msgspec.ValidationError` on a tag it does not know. Token ids travel as packed little-endian int32 (`pack_tokens`).
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from typing import Annotated

import msgspec

from .ids import HandoffToken, RequestId, RouterId, WorkerId

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Ranks = Annotated[int, msgspec.Meta(ge=1, le=1024)]

PROTOCOL_VERSION = 1
"""Grows by one when an older peer could misread what a newer one sends."""


class _Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """Base of every message; `frozen=True` must be repeated on each subclass for the type checkers."""


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Token ids as little-endian int32, 4 bytes each."""
    packed = array.array("i", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(packed: bytes) -> list[int]:
    """The inverse of `pack_tokens`; raises ValueError when the length is no multiple of 4."""
    token_ids = array.array("i")
    token_ids.frombytes(packed)
    if sys.byteorder == "big":
        token_ids.byteswap()
    return token_ids.tolist()


class SamplingParams(_Message, frozen=True):
    """How to choose tokens: the part of an OpenAI request that the engine sees. Stop strings are the router's."""

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 16
    min_tokens: Count = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely ones
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


# ---- registry and load


class WorkerCard(_Message, frozen=True, tag="worker_card"):
    """Worker to routers, in the registry: what does not change while this incarnation lives."""

    worker_id: WorkerId
    role: str  # "prefill" | "decode"
    epoch: int  # random 63 bits, one per incarnation
    model: Name  # the served name
    fingerprint: str  # of model and KV layout; prefill and decode must be equal (transport.KvLayout.fingerprint)
    block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    kv_blocks: Count
    slots: Count  # requests the engine runs at once
    max_model_len: Count  # prompt + output tokens
    handoff_addresses: tuple[str, ...] = ()  # decode only: "ucx://127.0.0.1:1234", best first
    engine: str = ""
    protocol_version: int = PROTOCOL_VERSION
    can_prefill_locally: bool = True  # decode only: computes a prompt itself when told so
    tp_size: Ranks = 1  # that the KV lies in; `handoff_addresses` are those of each rank in turn, equally many


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """Worker to everyone, each 0.5 s and on change: alive, and how busy."""

    worker_id: WorkerId
    epoch: int
    role: str
    running: Count = 0
    waiting: Count = 0
    kv_blocks_free: Count = 0
    kv_event_seq: Count = 0  # the last KvEvents.seq sent
    is_draining: bool = False
    prefill_tokens_per_s: float = 0.0  # measured; 0.0: not known yet
    steps: Count = 0  # that its engine has finished
    due: Count = 0  # requests that only another step can move on
    is_stuck: bool = False  # its engine hangs: the worker leaves, and nothing that runs there will end


class Goodbye(_Message, frozen=True, tag="goodbye"):
    """Worker to everyone: left on purpose, nothing runs here any more."""

    worker_id: WorkerId
    epoch: int


# ---- decode


class DecodeJob(_Message, frozen=True, tag="decode_job"):
    """Router to one decode worker (request/reply): admit this request; the answer is `Admitted` or `Refused`."""

    request_id: RequestId
    attempt: Count
    router_id: RouterId
    stream_id: Count  # the router's own small number for the stream, echoed in every TokenFrame entry
    token_ids: bytes  # pack_tokens
    sampling: SamplingParams
    model: Name
    time_left_s: float  # the deadline, as what is left of it when sent (clocks differ between hosts)
    handoff_token: HandoffToken | None = None  # None: compute the prompt locally
    fingerprint: str = ""  # of the worker the router chose; refused when it is not this worker's
    epoch: int = 0  # of the incarnation the router chose; refused when it is not this one
    prefill_ranks: Ranks = 1  # tensor-parallel ranks of the prefill workers, each of which may send KV


class Admitted(_Message, frozen=True, tag="admitted"):
    """Decode worker to router: the job is held here until its end."""

    request_id: RequestId
    attempt: int


class Refused(_Message, frozen=True, tag="refused"):
    """Decode worker to router: not taken; nothing of it is kept."""

    request_id: RequestId
    attempt: int
    reason: str  # "busy" | "draining" | "stale" | "wrong_worker" | "too_long" | "bad_job"
    detail: str = ""
    retry_after_s: float = 0.0


# ---- prefill


class PrefillJob(_Message, frozen=True, tag="prefill_job"):
    """Router to any prefill worker, over the work queue: compute a prompt's KV and send it to `decode_worker`."""

    request_id: RequestId
    attempt: Count
    router_id: RouterId
    token_ids: bytes  # pack_tokens
    model: Name
    handoff_token: HandoffToken
    decode_worker: WorkerId
    decode_epoch: int
    decode_addresses: tuple[str, ...]
    fingerprint: str
    deadline_unix_s: float  # for prefill workers of older versions, by the router's wall clock
    decode_ranks: Ranks = 1  # that `decode_addresses` are of, each in turn
    prefill_ranks: Ranks = 1  # what the decode worker was told; a prefill worker with others must leave the job
    decode_block_tokens: Count = 0  # of the decode worker's card; 0: unknown
    tenant: str = ""  # who pays for it
    share: float = 1.0  # the tenant's weight against other tenants
    priority: int = 0  # higher goes first
    time_left_s: float = 0.0  # when it was sent; past it the client has gone: drop the job. 0: not told
    sent_s: float = 0.0  # on the router's own clock, as in `PlacedLoad.clock_s`


class PrefillClaimed(_Message, frozen=True, tag="prefill_claimed"):
    """Prefill worker to the owning router: it is mine, at work or next; `ack_subject` lets the router NAK a dead worker's job."""

    request_id: RequestId
    attempt: int
    delivery: int  # 1 for the first delivery by the queue
    worker_id: WorkerId
    epoch: int
    ack_subject: str


class PrefillReturned(_Message, frozen=True, tag="prefill_returned"):
    """Prefill worker to the owning router: given back to the queue, where it waits again."""

    request_id: RequestId
    attempt: int
    worker_id: WorkerId


class PrefillDone(_Message, frozen=True, tag="prefill_done"):
    """Prefill worker to the owning router: the KV has landed and the job is acked."""

    request_id: RequestId
    attempt: int
    delivery: int
    worker_id: WorkerId
    computed_tokens: int
    cached_tokens: int
    kv_bytes: int


class PrefillFailed(_Message, frozen=True, tag="prefill_failed"):
    """Prefill worker (or the queue's watcher) to the owning router: this job will not be done by anyone."""

    request_id: RequestId
    attempt: int
    reason: str  # "exhausted" | "refused" | "bad_job" | "expired"
    detail: str = ""


class LaneLoad(msgspec.Struct, frozen=True, array_like=True):
    """Jobs of one router that wait in one lane of the work queue: nobody has claimed them."""

    jobs: Count
    tokens: Count  # of their prompts
    overdue: Count = (
        0  # jobs that waited long enough for the lane's worker, or whose worker is lost: anyone may take them
    )
    fingerprint: str = ""  # of the KV they need
    ranks: Ranks = 1


class PlacedLoad(_Message, frozen=True, tag="placed_load"):
    """Router to every router and prefill worker, each 0.5 s and on change: the work it has placed and that has not ended."""

    router_id: RouterId
    decode: dict[WorkerId, tuple[int, int]] = {}  # streams, and KV blocks they may need
    lanes: dict[WorkerId, LaneLoad] = {}  # by prefill worker; "": the shared lane
    tenants: dict[str, tuple[int, int]] = {}  # prompt tokens that wait for prefill, and KV blocks
    has_left: bool = False
    clock_s: float = 0.0  # the router's monotonic clock now; 0: not told


class Cancel(_Message, frozen=True, tag="cancel"):
    """Router to every worker: forget every attempt of the request up to `attempt`. Idempotent; may overtake the job."""

    request_id: RequestId
    attempt: int


# ---- tokens

FINISH_NONE, FINISH_STOP, FINISH_LENGTH, FINISH_ERROR, FINISH_CANCELLED = range(5)


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One position: the chosen token's log probability, then the most likely tokens as (token id, log probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class EntryDetail(_Message, frozen=True):
    """What only some entries of a frame carry."""

    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token of the entry
    error_code: str = ""  # with FINISH_ERROR
    error: str = ""
    stop_token: int | None = None  # the token that ended it, when it was a stop token
    computed_tokens: int | None = None  # with the first token: prompt tokens computed by the decode engine
    cached_tokens: int | None = None  # with the first token: prompt tokens it had in its own cache


Entry = tuple[int, int, int, list[int], int]
"""(stream_id, attempt, index of the first token, token ids, FINISH_*)"""


class TokenFrame(msgspec.Struct, frozen=True, array_like=True):
    """Decode worker to one router: everything one engine step made for that router's requests."""

    worker_id: WorkerId
    epoch: int
    entries: list[Entry]
    details: dict[int, EntryDetail] = {}  # by position in `entries`


class ReplayRequest(_Message, frozen=True, tag="replay"):
    """Router to decode worker (request/reply, answered with one TokenFrame): send the entries again, from `first_index`."""

    router_id: RouterId
    request_id: RequestId
    stream_id: int
    attempt: int
    first_index: int


class FinishAck(_Message, frozen=True, tag="finish_ack"):
    """Router to decode worker: these ends arrived, forget the requests. Sent again for an end that comes again."""

    router_id: RouterId
    finished: list[tuple[int, int]]  # (stream_id, attempt)


class Ping(_Message, frozen=True, tag="ping"):
    """Router to worker (request/reply, answered with its Heartbeat): are you there?"""


class Unknown(_Message, frozen=True, tag="unknown"):
    """Worker to router: the request that was asked about is not held here."""

    request_id: RequestId


# ---- KV events


class BlockStored(_Message, frozen=True, tag="block_stored"):
    """Blocks entered the worker's prefix cache, in chain order; hashes are Hocket's own (`block_hash.py`)."""

    hashes: list[int]
    parent: int | None = None  # None: the first block of a prompt


class BlockRemoved(_Message, frozen=True, tag="block_removed"):
    """Blocks left the worker's prefix cache."""

    hashes: list[int]


class AllBlocksCleared(_Message, frozen=True, tag="all_blocks_cleared"):
    """The worker's prefix cache is empty."""


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


class KvEvents(_Message, frozen=True, tag="kv_events"):
    """Worker to routers: what changed in its prefix cache; `seq` counts from 1 without a gap within an epoch."""

    worker_id: WorkerId
    epoch: int
    seq: int
    events: list[KvEvent]


class KvSnapshotRequest(_Message, frozen=True, tag="kv_snapshot_request"):
    """Router to worker (request/reply, answered with KvSnapshot): everything you hold."""


class KvSnapshot(_Message, frozen=True, tag="kv_snapshot"):
    """Worker to router: all hashes held after the event `seq`, packed as little-endian u64."""

    worker_id: WorkerId
    epoch: int
    seq: int
    hashes: bytes
    is_complete: bool = True  # False: cut at the size limit


# ---- hocket doctor


class DescribeHost(_Message, frozen=True, tag="describe_host"):
    """Doctor to worker (request/reply, answered with HostReport): what does your machine look like from inside?"""


class HostFacts(_Message, frozen=True):
    """What decides how two processes can talk, as one of them sees it. None or empty: not known."""

    host_id: str = ""  # of the running kernel; equal on one machine, in every container
    ipc_namespace: str = ""  # shared memory and CUDA IPC need the same one
    pid_namespace: str = ""
    user_id: int = 0
    copy_gb_per_s: float = 0.0  # one memory copy, 32 MiB
    shm_free_bytes: int | None = None  # of /dev/shm
    memlock_bytes: int | None = None  # what may be pinned; None: no limit
    ptrace_scope: int = 0  # above 0 CMA (reading another process's memory) is forbidden
    network_mbit_per_s: dict[str, int] = {}  # line rate by interface, of those that are up and say one
    rdma_devices: tuple[str, ...] = ()
    cuda_devices: int = 0
    transports: str = ""  # as configured: "ucx,tcp"
    ucxx: str = ""  # version of the Python package; "": not installed
    ucx_parts: tuple[str, ...] = ()  # of the libucx that would load: "ib", "cuda", "cma"
    settings: dict[str, str] = {}  # variables that change how UCX or CUDA memory behaves, where set


class HostReport(_Message, frozen=True, tag="host_report"):
    """Worker to doctor."""

    worker_id: WorkerId
    epoch: int
    facts: HostFacts


class ProbeLink(_Message, frozen=True, tag="probe_link"):
    """Doctor to prefill worker (request/reply, answered with LinkReport): measure your link to this decode worker.

    Its addresses are looked up in the registry, so that nobody can make a worker connect to anything else.
    """

    decode_worker: WorkerId
    decode_epoch: int


class RankLink(_Message, frozen=True):
    """One measured link, between one tensor-parallel rank of each worker."""

    from_rank: Count
    to_rank: Count
    address: str  # that was dialled
    transport: str  # "ucx(sysv,tcp)"
    moves_device_memory: bool
    kv_memory: str  # "host" | "device"
    dial_ms: float | None  # None: the link was there
    round_trip_us: float  # of a control frame, median
    rates: tuple[tuple[int, float], ...]  # (message bytes, GB/s), ascending


class LinkReport(_Message, frozen=True, tag="link_report"):
    """Prefill worker to doctor: the links of every pair of ranks, or why there are none."""

    worker_id: WorkerId
    epoch: int
    decode_worker: WorkerId
    links: tuple[RankLink, ...] = ()
    failure: str = (
        ""  # "busy" | "draining" | "unsupported" | "unknown_worker" | "wrong_epoch" | "unreachable" | "no_room"
    )
    detail: str = ""


Message = (
    WorkerCard
    | Heartbeat
    | Goodbye
    | DecodeJob
    | Admitted
    | Refused
    | PrefillJob
    | PrefillClaimed
    | PrefillReturned
    | PrefillDone
    | PrefillFailed
    | PlacedLoad
    | Cancel
    | ReplayRequest
    | FinishAck
    | Ping
    | Unknown
    | KvEvents
    | KvSnapshotRequest
    | KvSnapshot
    | DescribeHost
    | HostReport
    | ProbeLink
    | LinkReport
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_frame_decoder: msgspec.msgpack.Decoder[TokenFrame] = msgspec.msgpack.Decoder(TokenFrame)


def encode(message: Message | TokenFrame) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode(payload: bytes) -> Message:
    """The message in `payload`; raises `msgspec.MsgspecError` when it is none of ours."""
    return _decoder.decode(payload)


def decode_frame(payload: bytes) -> TokenFrame:
    """A TokenFrame, which has a decoder of its own because it is the one message on the token path."""
    return _frame_decoder.decode(payload)
