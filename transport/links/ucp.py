"""The few calls of libucp that UCXX's Python core lacks: tag messages over a list of buffers, and their received length.

Structures and constants as in `ucp/api/ucp.h` of UCX 1.18 to 1.23 (the API is ABI-stable). Handles come from UCXX objects.
"""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_int8, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass

import numpy as np

from ..base import Buffer, DeviceBuffer

_FIELD_CALLBACK, _FIELD_USER_DATA, _FIELD_DATATYPE = 1 << 1, 1 << 2, 1 << 3
_NO_IMMEDIATE_COMPLETION = 1 << 16
_CONTIGUOUS, _IOV = 8, 2  # ucp_dt_make_contig(1), ucp_dt_make_iov()
_FULL_MASK = (1 << 64) - 1
_FIRST_ERROR_POINTER = (1 << 64) - 100  # UCS_PTR_IS_ERR
ERR_CANCELED = -16
ERR_TRUNCATED = -9


class _RequestParam(ctypes.Structure):
    _fields_ = [
        ("op_attr_mask", c_uint32),
        ("flags", c_uint32),
        ("request", c_void_p),
        ("callback", c_void_p),
        ("datatype", c_uint64),
        ("user_data", c_void_p),
        ("reply_buffer", c_void_p),
        ("memory_type", c_int),
        ("recv_info", c_void_p),
        ("memh", c_void_p),
    ]


class _TagInfo(ctypes.Structure):
    _fields_ = [("sender_tag", c_uint64), ("length_bytes", c_size_t)]


class _TransportEntry(ctypes.Structure):
    _fields_ = [("transport_name", c_char_p), ("device_name", c_char_p)]


