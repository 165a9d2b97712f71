"""Hand-offs that ended in this engine, for its worker's metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..base import HandoffCounts
from .side_channel import ReceiveEnded, SendEnded


@dataclass(slots=True)
class EndedHandoffs:
    """Counted since the engine's start, by "landed" or the reason."""

    received: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    kv_bytes_received: int = 0
    kv_bytes_sent: int = 0

    def note(self, end: SendEnded | ReceiveEnded) -> None:
        """One more."""
        outcomes = self.sent if isinstance(end, SendEnded) else self.received
        outcome = end.reason or "landed"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if isinstance(end, SendEnded):
            self.kv_bytes_sent += end.kv_bytes
        else:
            self.kv_bytes_received += end.kv_bytes

    def counts(self) -> HandoffCounts:
        """As of now; what the links move bytes with is known in vLLM's own process alone."""
        return HandoffCounts(
            dict(self.received), dict(self.sent), self.kv_bytes_received, self.kv_bytes_sent, transports=()
        )
