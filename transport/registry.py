"""Finds transports by scheme. They are entry points of the group `hocket.transports`, imported on first use."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import entry_points

from .base import KvPool, Transport
from .errors import TransportUnavailable
from .stager import LendingStager

log = logging.getLogger(__name__)
GROUP = "hocket.transports"
DEFAULT_SCHEMES = "ucx,tcp"


def installed_schemes() -> tuple[str, ...]:
    """Every scheme that some installed package offers; whether it works here shows when it starts."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def open_transports(schemes: str) -> list[Transport]:
    """Make the transports named in "ucx,tcp", best first; not started. Raises ValueError for an unknown scheme.

    A transport whose package is missing is left out with a warning while another remains; else TransportUnavailable.
    """
    names = [name.strip() for name in schemes.split(",") if name.strip()]
    points = {point.name: point for point in entry_points(group=GROUP)}
    for name in names:
        if name not in points:
            raise ValueError(f"no transport for {name!r}; installed: {', '.join(sorted(points))}")
    if not names:
        raise ValueError(f"no transport named; installed: {', '.join(sorted(points))}")
    opened: list[Transport] = []
    for index, name in enumerate(names):
        try:
            opened.append(points[name].load()())
        except TransportUnavailable as error:
            if not opened and index == len(names) - 1:
                raise
            log.warning("left transport %s out: %s", name, error)
    return opened


def schemes_for(schemes: str, pool: KvPool) -> str:
    """The default, for a pool in GPU memory, begins with CUDA IPC; whoever names others gets just those."""
    is_default = schemes == DEFAULT_SCHEMES and isinstance(pool, LendingStager)
    return f"cuda_ipc,{schemes}" if is_default and "cuda_ipc" in installed_schemes() else schemes


async def start_transports(transports: Sequence[Transport]) -> list[Transport]:
    """Start each and return those that run, in order. Raises TransportUnavailable when none does."""
    running: list[Transport] = []
    failures: list[str] = []
    for transport in transports:
        try:
            await transport.start()
        except TransportUnavailable as error:
            log.warning("left transport %s out: %s", transport.scheme, error)
            failures.append(f"{transport.scheme}: {error}")
        else:
            running.append(transport)
    if not running:
        raise TransportUnavailable("; ".join(failures) or "no transport given")
    return running
