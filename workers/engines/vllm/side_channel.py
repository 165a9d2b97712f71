"""Between a worker's front end and its connectors inside vLLM's processes: a unix socket in a private folder.

Frames are a little-endian uint32 length and one msgpack `Note`. The connection is also the life line: when the front end is
gone, the process at the other end exits; when that process is gone, the front end knows the engine is dead.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import cast

import msgspec

from ....transport.base import HandoffKey
from ....transport.layout import KvLayout
from ....transport.ranks import RankProbe

log = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
_CONNECT_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 1.0


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """A connector was made."""

    side: str  # "scheduler" | "worker"
    pid: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Worker side, of each tensor-parallel rank: the KV cache is registered and the hand-off endpoint runs."""

    addresses: tuple[str, ...]
    layout: KvLayout
    blocks: int


class Unfit(msgspec.Struct, frozen=True, tag="unfit"):
    """Either side: this engine cannot hand KV off; it stops now."""

    why: str


class SendEnded(msgspec.Struct, frozen=True, tag="send_ended"):
    """Worker side of a prefill engine: transport.SendEnd of one rank."""

    key: HandoffKey
    is_landed: bool
    kv_bytes: int
    reason: str


class ReceiveEnded(msgspec.Struct, frozen=True, tag="receive_ended"):
    """Worker side of a decode engine: transport.ReceiveEnd of one rank, and what was expected."""

    token: bytes
    is_landed: bool
    first_token: int  # what lies before came from the engine's own cache
    valid_token: int  # the engine computes the prompt from here on
    kv_bytes: int
    reason: str


class TaskEnded(msgspec.Struct, frozen=True, tag="task_ended"):
    """Scheduler side: the request has ended and its blocks are free in this step."""

    task: int


class AbortSend(msgspec.Struct, frozen=True, tag="abort_send"):
    """Front end to worker side of a prefill engine: give this hand-off up now."""

    key: HandoffKey
    reason: str


class RankFailed(msgspec.Struct, frozen=True, tag="rank_failed"):
    """Front end to worker side: another rank's part of this hand-off has failed; give yours up, also if it is yet to come."""

    name: HandoffKey | bytes  # of a send; the token of a receive
    reason: str


class ProbeAsked(msgspec.Struct, frozen=True, tag="probe_asked"):
    """Front end to worker side of a prefill engine: measure the links to this decode worker."""

    number: int
    addresses: tuple[str, ...]
    decode_epoch: int
    decode_ranks: int
    rank: int = 0  # that is to measure its own


class ProbeEnded(msgspec.Struct, frozen=True, tag="probe_ended"):
    """Worker side: what was measured, or why not."""

    number: int
    probes: tuple[RankProbe, ...] = ()
    refusal: str = ""  # transport.HandoffRefused.reason
    detail: str = ""  # without a refusal: the link was lost


Note = Hello | Ready | Unfit | SendEnded | ReceiveEnded | TaskEnded | AbortSend | RankFailed | ProbeAsked | ProbeEnded
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Note] = msgspec.msgpack.Decoder(Note)


def _frame(note: Note) -> bytes:
    payload = _encoder.encode(note)
    return _LENGTH.pack(len(payload)) + payload


class _Frames:
    """Cuts a byte stream into notes."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, received: bytes) -> list[Note]:
        self._pending += received
        notes = []
        while len(self._pending) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._pending)
            end = _LENGTH.size + length
            if len(self._pending) < end:
                break
            notes.append(_decoder.decode(bytes(self._pending[_LENGTH.size : end])))
            del self._pending[:end]
        return notes


class FrontEnd:
    """The front end's side; on its loop."""

    def __init__(self, on_note: Callable[[Note], None], on_lost: Callable[[str], None]) -> None:
        self._on_note = on_note
        self._on_lost = on_lost
        self._peers: set[_Peer] = set()
        self._server: asyncio.Server | None = None

    async def start(self, path: str) -> None:
        """Listen on `path`; whoever may connect is decided by its folder's permissions."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Peer(self._peers, self._on_note, self._on_lost), path)

    def send(self, note: AbortSend | RankFailed | ProbeAsked) -> None:
        """To every worker side; does nothing when there is none."""
        frame = _frame(note)
        for peer in self._peers:
            if peer.side == "worker":
                peer.write(frame)

    def close(self) -> None:
        """Hang up; connectors that still run exit."""
        if self._server:
            self._server.close()
        for peer in list(self._peers):
            peer.close()


class _Peer(asyncio.Protocol):
    def __init__(self, peers: set[_Peer], on_note: Callable[[Note], None], on_lost: Callable[[str], None]) -> None:
        self.side = ""
        self._peers = peers
        self._on_note = on_note
        self._on_lost = on_lost
        self._frames = _Frames()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it.
        self._peers.add(self)

    def data_received(self, data: bytes) -> None:
        for note in self._frames.feed(data):
            if isinstance(note, Hello):
                self.side = note.side
            self._on_note(note)

    def connection_lost(self, exc: Exception | None) -> None:
        self._peers.discard(self)
        self._on_lost(self.side or "unnamed")

    def write(self, frame: bytes) -> None:
        if self._transport:
            self._transport.write(frame)

    def close(self) -> None:
        if self._transport:
            self._transport.abort()


class ConnectorEnd:
    """The connector's side, in a process without a loop. `send` from any thread; `on_note` comes on a thread of its own,
    the first one maybe before this constructor returns."""

    def __init__(self, path: str, side: str, on_note: Callable[[Note], None]) -> None:
        self._on_note = on_note
        self._lock = threading.Lock()
        self._is_closed = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_CONNECT_TIMEOUT_S)
        self._socket.connect(path)
        self._socket.settimeout(None)
        self.send(Hello(side, os.getpid()))
        self._reader = threading.Thread(target=self._read, name="hocket-side-channel", daemon=True)
        self._reader.start()

    def send(self, note: Note) -> None:
        """Hand `note` to the kernel. Blocks only when the front end is stuck for thousands of notes."""
        frame = _frame(note)
        with self._lock:
            try:
                self._socket.sendall(frame)
            except OSError:
                log.debug("the front end is gone")  # The reader ends the process.

    def close(self) -> None:
        """Hang up without ending the process."""
        self._is_closed = True
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side was faster.
        self._reader.join(_CLOSE_TIMEOUT_S)
        self._socket.close()

    def _read(self) -> None:
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # Not on the compute cores, see EndpointThread.
        try:
            self._read_notes()
        except Exception:  # The thread's edge: without its life line the process must not live on.
            log.exception("the side channel failed")
        if not self._is_closed:
            # Nobody is left to serve, and vLLM's own processes outlive a killed front end. No cleanup: none is needed.
            os._exit(1)

    def _read_notes(self) -> None:
        frames = _Frames()
        while True:
            try:
                received = self._socket.recv(1 << 16)
            except OSError:
                return
            if not received:
                return
            for note in frames.feed(received):
                self._on_note(note)