class _EndpointAttr(ctypes.Structure):
    _fields_ = [
        ("field_mask", c_uint64),
        ("name", ctypes.c_char * 32),
        ("local_sockaddr", ctypes.c_uint64 * 16),
        ("remote_sockaddr", ctypes.c_uint64 * 16),
        ("entries", POINTER(_TransportEntry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", c_size_t),
        ("user_data", c_void_p),
    ]


_SEND_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int8, c_void_p)
_RECEIVE_CALLBACK = ctypes.CFUNCTYPE(None, c_void_p, c_int8, POINTER(_TagInfo), c_void_p)


@dataclass(eq=False, slots=True)
class Operation:
    """One send or receive. UCX uses `keep` until it lands in its `completed` queue."""

    completed: deque[Operation]
    keep: object
    request: int | None = None
    status: int | None = None  # None while it runs
    length_bytes: int = 0

    def end(self, status: int, length_bytes: int) -> None:
        self.status = status
        self.length_bytes = length_bytes
        self.completed.append(self)


_running: dict[int, Operation] = {}
_numbers = itertools.count(1)


def _on_sent(_request: int, status: int, number: int) -> None:
    if operation := _running.pop(number, None):
        operation.end(status, 0)


def _on_received(_request: int, status: int, info: ctypes._Pointer[_TagInfo], number: int) -> None:
    if operation := _running.pop(number, None):
        operation.end(status, info.contents.length_bytes if info and not status else 0)


# Called by UCX from within progress; module globals, because UCX may call them as long as the process lives.
_sent = _SEND_CALLBACK(_on_sent)
_received = _RECEIVE_CALLBACK(_on_received)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message, or the offer of one, that waits in UCX to be received."""

    message: int
    tag: int
    length_bytes: int


def address_of(buffer: Buffer) -> int:
    """Where it lies, in host or device memory."""
    if isinstance(buffer, DeviceBuffer):
        return buffer.address
    address: int = buffer.__array_interface__["data"][0]
    return address


def _receive_param(number: int, datatype: int) -> _RequestParam:
    return _RequestParam(
        op_attr_mask=_FIELD_CALLBACK | _FIELD_USER_DATA | _FIELD_DATATYPE | _NO_IMMEDIATE_COMPLETION,
        callback=ctypes.cast(_received, c_void_p),
        datatype=datatype,
        user_data=number,
    )


class Ucp:
    """libucp, which UCXX has loaded already."""

    def __init__(self) -> None:
        ucp, ucs = ctypes.CDLL("libucp.so.0"), ctypes.CDLL("libucs.so.0")
        param = POINTER(_RequestParam)
        self._tag_send = ucp.ucp_tag_send_nbx
        self._tag_send.argtypes = [c_void_p, c_void_p, c_size_t, c_uint64, param]
        self._tag_send.restype = c_void_p
        self._tag_receive = ucp.ucp_tag_recv_nbx
        self._tag_receive.argtypes = [c_void_p, c_void_p, c_size_t, c_uint64, c_uint64, param]
        self._tag_receive.restype = c_void_p
        self._probe = ucp.ucp_tag_probe_nb
        self._probe.argtypes = [c_void_p, c_uint64, c_uint64, c_int, POINTER(_TagInfo)]
        self._probe.restype = c_void_p
        self._message_receive = ucp.ucp_tag_msg_recv_nbx
        self._message_receive.argtypes = [c_void_p, c_void_p, c_size_t, c_void_p, param]
        self._message_receive.restype = c_void_p
        self._request_free = ucp.ucp_request_free
        self._request_free.argtypes = [c_void_p]
        self._request_free.restype = None
        self._request_cancel = ucp.ucp_request_cancel
        self._request_cancel.argtypes = [c_void_p, c_void_p]
        self._request_cancel.restype = None
        self._endpoint_query = ucp.ucp_ep_query
        self._endpoint_query.argtypes = [c_void_p, POINTER(_EndpointAttr)]
        self._endpoint_query.restype = c_int8
        self._status_string = ucs.ucs_status_string
        self._status_string.argtypes = [c_int8]
        self._status_string.restype = c_char_p

    def send(self, endpoint: int, tag: int, buffers: Sequence[Buffer], completed: deque[Operation]) -> Operation:
        """Begin to send one message; the operation lands in `completed` when it is over, never before this returns."""
        operation, number, address, count, datatype = self._begin(buffers, completed)
        param = _RequestParam(
            op_attr_mask=_FIELD_CALLBACK | _FIELD_USER_DATA | _FIELD_DATATYPE,
            callback=ctypes.cast(_sent, c_void_p),
            datatype=datatype,
            user_data=number,
        )
        self._began(operation, number, self._tag_send(endpoint, address, count, tag, byref(param)))
        return operation

    def receive(self, worker: int, tag: int, buffers: Sequence[Buffer], completed: deque[Operation]) -> Operation:
        """Post a receive for exactly this tag; as `send`, and `length_bytes` says how much came."""
        operation, number, address, count, datatype = self._begin(buffers, completed)
        param = _receive_param(number, datatype)
        request = self._tag_receive(worker, address, count, tag, _FULL_MASK, byref(param))
        self._began(operation, number, request)
        return operation

    def arrived(self, worker: int, tag: int, mask: int) -> Arrived | None:
        """Take the oldest message of such a tag that has come and was not posted for; `receive_arrived` must follow."""
        info = _TagInfo()
        message = self._probe(worker, tag, mask, 1, byref(info))
        return Arrived(message, info.sender_tag, info.length_bytes) if message else None

    def receive_arrived(
        self, worker: int, arrived: Arrived, buffers: Sequence[Buffer], completed: deque[Operation]
    ) -> Operation:
        """As `receive`, of a message that is known to have come."""
        operation, number, address, count, datatype = self._begin(buffers, completed)
        param = _receive_param(number, datatype)
        request = self._message_receive(worker, address, count, arrived.message, byref(param))
        self._began(operation, number, request)
        return operation

    def cancel(self, worker: int, operation: Operation) -> None:
        """Withdraw a receive that no message has matched; it ends with ERR_CANCELED. No effect on others."""
        if operation.status is None and operation.request:
            self._request_cancel(worker, operation.request)

    def free(self, operation: Operation) -> None:
        """Give the request back; call once it is completed, or to let UCX do so when it is."""
        if operation.request:
            self._request_free(operation.request)
            operation.request = None

    def transports(self, endpoint: int) -> tuple[str, ...]:
        """What the endpoint's lanes are: ("sysv", "tcp")."""
        entries = (_TransportEntry * 16)()
        attr = _EndpointAttr(
            field_mask=1 << 3, entries=entries, num_entries=16, entry_size=ctypes.sizeof(_TransportEntry)
        )
        if self._endpoint_query(endpoint, byref(attr)):
            return ()
        names = (entries[index].transport_name.decode() for index in range(attr.num_entries))
        return tuple(dict.fromkeys(names))

    def describe(self, status: int) -> str:
        """UCX's own words for a status."""
        text: bytes = self._status_string(status)
        return text.decode()

    def _begin(
        self, buffers: Sequence[Buffer], completed: deque[Operation]
    ) -> tuple[Operation, int, int | None, int, int]:
        views: list[Buffer] = list(buffers)
        addresses = [address_of(view) for view in views]
        if len(views) > 1:
            # struct ucp_dt_iov {void *buffer; size_t length}; UCX reads it until the operation ends.
            iov = np.array([addresses, [view.nbytes for view in views]], np.uint64).T.copy()
            layout = (iov.__array_interface__["data"][0], len(views), _IOV)
            operation = Operation(completed, keep=(views, iov))
        else:
            layout = (addresses[0], views[0].nbytes, _CONTIGUOUS) if views else (None, 0, _CONTIGUOUS)
            operation = Operation(completed, keep=views)
        number = next(_numbers)
        _running[number] = operation
        return operation, number, *layout

    def _began(self, operation: Operation, number: int, request: int | None) -> None:
        if request is None:
            _running.pop(number, None)
            operation.end(0, 0)
        elif request >= _FIRST_ERROR_POINTER:
            _running.pop(number, None)
            operation.end(request - (1 << 64), 0)
        else:
            operation.request = request
