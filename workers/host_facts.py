"""What decides how two processes can talk, as this one sees it: read from /proc, /sys and the installed packages.

Thin on purpose: what follows from the facts is decided in `cluster/diagnosis.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..bus.messages import HostFacts

COPY_BYTES = 32 << 20
COPIES = 5
SETTINGS = (  # Never all of UCX_* or the whole environment: what is shown must be harmless.
    "UCX_TLS",
    "UCX_NET_DEVICES",
    "UCX_MM_ERROR_HANDLING",
    "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "CUDA_VISIBLE_DEVICES",
)
_SYSTEM_LIBRARIES = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/lib",
)


def host_facts(transports: str) -> HostFacts:
    """Of this process; takes about 0.1 s, on a thread. `transports` as configured."""
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return HostFacts(
        host_id=_text("/proc/sys/kernel/random/boot_id"),
        ipc_namespace=_namespace("ipc"),
        pid_namespace=_namespace("pid"),
        user_id=os.getuid(),
        copy_gb_per_s=copy_gb_per_s(),
        shm_free_bytes=_free_bytes("/dev/shm"),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        ptrace_scope=int(_text("/proc/sys/kernel/yama/ptrace_scope") or 0),
        network_mbit_per_s=_network(),
        rdma_devices=_names("/sys/class/infiniband"),
        cuda_devices=len(_names("/proc/driver/nvidia/gpus")),
        transports=transports,
        ucxx=_ucxx_version(),
        ucx_parts=tuple(sorted(set(_ucx_parts()))),
        settings={name: os.environ[name][:256] for name in SETTINGS if name in os.environ},
    )


def copy_gb_per_s() -> float:
    """One copy from memory to memory, the best of a few."""
    source, target = np.full(COPY_BYTES, 1, np.uint8), np.full(COPY_BYTES, 2, np.uint8)
    best_s = float("inf")
    for _ in range(COPIES):
        started = time.perf_counter()
        target[:] = source
        best_s = min(best_s, time.perf_counter() - started)
    return COPY_BYTES / best_s / 1e9


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _names(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


def _namespace(kind: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""


def _free_bytes(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _network() -> dict[str, int]:
    speeds = {}
    for name in _names("/sys/class/net"):
        with contextlib.suppress(ValueError):  # "": not readable while it is down; -1: it does not know.
            speed = int(_text(f"/sys/class/net/{name}/speed"))
            if speed > 0 and name != "lo" and _text(f"/sys/class/net/{name}/operstate") == "up":
                speeds[name] = speed
    return speeds


def _ucxx_version() -> str:
    if importlib.util.find_spec("ucxx") is None:
        return ""
    for package in ("ucxx-cu13", "ucxx-cu12", "ucxx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return "ucxx"


def _ucx_parts() -> Iterable[str]:
    """The transport modules of the libucx that is loaded, or would be."""
    for folder in _ucx_folders():
        for name in _names(str(folder)):
            if name.startswith("libuct_") and ".so" in name:
                yield name.removeprefix("libuct_").partition(".")[0]


def _ucx_folders() -> list[Path]:
    loaded = {line.split()[-1] for line in _text("/proc/self/maps").splitlines() if "/libucp.so" in line}
    if loaded:
        return [Path(path).parent / "ucx" for path in loaded]
    if not os.environ.get("RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY"):
        spec = importlib.util.find_spec("libucx")
        if spec and spec.origin:
            return [Path(spec.origin).parent / "lib" / "ucx"]
    return [Path(folder) / "ucx" for folder in _SYSTEM_LIBRARIES]
