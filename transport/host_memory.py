"""Host memory that other processes of this host may map to read, which then costs no system call and no copy: anonymous files.

They count as shared memory (`/dev/shm` has no part in it). Nobody but its maker can write into one or change its length, and
nothing is left of it when the last process has gone.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref

import numpy as np

from .base import HostBuffer

_F_SEAL_FUTURE_WRITE = 0x10  # Python has no name for it before 3.13
_FIXED_LENGTH = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_POPULATE_WRITE = 23  # madvise, Linux 5.14: touch every page; memory touched first by a copy makes it 10x slower


class SharedPages:
    """Zeroed memory, for as long as this object or a view of `array` lives. `fd` is what to hand over."""

    def __init__(self, nbytes: int, *, touch: bool = False) -> None:
        self.fd = os.memfd_create("hocket", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, nbytes)
        memory = mmap.mmap(self.fd, nbytes)  # Keeps a descriptor of its own open.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | _FIXED_LENGTH | _F_SEAL_FUTURE_WRITE)
        for advice in (mmap.MADV_HUGEPAGE, _POPULATE_WRITE) if touch else ():
            try:
                memory.madvise(advice)
            except OSError:
                pass  # An older kernel, or one without huge pages: slower, not wrong.
        self.array: HostBuffer = np.frombuffer(memory, np.uint8)
        self.address: int = self.array.ctypes.data


def map_shared(fd: int, nbytes: int = 0, offset: int = 0) -> HostBuffer:
    """Another process's pages (0: all of them), to be read; the descriptor may be closed.

    Raises OSError, and ValueError for a file that may be cut short: whoever reads on then dies of SIGBUS.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:  # A file that knows no seals.
        seals = 0
    if seals & _FIXED_LENGTH != _FIXED_LENGTH:
        raise ValueError("a file whose end may be cut off while it is read")
    memory = mmap.mmap(fd, nbytes or os.fstat(fd).st_size, prot=mmap.PROT_READ, offset=offset)
    return np.frombuffer(memory, np.uint8)
