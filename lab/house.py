"""A whole pool on virtual time: real routers, real workers with the verifying simulator, on one loop, one bus, one network.

Nothing here decides anything: it starts what `hocket serve` starts, and pulls plugs. Everything random (names, epochs,
tokens, delays) comes from one seed.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from ..bus.base import BusError
from ..bus.ids import RequestId, RouterId
from ..bus.jobs import JobLimits
from ..bus.messages import PrefillJob, SamplingParams, WorkerCard, decode, pack_tokens
from ..router.api.stream import Stream, TokenPath
from ..router.config import RouterConfig
from ..router.generation import Failure, Generation, RouterError
from ..router.metrics import RouterMetrics
from ..router.policies.base import load_policy
from ..router.router import Router
from ..router.text.detokenize import TableDetokenizer, TokenTable
from ..transport.base import Expectation, Extent, KvPool, ReceiveEnd
from ..transport.endpoint import HandoffEndpoint
from ..transport.links.cursor import address_of
from ..transport.mover import DirectMover, Mover
from ..transport.movers import mover_for
from ..transport.pool import HostKvPool
from ..workers.config import WorkerConfig
from ..workers.engines.base import EngineLoad
from ..workers.engines.sim.engine import SimEngine
from ..workers.engines.sim.kv import expected_tokens
from ..workers.worker import Clocks, Identity, run_worker
from .bus import LabBroker, LabBus
from .link import LabTransport, Network
from .log import EventLog
from .loop import Process, VirtualLoop, current_process

VOCABULARY = range(1000)
LAYERS = 2
MODEL = "sim"
RESTART_S = 1.0  # a supervisor's back-off


@dataclass(frozen=True, slots=True)
class Shape:
    """How large the pool is, and what its workers are like."""

    routers: int = 1
    prefill: int = 1
    decode: int = 1
    policy: str = "kv"
    local_prefill_tokens_max: int = 8
    request_timeout_s: float = 60.0
    slots: int = 4
    prefill_slots: int = 2
    block_tokens: int = 8
    kv_blocks: int = 64
    chunk_tokens: int = 32
    prefill_ms_per_token: float = 1.0
    itl_ms: float = 20.0
    handoff_timeout_s: float = 8.0
    ack_wait_s: float = 15.0
    link_bytes_per_s: float = 1e9
    link_latency_s: float = 0.0002
    is_direct: bool = True  # links write into the blocks themselves, not into staging memory
    max_deliver: int = 4


@dataclass
class Request:
    """What a client asks, and what it got."""

    number: int
    prompt: list[int]
    sampling: SamplingParams
    arrival_s: float
    leaves_s: float | None = None  # after its arrival
    tokens: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # exactly one, at last
    ended_s: float = 0.0

    @cached_property
    def right_answer(self) -> list[int]:
        """From the prompt alone."""
        return expected_tokens(self.prompt, self.sampling, planes=LAYERS, vocabulary=VOCABULARY)


@cache
def token_table() -> TokenTable:
    """A vocabulary whose text can be read back: token 17 is "17,"."""
    return TokenTable(Tokenizer(WordLevel({f"{token},": token for token in VOCABULARY}, unk_token="0,")))


class Recorder:
    """A client's end of the stream; implements `TextWriter`."""

    def __init__(self, house: House, request: Request) -> None:
        self._house = house
        self._request = request
        self.ended = asyncio.Event()

    def write(self, parts: list[bytes], logprobs: Sequence[object]) -> None:
        """Tokens have come."""
        request = self._request
        first = len(request.tokens)
        request.tokens += [int(text) for text in b"".join(parts).split(b",")[:-1]]
        if request.ends:
            self._house.violate(f"request {request.number} got tokens after its end")
        if request.tokens[first:] != request.right_answer[first : len(request.tokens)]:
            self._house.violate(f"request {request.number} got wrong tokens from {first} on: {request.tokens}")

    def end(self, parts: list[bytes], logprobs: Sequence[object], finish_reason: str, output_tokens: int) -> None:
        """The answer is whole."""
        self.write(parts, logprobs)
        if len(self._request.tokens) != len(self._request.right_answer):
            self._house.violate(f"request {self._request.number} ended after {output_tokens} tokens")
        self.finish("answered")

    def fail(self, failure: Failure) -> None:
        """It ends with an error."""
        self.finish(failure.code)

    def finish(self, how: str) -> None:
        """The one end."""
        self._house.ended(self._request, how)
        self.ended.set()


