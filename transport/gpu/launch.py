"""Launches a compiled kernel through the driver: with nothing of Triton's in between, which takes 20 us, and 100 when it is cold.

Only kernels whose arguments are all int64, and only when the driver says that the kernel's parameters are just those and the
two pointers to scratch memory that Triton appends (none of our kernels has any).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from . import driver

_SCRATCH_POINTERS = 2


class Launcher:
    """One kernel. Thread-safe."""

    def __init__(self, compiled: Any, arguments: int) -> None:  # Triton's CompiledKernel has no type.
        metadata = compiled.metadata
        self._function: int = compiled.function
        self._threads: int = metadata.num_warps * metadata.warp_size
        self._shared: int = metadata.shared
        self._count = arguments + _SCRATCH_POINTERS
        self._local = threading.local()
        self._compiled = compiled  # holds the code

    @classmethod
    def of(cls, compiled: Any, arguments: int) -> Launcher | None:
        """None for a kernel that has other parameters or needs more than a plain launch."""
        metadata = compiled.metadata
        names = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")
        is_plain = not any(getattr(metadata, name, 0) for name in names) and metadata.num_ctas == 1
        sizes = driver.parameter_sizes(compiled.function)
        return cls(compiled, arguments) if is_plain and sizes == [8] * (arguments + _SCRATCH_POINTERS) else None

    def __call__(self, programs: int, stream: int, arguments: Sequence[int]) -> None:
        """Raises DriverError."""
        try:
            values, pointers = self._local.arrays
        except AttributeError:
            values = (ctypes.c_int64 * self._count)()
            first = ctypes.addressof(values)
            pointers = (ctypes.c_void_p * self._count)(*(first + 8 * index for index in range(self._count)))
            self._local.arrays = values, pointers
        values[:-_SCRATCH_POINTERS] = arguments
        driver.launch(self._function, programs, self._threads, self._shared, stream, pointers)
