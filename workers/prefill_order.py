"""Which of the jobs at hand a prefill worker computes next: fair between tenants and priorities, then by deadline. Pure.

Start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a flow is what one tenant asks for with one priority. Each of
its jobs has a start tag, the virtual time at which the flow has had its share for what came before; the flow with the
smallest tag goes next, and the virtual time is the tag of who went last. So two flows that both wait get prompt tokens in
the ratio of their weights, to within one job each, and a flow that was away saves nothing up. Within a flow the earliest
deadline goes first.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..bus.messages import PrefillJob

Item = TypeVar("Item")
PRIORITY_MAX = 8  # up and down; more would come to the same
FLOWS_MAX = 1024  # whose share is remembered


def weight_of(job: PrefillJob) -> float:
    """Its tenant's share, doubled for each step of priority: what is less urgent waits longer, and never for ever."""
    share = min(max(job.share, 1e-3), 1e3)
    return share * 2.0 ** min(max(job.priority, -PRIORITY_MAX), PRIORITY_MAX)


@dataclass(slots=True)
class _Flow(Generic[Item]):
    start: float
    jobs: list[tuple[float, int, PrefillJob, Item]] = field(default_factory=list)  # by deadline, then as they came


class JobOrder(Generic[Item]):
    """The jobs that wait, each with what its owner wants back."""

    def __init__(self) -> None:
        self._flows: dict[tuple[str, int], _Flow[Item]] = {}
        self._virtual = 0.0
        self._numbers = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: PrefillJob, item: Item, deadline_s: float) -> None:
        """It waits from now on; `deadline_s` is of the worker's own clock."""
        flow = self._flows.setdefault((job.tenant, job.priority), _Flow(self._virtual))
        if not flow.jobs:
            flow.start = max(flow.start, self._virtual)
        self._numbers += 1
        self._count += 1
        bisect.insort(flow.jobs, (deadline_s, self._numbers, job, item), key=lambda entry: entry[:2])

    def pop(self) -> Item | None:
        """Who goes next; None: nobody waits."""
        waiting = [(flow.start, *flow.jobs[0][:2], flow) for flow in self._flows.values() if flow.jobs]
        if not waiting:
            return None
        flow = min(waiting, key=lambda one: one[:3])[3]
        _, _, job, item = flow.jobs.pop(0)
        self._count -= 1
        self._virtual = flow.start
        flow.start += len(job.token_ids) / 4 / weight_of(job)
        self._forget()
        return item

    def take_out(self, is_out: Callable[[Item], bool]) -> list[Item]:
        """Those that wait no more, at no cost to their share."""
        out: list[Item] = []
        for flow in self._flows.values():
            left = [entry for entry in flow.jobs if not is_out(entry[3])]
            if len(left) < len(flow.jobs):
                out += [entry[3] for entry in flow.jobs if entry not in left]
                flow.jobs = left
        self._count -= len(out)
        return out

    def items(self) -> list[Item]:
        """All that wait, in no order that matters."""
        return [entry[3] for flow in self._flows.values() for entry in flow.jobs]

    def _forget(self) -> None:
        """A flow without jobs whose share is used up to no later than now is as good as new."""
        for key in [key for key, flow in self._flows.items() if not flow.jobs and flow.start <= self._virtual]:
            del self._flows[key]
        idle = [key for key, flow in self._flows.items() if not flow.jobs]
        if len(idle) > FLOWS_MAX:
            del self._flows[min(idle, key=lambda key: self._flows[key].start)]
