"""A job's deadline on this worker's own clock. Pure.

Hosts do not agree on the time of day, and a monotonic clock means something on its own host only. So a job says how much
time was left when it was sent, and when that was on its router's monotonic clock. Each router tells every half second what
its clock shows (`PlacedLoad.clock_s`). What lies between that and ours, when it arrives, is the distance of the clocks and
some delay; the least of the last few has the least delay. So a deadline may be taken for later than it is, by the delay of
a message, and never for earlier.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from ..bus.ids import RouterId
from ..bus.messages import PrefillJob

HEARD_MAX = 8  # few, for a host that was suspended has another distance afterwards
ROUTERS_MAX = 256


class RouterClocks:
    """How far ahead of each router's clock ours is."""

    def __init__(self) -> None:
        self._ahead_s: OrderedDict[RouterId, deque[float]] = OrderedDict()

    def heard(self, router: RouterId, clock_s: float, now: float) -> None:
        """The router's clock showed `clock_s` when it said so; a router that does not tell says 0."""
        if not clock_s:
            return
        self._ahead_s.setdefault(router, deque(maxlen=HEARD_MAX)).append(now - clock_s)
        self._ahead_s.move_to_end(router)
        if len(self._ahead_s) > ROUTERS_MAX:
            self._ahead_s.popitem(last=False)

    def deadline_s(self, job: PrefillJob, now: float) -> float:
        """Of a job that has come just now; infinity when it does not tell (its router is of an older version)."""
        if not job.time_left_s:
            return math.inf
        deadline_s = now + job.time_left_s
        if ahead_s := self._ahead_s.get(job.router_id):
            deadline_s = min(deadline_s, job.sent_s + job.time_left_s + min(ahead_s))
        return deadline_s
