"""A position in a list of buffers that are read or filled as one run of bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

from ..base import Buffer, DeviceBuffer, HostBuffer
from ..views import Views

_BYTE = ctypes.c_ubyte


def host_buffers(buffers: Sequence[Buffer]) -> Sequence[HostBuffer]:
    """The same buffers, for a link that moves host memory alone. Raises TypeError for a `DeviceBuffer`."""
    if isinstance(buffers, Views):
        return buffers
    hosts = [buffer for buffer in buffers if not isinstance(buffer, DeviceBuffer)]
    if len(hosts) < len(buffers):
        raise TypeError("this link moves no device memory; see `Link.moves_device_memory`")
    return hosts


def address_of(buffer: Buffer) -> int:
    """Where it lies, in host or device memory."""
    if isinstance(buffer, DeviceBuffer):
        return buffer.address
    try:
        return ctypes.addressof(_BYTE.from_buffer(buffer.data))
    except (TypeError, ValueError):  # Read-only or empty: numpy's own way is 5 times slower.
        address: int = buffer.__array_interface__["data"][0]
        return address


class Cursor:
    """Names the next bytes as views, never copying them."""

    def __init__(self, buffers: Iterable[HostBuffer | bytes | memoryview]) -> None:
        views = (memoryview(buffer) if isinstance(buffer, bytes | memoryview) else buffer.data for buffer in buffers)
        self._views = [view for view in views if view.nbytes]
        self._index = 0
        self._offset = 0
        self.total_bytes = sum(view.nbytes for view in self._views)
        self.left_bytes = self.total_bytes

    def views(self, bytes_max: int, count_max: int) -> list[memoryview]:
        """The next views, together at most `bytes_max` long."""
        views: list[memoryview] = []
        offset = self._offset
        for index in range(self._index, min(self._index + count_max, len(self._views))):
            view = self._views[index]
            end = min(view.nbytes, offset + bytes_max)
            views.append(view[offset:end])
            bytes_max -= end - offset
            offset = 0
            if not bytes_max:
                break
        return views

    def take(self, moved_bytes: int) -> list[memoryview]:
        """The next so many bytes, behind which the cursor then is."""
        views = self.views(moved_bytes, len(self._views)) if moved_bytes else []
        self.advance(moved_bytes)
        return views

    def advance(self, moved_bytes: int) -> None:
        self.left_bytes -= moved_bytes
        moved_bytes += self._offset
        while self._index < len(self._views) and moved_bytes >= self._views[self._index].nbytes:
            moved_bytes -= self._views[self._index].nbytes
            self._index += 1
        self._offset = moved_bytes
