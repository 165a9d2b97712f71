"""The data plane: KV blocks between processes; floor 0, imports nothing of the house.

An engine gives a `HandoffEndpoint` a `KvPool`; the decode side expects a token, the prefill side opens an order for it and
says which layers are ready. Blocks are used only when every byte has arrived and every digest fits (`receiver`, `sender`).
"""

from .base import (
    Buffer,
    Chunk,
    Cut,
    DeviceBuffer,
    Expectation,
    Extent,
    GroupBlocks,
    HandoffEndpointLike,
    HandoffKey,
    KvPool,
    Link,
    Listener,
    Place,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    Transport,
)
from .endpoint import EndpointStats, HandoffEndpoint
from .errors import HandoffRefused, LinkLost, TransportError, TransportUnavailable
from .layout import HANDOFF_PROTOCOL, KvGroup, KvLayer, KvLayout, KvShape
from .pool import HostKvPool
from .probe import ProbeRate, ProbeReport
from .ranks import RankedEndpoint, RankProbe
from .registry import installed_schemes, open_transports
from .thread import EndpointThread

__all__ = [
    "HANDOFF_PROTOCOL",
    "Buffer",
    "Chunk",
    "Cut",
    "DeviceBuffer",
    "EndpointStats",
    "EndpointThread",
    "Expectation",
    "Extent",
    "GroupBlocks",
    "HandoffEndpoint",
    "HandoffEndpointLike",
    "HandoffKey",
    "HandoffRefused",
    "HostKvPool",
    "KvGroup",
    "KvLayer",
    "KvLayout",
    "KvPool",
    "KvShape",
    "Link",
    "LinkLost",
    "Listener",
    "Place",
    "ProbeRate",
    "ProbeReport",
    "RankProbe",
    "RankedEndpoint",
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
