"""The data plane: KV blocks between processes; floor 0, imports nothing of the house.

An engine gives a `HandoffEndpoint` a `KvPool`; the decode side expects a token, the prefill side opens an order for it and
says which layers are ready. Blocks are used only when every byte has arrived and every digest fits (`receiver`, `sender`).
"""

from .base import (
    Buffer,
    Chunk,
    Expectation,
    HandoffEndpointLike,
    HandoffKey,
    KvPool,
    Link,
    Listener,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    Transport,
)
from .endpoint import EndpointStats, HandoffEndpoint
from .errors import HandoffRefused, LinkLost, TransportError, TransportUnavailable
from .layout import HANDOFF_PROTOCOL, KvLayout
from .pool import HostKvPool
from .registry import installed_schemes, open_transports
from .thread import EndpointThread

__all__ = [
    "HANDOFF_PROTOCOL",
    "Buffer",
    "Chunk",
    "EndpointStats",
    "EndpointThread",
    "Expectation",
    "HandoffEndpoint",
    "HandoffEndpointLike",
    "HandoffKey",
    "HandoffRefused",
    "HostKvPool",
    "KvLayout",
    "KvPool",
    "Link",
    "LinkLost",
    "Listener",
    "ReceiveEnd",
    "SendEnd",
    "SendOrder",
    "SendReleased",
    "Transport",
    "TransportError",
    "TransportUnavailable",
    "installed_schemes",
    "open_transports",
]
