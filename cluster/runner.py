"""Runs child processes: started, watched, restarted and stopped as `supervision.py` decides."""

from __future__ import annotations

import asyncio
import math
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .child import Child, Guard, child_environment
from .supervision import (
    AllReady,
    ChildSpec,
    Ended,
    Instruction,
    Kill,
    Limits,
    Restarting,
    Start,
    Supervision,
    Terminate,
    describe_exit,
)

_PROGRESS_S = 5.0
_LEVELS = {"DEBUG": 0, "INFO": 1, "WARNING": 2, "ERROR": 3, "CRITICAL": 4}


class Console:
    """What a user reads while it runs, on stderr; stdout has only the result."""

    def __init__(self, level: str) -> None:
        self._level = _LEVELS[level.upper()]
        self._started_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line about the cluster itself, with the seconds since the start."""
        self._print(f"[{time.monotonic() - self._started_s:5.1f} s] {text}")

    def record(self, name: str, level: str, line: str) -> bool:
        """A log record of a child; False when it is below the level, and so only in the child's log file."""
        is_shown = _LEVELS.get(level, 4) >= self._level
        if is_shown:
            self._print(f"{name:<10} | {line}")
        return is_shown

    def tail(self, child: Child) -> None:
        """The last lines of a child that failed, those that were not shown before."""
        lines = child.tail or ["(nothing more than what is above)"]
        self._print("\n".join((f"--- last lines of {child.name}; all of them: {child.log}", *lines)))

    def _print(self, text: str) -> None:
        with suppress(OSError):  # A terminal that was closed must not keep us from ending the children.
            print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class ChildPlan:
    """A process to run and keep running. `settings` reach it through stdin, as JSON."""

    name: str
    group: int  # groups stop in this order
    command: Sequence[str]
    settings: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


ReadyLines = Mapping[str, Mapping[str, str]]


class Runner:
    """Carries out what a `Supervision` decides. `run` once.

    Everything happens in callbacks of one loop, so no two decisions overlap. A child's exit is seen through its pidfd,
    its readiness by a JSON line `{"ready": ...}` on its stdout.
    """

    def __init__(self, plans: Sequence[ChildPlan], limits: Limits, *, logs: Path, console: Console) -> None:
        self._plans = {plan.name: plan for plan in plans}
        self._supervision = Supervision([ChildSpec(plan.name, plan.group) for plan in plans], limits)
        self._limits = limits
        self._logs = logs
        self._console = console
        self._children: dict[str, Child] = {}
        self._ready_lines: dict[str, Mapping[str, str]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._watchers: set[asyncio.Task[None]] = set()

    async def run(self, on_complete: Callable[[ReadyLines], Awaitable[str]]) -> int:
        """Run until told to stop, or until it fails. Returns the exit code.

        `on_complete` is awaited once all are ready, with their ready lines; text that it returns fails the cluster.
        """
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ended] = self._loop.create_future()
        self._on_complete = on_complete
        self._logs.mkdir(parents=True, exist_ok=True)
        for name in self._plans:
            (self._logs / f"{name}.log").unlink(missing_ok=True)
        self._guard = Guard(max(self._limits.stop_s))  # As patient as we are with a child.
        try:
            with self._signals():
                async with asyncio.TaskGroup() as self._tasks:
                    self._watchers.add(self._tasks.create_task(self._show_progress()))
                    self._do(self._supervision.start(self._loop.time()))
                    ended = await self._ended
                    for watcher in self._watchers:
                        watcher.cancel()
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._guard.close()
        if ended.exit_code != 0:
            self._console.say(f"failed: {ended.why}")
            if ended.culprit in self._children:
                self._console.tail(self._children[ended.culprit])
        return ended.exit_code

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            self._loop.add_signal_handler(number, self.stop)
        try:
            yield
        finally:
            for number in numbers:
                self._loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Stop in order; called again, kill at once."""
        again = self._supervision.is_stopping
        self._console.say("killing what is left" if again else "stopping (again to kill at once)")
        self._do(self._supervision.stop(self._loop.time()))

    def fail(self, why: str, culprit: str = "") -> None:
        """Something outside the children has failed: stop, and end with exit 1."""
        self._do(self._supervision.fail(why, culprit, self._loop.time()))

    def _do(self, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Start(name):
                    self._start(name)
                case Terminate(name):
                    self._children[name].terminate()
                case Kill(name):
                    self._children[name].kill()
                case AllReady():
                    self._watchers.add(self._tasks.create_task(self._complete()))
                case Restarting(name, exit_code, after_s):
                    why = describe_exit(exit_code)
                    self._console.say(f"{name} died ({why}); starting it again in {after_s:g} s")
                    self._console.tail(self._children[name])
                case Ended():
                    self._ended.set_result(instruction)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self._supervision.deadline()
        self._timer = None if math.isinf(deadline) else self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._do(self._supervision.tick(self._loop.time()))

    def _start(self, name: str) -> None:
        plan = self._plans[name]
        child = Child(
            name,
            plan.command,
            settings=plan.settings,
            environment=child_environment(plan.environment),
            log=self._logs / f"{name}.log",
            guard=self._guard,
        )
        self._children[name] = child
        try:
            child.start()
        except OSError as error:
            child.tail.append(f"cannot start {plan.command[0]}: {error}")
            self._loop.call_soon(self._exited, name, 127)  # Not at once: `_do` is carrying out its instructions.
        else:
            self._tasks.create_task(self._run_child(child), name=name)

    def _exited(self, name: str, code: int) -> None:
        self._do(self._supervision.exited(name, code, self._loop.time()))

    async def _run_child(self, child: Child) -> None:
        code = await child.run(
            lambda line: self._ready(child.name, line),
            lambda level, line: self._console.record(child.name, level, line),
        )
        self._exited(child.name, code)

    def _ready(self, name: str, line: Mapping[str, str]) -> None:
        self._console.say(f"{name} is ready")
        self._ready_lines[name] = line
        self._do(self._supervision.ready(name, self._loop.time()))

    async def _complete(self) -> None:
        failure = await self._on_complete(self._ready_lines)
        if failure:
            self.fail(failure)

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_S)
            waiting = self._supervision.waiting_for
            if waiting and not self._supervision.is_stopping:
                self._console.say(f"waiting for {', '.join(waiting)}")
