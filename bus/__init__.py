"""The control plane: messages, subjects and the buses that carry them; floor 0, imports nothing of the house.

`NatsBus` and `MemoryBus` keep one contract (`base.py`, tests/bus/test_contract.py). Core messages are fast and may be lost,
jobs in the work queue are durable, the registry keeps the workers' cards.
"""

from . import messages, subjects
from .base import (
    Bus,
    BusDisconnected,
    BusError,
    Delivery,
    Handler,
    JobPuller,
    JobQueue,
    NoResponders,
    PulledJob,
    QueueFull,
    QueueUnavailable,
    Registry,
    RequestTimeout,
    Setting,
    SettingChanged,
    Settings,
    Subscription,
)
from .block_hash import block_hashes, block_hashes_of, chain_seed
from .ids import HandoffToken, RequestId, RouterId, WorkerId
from .jobs import JobLimits
from .memory_bus import MemoryBroker, MemoryBus
from .nats_bus import NatsBus
from .server import EmbeddedServer
from .token_state import OutboxTimes
from .tokens import TokenOutbox

__all__ = [
    "Bus",
    "BusDisconnected",
    "BusError",
    "Delivery",
    "EmbeddedServer",
    "HandoffToken",
    "Handler",
    "JobLimits",
    "JobPuller",
    "JobQueue",
    "MemoryBroker",
    "MemoryBus",
    "NatsBus",
    "NoResponders",
    "OutboxTimes",
    "PulledJob",
    "QueueFull",
    "QueueUnavailable",
    "Registry",
    "RequestId",
    "RequestTimeout",
    "RouterId",
    "Setting",
    "SettingChanged",
    "Settings",
    "Subscription",
    "TokenOutbox",
    "WorkerId",
    "block_hashes",
    "block_hashes_of",
    "chain_seed",
    "messages",
    "subjects",
]
