"""Host memory that other processes of this host may map to read: an anonymous file, handed over as a file descriptor.

Nobody but its maker can write into it or change its length, and nothing is left of it when the last process has gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import numpy as np

from .base import HostBuffer

_F_SEAL_FUTURE_WRITE = 0x10  # Python has no name for it before 3.13
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE


class SharedPages:
    """Zeroed memory, for as long as this object or a view of `array` lives."""

    def __init__(self, nbytes: int) -> None:
        self.fd = os.memfd_create("hocket", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, nbytes)
        self.array: HostBuffer = np.frombuffer(mmap.mmap(self.fd, nbytes), np.uint8)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self.address: int = self.array.ctypes.data


def map_pages(fd: int) -> HostBuffer:
    """Another process's pages, to be read; the descriptor may be closed. Raises ValueError for a file that may shrink."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if not seals & fcntl.F_SEAL_SHRINK:
        raise ValueError("a file whose end may be cut off while it is read")
    return np.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ), np.uint8)
