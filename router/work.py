"""Prompt tokens that this router has placed and nobody has computed yet, by who will compute them. Pure.

Heartbeats are up to half a second old; what was placed since is known here at once, and in tokens where they count requests.
"""

from __future__ import annotations

from ..bus.ids import RequestId, WorkerId


class PlacedWork:
    """One entry for each request: its tokens, and the worker they wait for (None: whichever prefill worker pulls next)."""

    def __init__(self) -> None:
        self._of: dict[RequestId, tuple[WorkerId | None, int]] = {}
        self._tokens: dict[WorkerId | None, int] = {}
        self._changed: set[WorkerId] = set()

    def __len__(self) -> int:
        return len(self._of)

    def tokens(self, worker: WorkerId | None) -> int:
        """That wait for this worker; None: for any prefill worker."""
        return self._tokens.get(worker, 0)

    def place(self, request: RequestId, worker: WorkerId | None, tokens: int) -> None:
        """Its prompt waits for `worker`; a request that is known moves there."""
        self.done(request)
        self._of[request] = worker, tokens
        self._add(worker, tokens)

    def claim(self, request: RequestId, worker: WorkerId, tokens: int | None = None) -> None:
        """A prefill worker computes it now, so many tokens of it where that is known; unknown requests are ignored."""
        if entry := self._of.get(request):
            self.place(request, worker, entry[1] if tokens is None else tokens)

    def done(self, request: RequestId) -> None:
        """It is computed, or nobody will."""
        if entry := self._of.pop(request, None):
            worker, tokens = entry
            self._add(worker, -tokens)

    def take_changed(self) -> set[WorkerId]:
        """Workers with other tokens than when this was asked last."""
        changed, self._changed = self._changed, set()
        return changed

    def _add(self, worker: WorkerId | None, tokens: int) -> None:
        if left := self.tokens(worker) + tokens:
            self._tokens[worker] = left
        else:
            self._tokens.pop(worker, None)
        if worker is not None:
            self._changed.add(worker)
