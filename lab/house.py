"""A whole pool on virtual time: real routers, real workers with the verifying simulator, on one loop, one bus, one network.

Nothing here decides anything: it starts what `hocket serve` starts, and pulls plugs. Everything random (names, epochs,
tokens, delays) comes from one seed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from ..bus.jobs import JobLimits
from ..bus.messages import PrefillJob, decode
from ..transport.base import ReceiveEnd
from ..transport.links.cursor import address_of
from .bus import LabBroker, LabBus
from .clients import Request
from .link import Network
from .log import EventLog
from .loop import Process, VirtualLoop, current_process
from .members import RESTART_S, Member, RouterMember, Shape, WorkerMember

NOTICED_S = 5.0  # silence that means death, and some more
STOP_S = 15.0  # for a worker that is asked to, its grace included


class House:
    """The pool; `violations` is what must stay empty."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, shape: Shape, log: EventLog) -> None:
        self.loop, self.rng, self.shape, self.log = loop, rng, shape, log
        self.broker = LabBroker(
            loop, rng, log, jobs=JobLimits(max_deliver=shape.max_deliver, ack_wait_s=shape.ack_wait_s)
        )
        self.net = Network(loop, rng)
        self.net.faults.bytes_per_s, self.net.faults.latency_s = shape.link_bytes_per_s, shape.link_latency_s
        self.net.on_access = self._on_access
        self._landed: set[bytes] = set()  # tokens of hand-offs
        self.by_process: dict[Process, WorkerMember] = {}
        self.violations: list[str] = []
        self.workers: list[WorkerMember] = []  # every incarnation
        self.routers: list[RouterMember] = []
        self.deadlines: dict[str, float] = {}  # of requests, on the loop's clock
        self.poisoned: dict[tuple[int, ...], int] = {}  # workers that died of a prompt
        self.is_calm = False  # no fault is at work any more
        self.is_stopping = False
        self.broker.store.on_ack = self._on_ack
        loop.set_exception_handler(self._on_exception)

    async def start(self, skews_s: Sequence[float] = ()) -> None:
        """Everything that the shape names, until it is ready; `skews_s` are of each host's clock, routers first."""
        skews = iter(skews_s)
        for number in range(self.shape.routers):
            self.routers.append(RouterMember(self, number, clock_skew_s=next(skews, 0.0)))
        for role, count in (("prefill", self.shape.prefill), ("decode", self.shape.decode)):
            for number in range(count):
                self.start_worker(role, number, clock_skew_s=next(skews, 0.0))
        await asyncio.sleep(1.0)

    def start_worker(self, role: str, number: int, *, clock_skew_s: float = 0.0) -> WorkerMember:
        """A new incarnation."""
        worker = WorkerMember(self, role, number, clock_skew_s=clock_skew_s)
        self.workers.append(worker)
        return worker

    def restart(self, member: Member, after_s: float = RESTART_S) -> None:
        """Another incarnation of a dead member, as a supervisor starts it."""
        self.loop.call_later(after_s, self._restart, member)

    def _restart(self, member: Member) -> None:
        if self.is_stopping:
            return
        if isinstance(member, WorkerMember):
            self.start_worker(member.role, member.number, clock_skew_s=member.clock_skew_s)
        elif isinstance(member, RouterMember):
            self.routers.append(RouterMember(self, member.number, clock_skew_s=member.clock_skew_s))

    @property
    def live_workers(self) -> list[WorkerMember]:
        return [worker for worker in self.workers if worker.is_alive]

    @property
    def live_routers(self) -> list[RouterMember]:
        return [router for router in self.routers if router.is_alive]

    def send(self, request: Request) -> None:
        """A client asks a router that takes connections."""
        ready = [router for router in self.live_routers if router.is_ready]
        if ready:
            self.rng.choice(ready).take(request)
        else:
            self.ended(request, "no_router")

    def ended(self, request: Request, how: str) -> None:
        """A client has its end."""
        request.ends.append(how)
        request.ended_s = self.loop.time()
        self.log.add("client", f"request {request.number} ended: {how} after {len(request.tokens)} tokens")
        if len(request.ends) > 1:
            self.violate(f"request {request.number} ended twice: {request.ends}")

    def violate(self, what: str) -> None:
        """An invariant does not hold."""
        self.log.add("INVARIANT", what)
        self.violations.append(f"{self.loop.time():.6f} s: {what}")

    def on_received(self, end: ReceiveEnd) -> None:
        """A decode worker's expectation has ended."""
        if end.is_landed:
            self._landed.add(end.token)

    def _on_ack(self, bus: LabBus, payload: bytes) -> None:
        """A job is acked after its effect."""
        job = decode(payload)
        if isinstance(job, PrefillJob) and job.handoff_token not in self._landed:
            self.violate(f"{bus.process.name} acked {job.request_id}.{job.attempt}, whose KV has not landed")

    def on_expired(self, request_id: str) -> None:
        """A worker takes a request for too late."""
        if self.loop.time() < self.deadlines[request_id]:
            self.violate(f"{request_id} was given up before its deadline")

    def _on_access(self, process: Process, place: memoryview) -> None:
        """A link reads or writes blocks: somebody must still hold them."""
        worker = self.by_process[process]
        block = worker.block_at(address_of(np.frombuffer(place, np.uint8)))
        if block is not None and not worker.engine.is_held(block):
            self.violate(f"a link moves block {block} of {worker.name}, which nobody holds")

    def stale_members(self) -> list[str]:
        """Workers that a router counts on, and that have been dead for long enough; an engine that hung may end at any time."""
        since_s = self.loop.time() - NOTICED_S
        alive = {one.name for one in self.workers if one.process.died_s is None or one.process.died_s > since_s}
        return [
            f"{router.name} counts on {member.card.worker_id}, which is dead"
            for router in self.live_routers
            for member in router.router.membership.view.members()
            if member.card.worker_id not in alive
        ]

    def leaks(self) -> list[str]:
        """What is held though nothing is to do."""
        found = [leak for member in (*self.live_routers, *self.live_workers) for leak in member.leaks()]
        if jobs := self.broker.store.jobs:
            found.append(f"{jobs} jobs are left in the queue")
        return found

    async def stop(self) -> None:
        """Ask every worker to stop, and end the routers."""
        self.is_stopping = True
        for worker in self.live_workers:
            worker.ask_to_stop()
        end_s = self.loop.time() + STOP_S
        while self.live_workers and self.loop.time() < end_s:  # noqa: ASYNC110  # Virtual time.
            await asyncio.sleep(0.5)
        for worker in self.live_workers:
            self.violate(f"{worker.name} did not stop")
        for router in self.live_routers:
            router.task.cancel()
        await asyncio.sleep(1.0)
        for router in self.live_routers:
            router.process.kill()
        left = [task.get_name() for task in self.loop.open_tasks() if task is not asyncio.current_task()]
        if left:
            self.violate(f"tasks are left: {left}")
        if self.broker.handler_errors:
            self.violate(f"{self.broker.handler_errors} handlers failed")

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        task = context.get("task") or context.get("future")
        process = getattr(task, "process", None)
        if "never retrieved" in str(context["message"]) and (process is None or process.is_dead):
            return  # Of a process that was killed.
        # The message names callbacks by their addresses in memory: another run has others.
        self.violate(repr(context.get("exception") or context["message"]))

    @contextmanager
    def logging(self, level: int = logging.INFO) -> Iterator[None]:
        """What the house's own loggers say goes into the event log; a traceback in it is a violation."""
        logger, handler = logging.getLogger("hocket"), _LogHandler(self)
        before = logger.level, logger.propagate
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]


class _LogHandler(logging.Handler):
    def __init__(self, house: House) -> None:
        super().__init__()
        self._house = house

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        facts = [
            f"{name}={value}"
            for name in ("request_id", "worker_id", "handoff")
            if (value := record.__dict__.get(name)) is not None
        ]
        text = " ".join([record.getMessage(), *facts])
        self._house.log.add(process.name if process else "-", text)
        if record.msg == "refused a job: %s" and record.args == ("its deadline has passed",):
            self._house.on_expired(record.__dict__["request_id"])
        if record.exc_info:
            self._house.violate(f"{text}: {record.exc_info[1]!r}")
