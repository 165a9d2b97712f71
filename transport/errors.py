"""What can go wrong between two processes that move KV."""

from __future__ import annotations


class TransportError(OSError):
    """Base: a failure of the data plane that its caller can act on."""


class TransportUnavailable(TransportError):
    """This transport cannot run here; the text says why (a missing package, no such scheme)."""


class LinkLost(TransportError):
    """The link is gone; after this nothing more is written into any buffer that was posted on it."""


class HandoffRefused(TransportError):
    """The other side will not take this hand-off; `reason` is one of `frames.RefuseReason`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"hand-off refused: {reason}" + (f" ({detail})" if detail else ""))
        self.reason = reason
        self.detail = detail
