"""Decides what to do about child processes: pure state, told what happened and when, answers with instructions.

A child starts, becomes ready, and runs until it is told to stop. One that dies before the cluster was ever complete fails
the start at once (its settings are wrong, trying again changes nothing); one that dies later is started again after a
back-off, and too many deaths in a minute fail the cluster. Stopping goes group by group, so that whoever depends on
another process ends before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 8.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process to be supervised. Groups stop in their order, lowest first."""

    name: str
    group: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient the supervisor is. `stop_s` has one entry for each group: SIGTERM to SIGKILL."""

    start_timeout_s: float
    stop_s: Sequence[float]
    deaths_max: int = 5
    deaths_window_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """Start this child."""

    name: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """Send this child SIGTERM."""

    name: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Send SIGKILL to this child and everything it started."""

    name: str


@dataclass(frozen=True, slots=True)
class AllReady:
    """Every child is ready, for the first time."""


@dataclass(frozen=True, slots=True)
class Restarting:
    """A child died and will be started again; for the log."""

    name: str
    exit_code: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """No child is left. Exit 0: told to stop; 1: failed, and `why` says of what (`culprit` is the child's name)."""

    exit_code: int
    why: str
    culprit: str


Instruction = Start | Terminate | Kill | AllReady | Restarting | Ended


class Stage(Enum):
    """Where a child is in its life."""

    STARTING = auto()
    READY = auto()
    BACKOFF = auto()
    STOPPING = auto()
    GONE = auto()


@dataclass(slots=True)
class _Child:
    spec: ChildSpec
    stage: Stage = Stage.GONE
    deadline: float = math.inf
    backoff_s: float = BACKOFF_FIRST_S
    is_timed_out: bool = False
    deaths: deque[float] = field(default_factory=deque)

    @property
    def is_alive(self) -> bool:
        return self.stage in (Stage.STARTING, Stage.READY, Stage.STOPPING)


class Supervision:
    """The state of all children. Times are of one monotonic clock, in seconds."""

    def __init__(self, children: Iterable[ChildSpec], limits: Limits) -> None:
        self._children = {spec.name: _Child(spec) for spec in children}
        self._limits = limits
        self._was_complete = False
        self._group: int | None = None  # the group that is stopping; None while the cluster is to run
        self._outcome = Ended(0, "", "")
        self._has_ended = False

    @property
    def is_stopping(self) -> bool:
        return self._group is not None

    @property
    def waiting_for(self) -> list[str]:
        """The children that are not ready yet."""
        return [name for name, child in self._children.items() if child.stage is not Stage.READY]

    @property
    def alive(self) -> list[str]:
        """The children that have a process."""
        return [name for name, child in self._children.items() if child.is_alive]

    def deadline(self) -> float:
        """When `tick` must be called at the latest; infinity when nothing is waited for."""
        return min((child.deadline for child in self._children.values()), default=math.inf)

    def start(self, now: float) -> list[Instruction]:
        """Start everything."""
        return [self._start(child, now) for child in self._children.values()]

    def _start(self, child: _Child, now: float) -> Start:
        child.stage, child.deadline, child.is_timed_out = Stage.STARTING, now + self._limits.start_timeout_s, False
        return Start(child.spec.name)

    def ready(self, name: str, now: float) -> list[Instruction]:
        """The child says that it is ready."""
        child = self._children[name]
        if child.stage is not Stage.STARTING:
            return []
        child.stage, child.deadline = Stage.READY, math.inf
        if self._was_complete or self.waiting_for:
            return []
        self._was_complete = True
        return [AllReady()]

    def exited(self, name: str, exit_code: int, now: float) -> list[Instruction]:
        """The child's process has ended; `exit_code` is negative for a signal."""
        child = self._children[name]
        was_stopping = child.stage is Stage.STOPPING or self.is_stopping
        child.stage, child.deadline = Stage.GONE, math.inf
        if was_stopping:
            return self._next_group(now)
        if child.is_timed_out and not self._was_complete:
            return self.fail(f"{name} was not ready after {self._limits.start_timeout_s:g} s", name, now)
        if not self._was_complete:
            return self.fail(f"{name} ended while starting ({describe_exit(exit_code)})", name, now)
        return self._died(child, exit_code, now)

    def _died(self, child: _Child, exit_code: int, now: float) -> list[Instruction]:
        name, window_s = child.spec.name, self._limits.deaths_window_s
        if not child.deaths or now - child.deaths[-1] > window_s:
            child.backoff_s = BACKOFF_FIRST_S
        child.deaths.append(now)
        while now - child.deaths[0] > window_s:
            child.deaths.popleft()
        if len(child.deaths) > self._limits.deaths_max:
            why = f"{name} died {len(child.deaths)} times in {window_s:g} s (last: {describe_exit(exit_code)})"
            return self.fail(why, name, now)
        after_s = child.backoff_s
        child.stage, child.deadline = Stage.BACKOFF, now + after_s
        child.backoff_s = min(2 * child.backoff_s, BACKOFF_MAX_S)
        return [Restarting(name, exit_code, after_s)]

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        instructions: list[Instruction] = []
        for child in self._children.values():
            if child.deadline > now:
                continue
            if child.stage is Stage.BACKOFF:
                instructions.append(self._start(child, now))
            else:  # Not ready in time, or not gone in time: both end by force, and `exited` says how it goes on.
                child.deadline, child.is_timed_out = math.inf, True
                instructions.append(Kill(child.spec.name))
        return instructions

    def stop(self, now: float) -> list[Instruction]:
        """The user asks for the end; asked again, it comes at once."""
        if not self.is_stopping:
            self._group = -1
            return self._next_group(now)
        for child in self._children.values():
            child.deadline = math.inf
            if child.stage is Stage.BACKOFF:
                child.stage = Stage.GONE
        return [Kill(name) for name in self.alive] or self._next_group(now)

    def fail(self, why: str, culprit: str, now: float) -> list[Instruction]:
        """The cluster cannot go on: stop everything and end with exit 1. Only the first reason counts."""
        if self.is_stopping:
            return []
        self._outcome = Ended(1, why, culprit)
        return self.stop(now)

    def _next_group(self, now: float) -> list[Instruction]:
        """Go on to the next group once nobody of the current one is left."""
        assert self._group is not None
        if self._has_ended or any(
            child.is_alive and child.spec.group <= self._group for child in self._children.values()
        ):
            return []
        left = [child for child in self._children.values() if child.is_alive]
        if not left:
            self._has_ended = True
            return [self._outcome]
        self._group = min(child.spec.group for child in left)
        for child in self._children.values():
            if child.stage is Stage.BACKOFF:
                child.stage, child.deadline = Stage.GONE, math.inf
        members = [child for child in left if child.spec.group == self._group]
        for child in members:
            child.stage, child.deadline = Stage.STOPPING, now + self._limits.stop_s[self._group]
        return [Terminate(child.spec.name) for child in members]


def describe_exit(exit_code: int) -> str:
    """`exit 1` or `killed by signal 9`."""
    return f"killed by signal {-exit_code}" if exit_code < 0 else f"exit {exit_code}"
