"""Addresses of workers: "tcp://127.0.0.1:4000", "ucx://[::1]:4000"."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def join_address(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def split_address(address: str, scheme: str) -> tuple[str, int]:
    """Host and port. Raises ValueError for another scheme or a malformed address."""
    parts = urlsplit(address)
    if parts.scheme != scheme or not parts.hostname or not parts.port or parts.path:
        raise ValueError(f"not an address of {scheme}: {address!r}")
    return parts.hostname, parts.port


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
