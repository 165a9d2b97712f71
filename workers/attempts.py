"""Fencing by attempt: what a worker remembers of requests that it does not hold any more."""

from __future__ import annotations

from collections import OrderedDict

REMEMBERED_MAX = 8192  # requests; a message older than that many requests does not come any more


class RecentAttempts:
    """The highest attempt seen of each request, the latest so many requests."""

    def __init__(self, requests_max: int = REMEMBERED_MAX) -> None:
        self._requests_max = requests_max
        self._attempts: OrderedDict[str, int] = OrderedDict()

    def note(self, request_id: str, attempt: int) -> None:
        self._attempts[request_id] = max(attempt, self._attempts.get(request_id, attempt))
        self._attempts.move_to_end(request_id)
        if len(self._attempts) > self._requests_max:
            self._attempts.popitem(last=False)

    def covers(self, request_id: str, attempt: int) -> bool:
        """This attempt or a newer one was noted."""
        return self._attempts.get(request_id, -1) >= attempt

    def get(self, request_id: str) -> int | None:
        return self._attempts.get(request_id)
