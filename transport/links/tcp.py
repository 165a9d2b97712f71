"""Links over TCP: no dependency, for where UCX is absent.

The socket is driven by hand (`add_reader`, `add_writer`) on asyncio and uvloop alike, because asyncio's own transport
copies what the kernel does not take at once. Received bytes go from the kernel straight into the posted buffers.

On the wire: a header {kind, segment bytes, tag, message bytes, check}, then the segment. A KV message travels as segments of at
most 1 MiB, so that control frames, which go first, wait for one segment and not for a whole layer. KV that comes
before its receive is posted, or whose place has no room, stops the reading of this link until it has.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..base import Buffer, ControlHandler, Done, LostHandler, Place
from ..base import Link as LinkContract
from ..errors import LinkLost, TransportError
from ..frames import FRAME_BYTES_MAX
from .addresses import family_of, join_address, split_address
from .cursor import Cursor, host_buffers

log = logging.getLogger(__name__)
_FIELDS = struct.Struct("<BxxxIQQ")
_HEADER_BYTES = _FIELDS.size + 4  # and their CRC-32: a wrong length would make the rest of the stream seem to be KV
_CONTROL, _MESSAGE = 1, 2
_RESET = struct.pack("ii", 1, 0)  # struct linger
SEGMENT_BYTES = 1 << 20
TURN_BYTES = 8 << 20  # then other work of the loop gets its turn
VIEWS_MAX = 64  # of one system call; IOV_MAX is 1024, but 64 blocks of 16 KiB fill a segment
CLOSE_S = 1.0


def _check_of(fields: bytes | bytearray) -> bytes:
    return zlib.crc32(fields).to_bytes(4, "little")


def _header(kind: int, segment_bytes: int, tag: int, message_bytes: int) -> bytes:
    fields = _FIELDS.pack(kind, segment_bytes, tag, message_bytes)
    return fields + _check_of(fields)


@dataclass(slots=True)
class _Message:
    tag: int
    cursor: Cursor
    done: Done


@dataclass(slots=True)
class _Receive:
    tag: int
    place: Place
    done: Done
    cursor: Cursor | None = None  # from the first segment on
    message_bytes: int = 0

    @property
    def arrived_bytes(self) -> int:
        return self.cursor.total_bytes - self.cursor.left_bytes if self.cursor else 0


class TcpLink:
    """One connected socket."""

    def __init__(self, connection: socket.socket, peer: str, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._loop = asyncio.get_running_loop()
        self._frame_bytes_max = frame_bytes_max
        self._socket = connection
        self._peer = peer
        self._error: LinkLost | None = None
        self._on_control: ControlHandler | None = None
        self._on_lost: LostHandler | None = None
        # Receiving: a header, then a control frame or a segment of a message.
        self._bytes_received = 0
        self._header = bytearray(_HEADER_BYTES)
        self._have = 0  # bytes of the header, or of the control frame
        self._frame: bytearray | None = None
        self._segment_left = 0
        self._filling: Cursor | None = None
        self._filling_of: _Receive | None = None
        self._wanted: tuple[int, int] | None = None  # (tag, bytes) of KV that has no receive or no room
        self._receives: dict[int, _Receive] = {}
        self._hangup: select.epoll | None = None  # watches the socket while nothing is read from it
        # Sending: control first, then messages in their order.
        self._controls: deque[bytes] = deque()
        self._sends: deque[_Message] = deque()
        self._piece: Cursor | None = None  # what is being written: frames, or a header and a segment
        self._piece_of: _Message | None = None
        self._is_kicked = False
        self._is_writing = False
        self._is_flushed = asyncio.Event()
        self._is_flushed.set()

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def transport(self) -> str:
        return "tcp"

    @property
    def moves_device_memory(self) -> bool:
        return False

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    def send_control(self, payload: bytes) -> None:
        if len(payload) > self._frame_bytes_max:
            raise ValueError(f"control frame of {len(payload)} B; at most {self._frame_bytes_max}")
        self._check_alive()
        self._controls.append(_header(_CONTROL, len(payload), 0, len(payload)) + payload)
        self._kick()

    def post_send(self, tag: int, buffers: Sequence[Buffer], done: Done) -> None:
        self._check_alive()
        self._sends.append(_Message(tag, Cursor(host_buffers(buffers)), done))
        self._kick()

    def post_receive(self, tag: int, place: Place, done: Done) -> None:
        self._check_alive()
        assert tag not in self._receives, f"tag {tag} is posted already"
        self._receives[tag] = _Receive(tag, place, done)
        if self._wanted and self._wanted[0] == tag:
            self._loop.call_soon(self._resume)

    def retry_receives(self) -> None:
        if self._wanted:
            self._loop.call_soon(self._resume)

    def withdraw(self, tag: int) -> None:
        """Forget a receive of which nothing has come; its `done` is not called."""
        receive = self._receives.pop(tag)
        assert receive.cursor is None, f"message {tag:#x} has begun to come"

    def flush(self) -> None:
        """Write now what the socket takes, not in the loop's next turn."""
        if not self._is_writing:
            self._write()

    def start(self, on_control: ControlHandler, on_lost: LostHandler) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        if self._error:
            self._loop.call_soon(on_lost, self._error)
        else:
            self._loop.add_reader(self._socket, self._read)

    async def abort(self) -> None:
        self.drop(LinkLost(f"{self._peer} was aborted here"))

    def drop(self, error: LinkLost) -> None:
        """What `abort` does, at once and for this reason."""
        if self._error is None:
            # Reset, or the end of the stream waits behind what a peer without room does not read.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._lose(error)

    async def aclose(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._is_flushed.wait()
        except TimeoutError:
            pass
        self._lose(LinkLost(f"{self._peer} was closed here"))

    def _check_alive(self) -> None:
        if self._error:
            raise LinkLost(f"{self._peer} is gone") from self._error

    def _lose(self, error: LinkLost) -> None:
        if self._error:
            return
        self._error = error
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._unhold()
        self._socket.close()
        dones = [send.done for send in self._sends] + [receive.done for receive in self._receives.values()]
        self._sends.clear()
        self._receives.clear()
        self._controls.clear()
        self._piece = self._piece_of = self._filling = self._filling_of = None
        self._is_flushed.set()
        for done in dones:
            done(error)
        if self._on_lost:
            self._on_lost(error)

    # Receiving.

    def _read(self) -> None:
        read_bytes = 0
        while self._error is None and self._wanted is None and read_bytes < TURN_BYTES:
            try:
                count = self._socket.recvmsg_into(self._places())[0]
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._lose(_lost(self._peer, error))
                return
            if not count:
                self._lose(LinkLost(f"{self._peer} closed the connection"))
                return
            read_bytes += count
            self._bytes_received += count
            self._consume(count)

    def _places(self) -> list[memoryview]:
        """Where the next bytes belong; a segment is read together with the header behind it."""
        if self._filling:
            places = self._filling.views(self._segment_left, VIEWS_MAX)
            if sum(view.nbytes for view in places) == self._segment_left:
                places.append(memoryview(self._header))
            return places
        return [memoryview(self._header if self._frame is None else self._frame)[self._have :]]

    def _consume(self, count: int) -> None:
        if self._filling and self._filling_of:
            segment = min(count, self._segment_left)
            self._filling.advance(segment)
            self._segment_left -= segment
            count -= segment
            if not self._segment_left:
                self._end_segment(self._filling_of)
        self._have += count
        if self._frame is not None and self._have == len(self._frame):
            frame, self._frame, self._have = bytes(self._frame), None, 0
            assert self._on_control
            self._on_control(frame)
        elif self._frame is None and self._have == _HEADER_BYTES and self._error is None:
            self._have = 0
            fields = self._header[: _FIELDS.size]
            if self._header != fields + _check_of(fields):
                self._lose(LinkLost(f"{self._peer} sent a header with a wrong check"))
                return
            self._on_header(*_FIELDS.unpack(fields))

    def _on_header(self, kind: int, segment_bytes: int, tag: int, message_bytes: int) -> None:
        if kind == _CONTROL and 0 < segment_bytes <= self._frame_bytes_max:
            self._frame = bytearray(segment_bytes)
        elif kind == _MESSAGE and segment_bytes <= SEGMENT_BYTES and (segment_bytes or not message_bytes):
            self._segment_left = segment_bytes
            self._wanted = (tag, message_bytes)
            self._begin_segment()
        else:
            self._lose(LinkLost(f"{self._peer} sent a header of kind {kind} for {segment_bytes} B"))

    def _begin_segment(self) -> None:
        assert self._wanted
        tag, message_bytes = self._wanted
        receive = self._receives.get(tag)
        if receive is None:
            self._hold()
        elif message_bytes > receive.place.nbytes:
            self._lose(LinkLost(f"{self._peer} sent {message_bytes} B for a receive of {receive.place.nbytes} B"))
        elif not self._has_place(receive, message_bytes):
            self._hold()
        elif (
            receive.message_bytes != message_bytes or receive.arrived_bytes + self._segment_left > receive.message_bytes
        ):
            self._lose(LinkLost(f"{self._peer} changed the length of message {tag:#x}"))
        else:
            self._wanted = None
            self._filling, self._filling_of = receive.cursor, receive
            if not self._segment_left:
                self._end_segment(receive)

    def _has_place(self, receive: _Receive, message_bytes: int) -> bool:
        """Ask for it with the first segment."""
        if receive.cursor is None:
            buffers = receive.place.take()
            if buffers is None:
                return False
            receive.cursor, receive.message_bytes = Cursor(host_buffers(buffers)), message_bytes
            assert receive.cursor.total_bytes == receive.place.nbytes
        return True

    def _end_segment(self, receive: _Receive) -> None:
        self._filling = self._filling_of = None
        if receive.arrived_bytes < receive.message_bytes:
            return
        del self._receives[receive.tag]
        if receive.arrived_bytes < receive.place.nbytes:
            error = f"{self._peer} sent {receive.arrived_bytes} B for a receive of {receive.place.nbytes} B"
            receive.done(TransportError(error))
        else:
            receive.done(None)

    def _resume(self) -> None:
        if self._error is None and self._wanted is not None:
            self._begin_segment()
            if self._error is None and self._wanted is None:
                self._unhold()
                self._loop.add_reader(self._socket, self._read)

    def _hold(self) -> None:
        """Stop reading, but notice when the peer goes: nobody else reads the end of the stream."""
        self._loop.remove_reader(self._socket)
        if self._hangup is None:
            self._hangup = select.epoll()
            self._hangup.register(self._socket, select.EPOLLRDHUP)
            self._loop.add_reader(self._hangup, self._on_hangup)

    def _unhold(self) -> None:
        if self._hangup:
            self._loop.remove_reader(self._hangup)
            self._hangup.close()
            self._hangup = None

    def _on_hangup(self) -> None:
        self._lose(LinkLost(f"{self._peer} closed the connection"))

    # Sending.

    def _kick(self) -> None:
        self._is_flushed.clear()
        if not self._is_kicked and not self._is_writing:
            self._is_kicked = True
            self._loop.call_soon(self._write)

    def _write(self) -> None:
        self._is_kicked = False
        written_bytes = 0
        while self._error is None and written_bytes < TURN_BYTES:
            piece = self._piece or self._next_piece()
            if piece is None:
                self._set_writing(False)
                self._is_flushed.set()
                return
            try:
                count = self._socket.sendmsg(piece.views(piece.left_bytes, VIEWS_MAX))
            except (BlockingIOError, InterruptedError):
                self._set_writing(True)
                return
            except OSError as error:
                self._lose(_lost(self._peer, error))
                return
            written_bytes += count
            piece.advance(count)
            if not piece.left_bytes:
                self._end_piece()
        if self._error is None:
            self._set_writing(True)

    def _set_writing(self, is_writing: bool) -> None:
        if is_writing != self._is_writing:
            self._is_writing = is_writing
            if is_writing:
                self._loop.add_writer(self._socket, self._write)
            else:
                self._loop.remove_writer(self._socket)

    def _next_piece(self) -> Cursor | None:
        if self._controls:
            self._piece = Cursor(self._controls)
            self._controls.clear()
        elif self._sends:
            message = self._piece_of = self._sends[0]
            segment_bytes = min(message.cursor.left_bytes, SEGMENT_BYTES)
            views = message.cursor.views(segment_bytes, VIEWS_MAX)
            segment_bytes = sum(view.nbytes for view in views)
            message.cursor.advance(segment_bytes)
            header = _header(_MESSAGE, segment_bytes, message.tag, message.cursor.total_bytes)
            self._piece = Cursor([header, *views])
        return self._piece

    def _end_piece(self) -> None:
        message, self._piece, self._piece_of = self._piece_of, None, None
        if message and not message.cursor.left_bytes:
            self._sends.popleft()
            message.done(None)


class TcpListener:
    def __init__(self, server: socket.socket, host: str, on_link: Callable[[LinkContract], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._on_link = on_link
        self._address = join_address("tcp", host, server.getsockname()[1])
        self._loop.add_reader(server, self._accept)

    @property
    def address(self) -> str:
        return self._address

    async def aclose(self) -> None:
        self._loop.remove_reader(self._server)
        self._server.close()

    def _accept(self) -> None:
        try:
            connection, peer = self._server.accept()
        except OSError as error:
            log.warning("did not accept a connection: %s", error)
            return
        _tune(connection)
        self._on_link(TcpLink(connection, join_address("tcp", peer[0], peer[1])))


class TcpTransport:
    """Plain TCP."""

    scheme = "tcp"

    async def start(self) -> None:
        pass

    async def listen(self, host: str, on_link: Callable[[LinkContract], None]) -> TcpListener:
        server = socket.create_server((host, 0), family=family_of(host), backlog=128)
        server.setblocking(False)
        return TcpListener(server, host, on_link)

    async def connect(self, address: str, *, timeout_s: float) -> TcpLink:
        """Raises LinkLost when nobody answers in time, ValueError when the address is not of this scheme."""
        host, port = split_address(address, "tcp")
        loop = asyncio.get_running_loop()
        connection: socket.socket | None = None
        try:
            async with asyncio.timeout(timeout_s):
                found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                connection = socket.socket(found[0][0], socket.SOCK_STREAM)
                _tune(connection)
                await loop.sock_connect(connection, found[0][4])
        except (OSError, TimeoutError) as error:
            if connection:
                connection.close()
            raise LinkLost(f"no answer from {address} within {timeout_s} s: {error or 'timeout'}") from error
        except asyncio.CancelledError:
            if connection:
                connection.close()
            raise
        return TcpLink(connection, address)

    async def aclose(self) -> None:
        pass


def _tune(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _lost(peer: str, error: OSError) -> LinkLost:
    lost = LinkLost(f"lost {peer}: {error}")
    lost.__cause__ = error
    return lost
