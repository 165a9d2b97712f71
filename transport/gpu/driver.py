"""The few functions of the CUDA driver that torch has no public name for: memory that other processes map."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache

from ..errors import TransportUnavailable

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_HINTS = {
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "the two GPUs cannot reach each other's memory",
    "CUDA_ERROR_MAP_BUFFER_OBJECT_FAILED": "the two processes must share a user and an IPC namespace",
    "CUDA_ERROR_INVALID_CONTEXT": "a process cannot map its own memory, nor that of another virtual device",
}


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", c_char * HANDLE_BYTES)]


class DriverError(TransportUnavailable, RuntimeError):
    """The driver said no."""


@cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from error
    signatures = {
        "cuIpcGetMemHandle": [POINTER(_Handle), c_uint64],
        "cuIpcOpenMemHandle_v2": [POINTER(c_uint64), _Handle, c_uint],
        "cuIpcCloseMemHandle": [c_uint64],
        "cuMemGetAddressRange_v2": [POINTER(c_uint64), POINTER(c_size_t), c_uint64],
        "cuMemcpyAsync": [c_uint64, c_uint64, c_size_t, c_void_p],
        "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
        "cuMemHostUnregister": [c_void_p],
        "cuMemHostGetDevicePointer_v2": [POINTER(c_uint64), c_void_p, c_uint],
        "cuGetErrorName": [c_int, POINTER(c_char_p)],
        "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
        "cuFuncGetParamInfo": [c_void_p, c_size_t, POINTER(c_size_t), POINTER(c_size_t)],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name, None)
        if function is None:
            continue  # An older driver; who needs it asks.
        function.argtypes, function.restype = arguments, c_int
    return library


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        error = _name(code)
        hint = f" ({_HINTS[error]})" if error in _HINTS else ""
        raise DriverError(f"{name}: {error}{hint}")


def _name(code: int) -> str:
    text = c_char_p()
    _driver().cuGetErrorName(code, byref(text))
    return (text.value or b"").decode() or str(code)


def export(address: int) -> tuple[bytes, int]:
    """The handle of the allocation that holds this address, and how far in it lies. Raises DriverError."""
    base, size, handle = c_uint64(), c_size_t(), _Handle()
    _call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
    _call("cuIpcGetMemHandle", byref(handle), address)
    return bytes(memoryview(handle).cast("B")), address - base.value


def open_handle(handle: bytes) -> int:
    """Map an allocation of another process for the current device; where it lies. Raises DriverError.

    Opened twice, it lies at one address and must be closed twice.
    """
    address = c_uint64()
    _call("cuIpcOpenMemHandle_v2", byref(address), _Handle.from_buffer_copy(handle), _LAZY_ENABLE_PEER_ACCESS)
    return address.value


def close_handle(address: int) -> None:
    """Undo one `open_handle`. Raises DriverError."""
    _call("cuIpcCloseMemHandle", address)


def copy(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy, of any two kinds of memory. Raises DriverError."""
    _call("cuMemcpyAsync", target, source, nbytes, stream)


def register(address: int, nbytes: int) -> int:
    """Let the device write to host memory; where it finds it. Raises DriverError."""
    _call("cuMemHostRegister_v2", address, nbytes, 0)
    found = c_uint64()
    _call("cuMemHostGetDevicePointer_v2", byref(found), address, 0)
    return found.value


def unregister(address: int) -> None:
    """Undo `register`. Raises DriverError."""
    _call("cuMemHostUnregister", address)


def parameter_sizes(function: int) -> list[int]:
    """Bytes of each parameter of a kernel; empty where the driver cannot say (before CUDA 12.4)."""
    sizes: list[int] = []
    offset, size = c_size_t(), c_size_t()
    ask = getattr(_driver(), "cuFuncGetParamInfo", None)
    while ask and ask(function, len(sizes), byref(offset), byref(size)) == 0:
        sizes.append(size.value)
    return sizes


def launch(function: int, programs: int, threads: int, shared_bytes: int, stream: int, parameters: object) -> None:
    """Queue a kernel; the parameters are copied before this returns. Raises DriverError."""
    code = _driver().cuLaunchKernel(function, programs, 1, 1, threads, 1, 1, shared_bytes, stream, parameters, None)
    if code:
        raise DriverError(f"cuLaunchKernel: {_name(code)}")