class _Endpoint(HandoffEndpoint):
    """Tells the house what has landed."""

    def __init__(self, house: House, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._house = house

    def expect(self, expectation: Expectation, on_end: Callable[[ReceiveEnd], None]) -> None:
        """As every endpoint."""

        def ended(end: ReceiveEnd) -> None:
            self._house.on_received(end)
            on_end(end)

        super().expect(expectation, ended)


class Member:
    """A process of the pool."""

    def __init__(self, house: House, name: str) -> None:
        self.house = house
        self.name = name
        self.process = Process(house.loop, name)
        self.bus = LabBus(house.broker, self.process)

    @property
    def is_alive(self) -> bool:
        return not self.process.is_dead

    def kill(self) -> None:
        """As SIGKILL: its connections end, its links too."""
        self.house.log.add(self.name, "killed")
        self.process.kill()
        self.house.broker.leave(self.bus)
        self.house.net.on_killed(self.process)

    def leaks(self) -> list[str]:
        """What is held though nothing is to do."""
        raise NotImplementedError


class WorkerMember(Member):
    """One incarnation of a worker."""

    def __init__(self, house: House, role: str, number: int, *, clock_skew_s: float = 0.0) -> None:
        shape, rng, loop = house.shape, house.rng, house.loop
        self.role, self.number = role, number
        self.config = WorkerConfig(
            role="decode" if role == "decode" else "prefill",
            engine="sim",
            model=MODEL,
            slots=shape.slots if role == "decode" else shape.prefill_slots,
            block_tokens=shape.block_tokens,
            kv_blocks=shape.kv_blocks,
            chunk_tokens=shape.chunk_tokens,
            handoff_timeout_s=shape.handoff_timeout_s,
            sim_layers=LAYERS,
            sim_vocab=len(VOCABULARY),
            sim_itl_ms=shape.itl_ms,
            sim_prefill_ms_per_token=shape.prefill_ms_per_token,
        )
        self.identity = Identity.new(self.config, rng)
        super().__init__(house, self.identity.worker_id)
        self.engine = SimEngine(
            self.config,
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            transports=[LabTransport(house.net, self.process)],
            make_endpoint=partial(
                _Endpoint, house, clock=loop.time, nonce=rng.randbytes(16), make_mover=_mover_of(shape)
            ),
        )
        house.by_process[self.process] = self
        layers = [self.engine.kv.pools[0].buffers([Extent(n, tuple(range(shape.kv_blocks)))])[0] for n in range(LAYERS)]
        self._layers = [(address_of(layer), layer.nbytes) for layer in layers]
        self.card: WorkerCard | None = None
        self.stop = asyncio.Event()
        self.is_asked = False
        self._clocks = Clocks(loop.time, lambda: loop.time() + clock_skew_s)
        self.task = self.process.start(self._run(), "worker")
        self.task.add_done_callback(self._on_exit)

    def block_at(self, address: int) -> int | None:
        """The KV block that lies there; None for other memory."""
        for start, nbytes in self._layers:
            if start <= address < start + nbytes:
                return (address - start) * self.config.kv_blocks // nbytes
        return None

    async def _run(self) -> int:
        return await run_worker(
            self.config,
            bus=self.bus,
            engine=self.engine,
            identity=self.identity,
            stop=self.stop,
            on_ready=self._on_ready,
            clocks=self._clocks,
        )

    def _on_ready(self, card: WorkerCard) -> None:
        self.card = card
        self.house.log.add(self.name, "ready")

    def ask_to_stop(self) -> None:
        """As SIGTERM."""
        self.house.log.add(self.name, "asked to stop")
        self.is_asked = True
        self.process.call_soon(self.stop.set)

    def _on_exit(self, task: asyncio.Task[int]) -> None:
        if task.cancelled() or task.exception() is not None:
            self.house.violate(f"{self.name} ended by {task.exception() if not task.cancelled() else 'cancellation'!r}")
            return
        self.house.log.add(self.name, f"exited with {task.result()}")
        if task.result() and self.is_asked and self.house.is_calm:
            self.house.violate(f"{self.name} was asked to stop and exited with {task.result()}")
        self.house.loop.call_soon(self.kill)  # Its sockets end with it.
        self.house.restart(self)

    def leaks(self) -> list[str]:
        """What is held though nothing is to do."""
        stats, load = self.engine.endpoint.stats, self.engine.load()
        found = [f"{self.name} holds {load}"] if load != EngineLoad(0, 0, self.engine.kv.blocks) else []
        if stats.sending or stats.receiving:
            found.append(f"{self.name} has {stats.sending} orders and {stats.receiving} expectations open")
        return found


class RouterMember(Member):
    """One incarnation of a router."""

    def __init__(self, house: House, number: int) -> None:
        super().__init__(house, f"router-{number}-{house.rng.randbytes(4).hex()}")
        self.number = number
        shape = house.shape
        self.config = RouterConfig(
            model=MODEL,
            served_name=MODEL,
            policy=shape.policy,
            local_prefill_tokens_max=shape.local_prefill_tokens_max,
            request_timeout_s=shape.request_timeout_s,
        )
        self.router = Router(
            self.config,
            self.bus,
            load_policy(shape.policy),
            router_id=RouterId(self.name),
            served_name=MODEL,
            metrics=RouterMetrics(CollectorRegistry()),
            clock=house.loop.time,
            wall_clock=house.loop.time,
            rng=random.Random(house.rng.getrandbits(64)),
        )
        self.path = TokenPath(self.router, token_table())
        self.requests: dict[int, Request] = {}  # that have not ended
        self.is_ready = False
        self.task = self.process.start(self._run(), "router")
        self.task.add_done_callback(self._on_exit)

    async def _run(self) -> None:
        while True:
            try:
                await self.bus.connect()
                break
            except BusError:
                await asyncio.sleep(RESTART_S)
        await self.router.run(self.path, self.path.on_frame, self._on_ready)

    def _on_ready(self) -> None:
        self.is_ready = True
        self.house.log.add(self.name, "ready")

    def _on_exit(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.house.violate(f"{self.name} ended by {task.exception()!r}")

    def take(self, request: Request) -> None:
        """A client's request comes in."""
        self.requests[request.number] = request
        self.process.start(self._answer(request), f"request {request.number}")

    async def _answer(self, request: Request) -> None:
        """What `api.exchange` does, without HTTP."""
        recorder = Recorder(self.house, request)
        stream_id = self.path.open(Stream(TableDetokenizer(token_table()), recorder))

        def release(how: str) -> None:
            if self.path.close(stream_id):
                self.router.cancel(stream_id)
                recorder.finish(how)

        if request.leaves_s is not None:
            self.house.loop.call_later(request.leaves_s, release, "left")
        generation = Generation(
            RequestId(self.house.rng.randbytes(16).hex()),
            MODEL,
            pack_tokens(request.prompt),
            len(request.prompt),
            request.sampling,
            self.house.loop.time() + self.config.request_timeout_s,
        )
        self.house.log.add(self.name, f"request {request.number} is {generation.request_id}")
        try:
            await self.router.start(generation, stream_id)
        except RouterError as error:
            release(error.code)
        await recorder.ended.wait()
        self.requests.pop(request.number, None)

    def kill(self) -> None:
        """Its clients see their connections end."""
        super().kill()
        for request in self.requests.values():
            if not request.ends:
                self.house.ended(request, "router_lost")
        self.requests.clear()

    def leaks(self) -> list[str]:
        """What is held though nothing is to do."""
        found = [f"{self.name} has {self.router.in_flight} requests open"] if self.router.in_flight else []
        if len(self.path):
            found.append(f"{self.name} has {len(self.path)} streams open")
        held = {member.card.worker_id: dict(member.in_flight) for member in self.router.membership.view.members()}
        found += [f"{self.name} counts {streams} on {worker}" for worker, streams in held.items() if streams]
        return found


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
        self.is_calm = False  # no fault is at work any more
        self.is_stopping = False
        self.broker.store.on_ack = self._on_ack
        loop.set_exception_handler(self._on_exception)

    async def start(self, skews_s: Sequence[float] = ()) -> None:
        """Everything that the shape names, until it is ready; `skews_s` are of each worker's wall clock."""
        skews = iter(skews_s)
        for number in range(self.shape.routers):
            self.routers.append(RouterMember(self, number))
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
            self.start_worker(member.role, member.number)
        elif isinstance(member, RouterMember):
            self.routers.append(RouterMember(self, member.number))

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

    def _on_access(self, process: Process, place: memoryview) -> None:
        """A link reads or writes blocks: somebody must still hold them."""
        worker = self.by_process[process]
        block = worker.block_at(address_of(np.frombuffer(place, np.uint8)))
        if block is not None and not worker.engine.is_held(block):
            self.violate(f"a link moves block {block} of {worker.name}, which nobody holds")

    def stale_members(self) -> list[str]:
        """Workers that a router counts on, and that are dead; once every silence was long enough."""
        alive = {worker.name for worker in self.live_workers}
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
        await asyncio.sleep(15.0)
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
        if record.exc_info:
            self._house.violate(f"{text}: {record.exc_info[1]!r}")


def _mover_of(shape: Shape) -> partial[Mover]:
    return partial(_direct if shape.is_direct else mover_for)


def _direct(pool: KvPool, staging_bytes: int) -> Mover:
    assert isinstance(pool, HostKvPool)
    return DirectMover(pool)
