"""Staging memory on the device and on the host, the slots that are cut from it, and slots of other processes."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from ..base import Buffer, DeviceBuffer
from ..errors import TransportUnavailable
from ..host_memory import SharedPages
from . import driver
from .arena import Arena
from .tickets import GpuTicket

try:
    import torch
except ImportError as error:
    raise TransportUnavailable("KV in GPU memory needs torch, which is not installed") from error


NONCE_BYTES = 16
_ALIGN_BYTES = 256  # as the arena's slots


class StagingSlot:
    """Staging memory for one message. `view` is the same bytes as a torch tensor (uint8), pinned when on the host."""

    __slots__ = ("_address", "buffer", "is_released", "offset", "staging", "ticket")

    def __init__(self, staging: Staging, offset: int, nbytes: int) -> None:
        self.staging = staging
        self.offset = offset
        self._address = staging.address + offset
        self.buffer: Buffer = (
            DeviceBuffer(self._address, nbytes, staging.memory)
            if staging.on_device
            else staging.array[offset : offset + nbytes]
        )
        self.ticket: GpuTicket | None = None  # the last gather or scatter
        self.is_released = False

    @property
    def view(self) -> torch.Tensor:
        """Made when it is asked for: few want it, and it takes 5 us."""
        return self.staging.memory[self.offset : self.offset + self.buffer.nbytes]

    @property
    def address(self) -> int:
        """As the GPU sees it (pinned host memory has the same address there)."""
        return self._address

    @property
    def is_in_use(self) -> bool:
        """Whether a kernel may still read or write it."""
        return self.ticket is not None and self.ticket.poll() is None


class ForeignSlot:
    """A slot of another process's ring, mapped here. It is read only."""

    __slots__ = ("_device", "address", "buffer", "ticket")

    def __init__(self, address: int, nbytes: int, owner: object, device: torch.device) -> None:
        self.address = address
        self.buffer = DeviceBuffer(address, nbytes, owner)
        self.ticket: GpuTicket | None = None
        self._device = device

    @property
    def view(self) -> torch.Tensor:
        """A copy of ours, as of the current stream: torch takes no memory of others."""
        copied = torch.empty(self.buffer.nbytes, dtype=torch.uint8, device=self._device)
        copy_bytes(copied.data_ptr(), self.address, self.buffer.nbytes, current_stream(self._device))
        return copied


def current_stream(device: torch.device) -> int:
    """Its CUDA handle; 0 where kernels are interpreted."""
    handle: int = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return handle


def copy_bytes(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy within device memory; done at once where kernels are interpreted."""
    if torch.cuda.is_available():
        driver.copy(target, source, nbytes, stream)
    else:
        ctypes.memmove(target, source, nbytes)


class Staging:
    """One allocation that slots are cut from, and `NONCE_BYTES` behind them for a number that proves a mapping."""

    def __init__(self, nbytes: int, device: torch.device, *, on_device: bool) -> None:
        self.on_device = on_device
        self.arena = Arena(nbytes)
        self.nonce_offset = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        nbytes = self.nonce_offset + NONCE_BYTES
        is_cuda = device.type == "cuda"
        self.pages: SharedPages | None = None
        if on_device and is_cuda:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        elif on_device:  # Where kernels are interpreted: host memory that can be lent as well.
            self.pages = SharedPages(nbytes)
            self.memory = torch.from_numpy(self.pages.array)
        else:
            self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=is_cuda)
        self.array: npt.NDArray[np.uint8] = np.empty(0, np.uint8) if on_device else self.memory.numpy()
        self.address: int = self.memory.data_ptr()
        if on_device and is_cuda and _is_expandable(self.address):
            raise TransportUnavailable(
                "staging memory came from expandable segments, which no other process can open; "
                "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
            )


def _is_expandable(address: int) -> bool:
    return any(
        segment.get("is_expandable", False)
        and segment["address"] <= address < segment["address"] + segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
    )
