"""Host memory for KV that other processes of this machine may map: what they then read costs no system call and no copy."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Whoever maps a file that can be cut short dies of SIGBUS when it is, so a peer maps only what can not be."""
_POPULATE_WRITE = (
    23  # madvise, Linux 5.14: touch every page; memory touched for the first time by a copy makes it 10x slower
)


def shareable_bytes(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeros in a sealed memfd, touched. They count as shared memory (`/dev/shm` has no part in it) and end with the array."""
    descriptor = os.memfd_create("hocket-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
        memory = mmap.mmap(descriptor, nbytes)  # Keeps a descriptor of its own open.
    finally:
        os.close(descriptor)
    for advice in (mmap.MADV_HUGEPAGE, _POPULATE_WRITE):
        try:
            memory.madvise(advice)
        except OSError:
            pass  # An older kernel, or one without huge pages: slower, not wrong.
    return np.frombuffer(memory, np.uint8)
