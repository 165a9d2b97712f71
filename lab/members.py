"""The processes of a pool on virtual time: what `hocket router` and `hocket worker` run, started in this loop."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import Context
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from ..bus.base import BusError
from ..bus.ids import RequestId, RouterId
from ..bus.messages import WorkerCard
from ..router.api.stream import TokenPath
from ..router.config import RouterConfig
from ..router.metrics import RouterMetrics
from ..router.policies.base import Policy, load_policy
from ..router.router import Router
from ..transport.base import Expectation, Extent, KvPool, ReceiveEnd
from ..transport.endpoint import HandoffEndpoint
from ..transport.links.cursor import address_of
from ..transport.mover import DirectMover, Mover
from ..transport.movers import mover_for
from ..transport.pool import HostKvPool
from ..workers.config import WorkerConfig
from ..workers.engines.base import DecodeTask, EngineLoad, PrefillOutcome, PrefillTask, StepOutput
from ..workers.engines.sim.engine import SimEngine
from ..workers.worker import Identity, run_worker
from .bus import LabBus
from .clients import LAYERS, MODEL, POISON, VOCABULARY, Request, ask, token_table
from .link import LabTransport
from .loop import Process

if TYPE_CHECKING:
    from .house import House

RESTART_S = 1.0  # a supervisor's back-off
POISON_S = 0.01  # from the bite to the end


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
    hang_timeout_s: float = 2.0  # longer than any step of the shape
    step_log: str = ""

    def router_config(self, nats: str = "") -> RouterConfig:
        """Of each router."""
        return RouterConfig(
            nats=nats,
            model=MODEL,
            served_name=MODEL,
            policy=self.policy,
            local_prefill_tokens_max=self.local_prefill_tokens_max,
            request_timeout_s=self.request_timeout_s,
        )

    def worker_config(self, role: str, *, nats: str = "", transports: str = "lab") -> WorkerConfig:
        """Of each worker of a role."""
        return WorkerConfig(
            role="decode" if role == "decode" else "prefill",
            nats=nats,
            transports=transports,
            engine="sim",
            model=MODEL,
            slots=self.slots if role == "decode" else self.prefill_slots,
            block_tokens=self.block_tokens,
            kv_blocks=self.kv_blocks,
            chunk_tokens=self.chunk_tokens,
            handoff_timeout_s=self.handoff_timeout_s,
            hang_timeout_s=self.hang_timeout_s,
            step_log=self.step_log,
            sim_layers=LAYERS,
            sim_vocab=len(VOCABULARY),
            sim_itl_ms=self.itl_ms,
            sim_prefill_ms_per_token=self.prefill_ms_per_token,
        )


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


class _Engine(SimEngine):
    """Tells who gives it up, and what it swallows."""

    on_break_down: Callable[[str], None]
    on_poison: Callable[[list[int]], None]

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        """As every simulator, or its last task."""
        if POISON in task.token_ids:
            self.on_poison(task.token_ids)
        return await super().prefill(task)

    async def decode(self, task: DecodeTask, on_step: Callable[[StepOutput], None]) -> None:
        """As every simulator, or its last task."""
        if POISON in task.token_ids and task.handoff_token is None:
            self.on_poison(task.token_ids)
        await super().decode(task, on_step)

    def break_down(self, why: str) -> None:
        """As every simulator."""
        self.on_break_down(why)
        super().break_down(why)


class Member(ABC):
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

    @abstractmethod
    def leaks(self) -> list[str]:
        """What is held though nothing is to do."""


class WorkerMember(Member):
    """One incarnation of a worker."""

    def __init__(self, house: House, role: str, number: int, *, clock_skew_s: float = 0.0) -> None:
        shape, rng, loop = house.shape, house.rng, house.loop
        self.role, self.number = role, number
        self.config = shape.worker_config(role)
        self.identity = Identity.new(self.config, rng)
        super().__init__(house, self.identity.worker_id)
        self.engine = _Engine(
            self.config,
            worker_id=self.identity.worker_id,
            epoch=self.identity.epoch,
            transports=[LabTransport(house.net, self.process)],
            make_endpoint=partial(
                _Endpoint, house, clock=loop.time, nonce=rng.randbytes(16), make_mover=_mover_of(shape)
            ),
        )
        self.engine.on_break_down = self._on_break_down
        self.engine.on_poison = self._on_poison
        house.by_process[self.process] = self
        layers = [self.engine.kv.pools[0].buffers([Extent(n, tuple(range(shape.kv_blocks)))])[0] for n in range(LAYERS)]
        self._layers = [(address_of(layer), layer.nbytes) for layer in layers]
        self.card: WorkerCard | None = None
        self.stop = asyncio.Event()
        self.is_asked = False
        self.was_harmed = self.is_hung = False
        self.clock_skew_s = clock_skew_s
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
            clock=lambda: self.house.loop.time() + self.clock_skew_s,
        )

    def _on_ready(self, card: WorkerCard) -> None:
        self.card = card
        self.house.log.add(self.name, "ready")

    def ask_to_stop(self) -> None:
        """As SIGTERM."""
        self.house.log.add(self.name, "asked to stop")
        self.is_asked = True
        self.process.call_soon(self.stop.set)

    def hang(self) -> None:
        """Its engine makes no step any more; the rest of it does not notice."""
        self.house.log.add(self.name, "hangs")
        self.was_harmed = self.is_hung = True
        self.process.call_soon(self.engine.hang)

    def break_engine(self) -> None:
        """The engine dies, the worker around it lives and has to notice."""
        self.house.log.add(self.name, "lost its engine")
        self.was_harmed = True
        self.process.call_soon(self.engine.break_down, "it was broken")

    def _on_poison(self, token_ids: list[int]) -> None:
        # From outside: what a dead process has planned does not happen.
        self.house.loop.call_later(POISON_S, self._die, tuple(token_ids), context=Context())

    def _die(self, token_ids: tuple[int, ...]) -> None:
        if self.is_alive:
            self.house.poisoned[token_ids] = self.house.poisoned.get(token_ids, 0) + 1
            self.kill()
            self.house.restart(self)

    def _on_break_down(self, why: str) -> None:
        if not self.was_harmed:
            self.house.violate(f"{self.name} gave up an engine that nobody harmed: {why}")

    def go_on(self) -> None:
        """Its engine makes steps again."""
        self.house.log.add(self.name, "goes on")
        self.is_hung = False
        self.process.call_soon(self.engine.go_on)

    def _on_exit(self, task: asyncio.Task[int]) -> None:
        if task.cancelled() or task.exception() is not None:
            self.house.violate(f"{self.name} ended by {task.exception() if not task.cancelled() else 'cancellation'!r}")
            return
        self.house.log.add(self.name, f"exited with {task.result()}")
        if task.result() and self.is_asked and self.house.is_calm and not self.is_hung:
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

    def __init__(self, house: House, number: int, *, clock_skew_s: float = 0.0) -> None:
        super().__init__(house, f"router-{number}-{house.rng.randbytes(4).hex()}")
        self.number = number
        self.clock_skew_s = clock_skew_s
        shape = house.shape
        self.config = shape.router_config()
        self.router = Router(
            self.config,
            self.bus,
            _policy_class(shape.policy)(),
            router_id=RouterId(self.name),
            served_name=MODEL,
            metrics=RouterMetrics(),
            clock=self._clock,
            wall_clock=self._clock,
            rng=random.Random(house.rng.getrandbits(64)),
        )
        self.path = TokenPath(self.router, token_table())
        self.requests: dict[int, Request] = {}  # that have not ended
        self.is_ready = False
        self.task = self.process.start(self._run(), "router")
        self.task.add_done_callback(self._on_exit)

    def _clock(self) -> float:
        return self.house.loop.time() + self.clock_skew_s

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
        request_id = RequestId(self.house.rng.randbytes(16).hex())
        self.house.log.add(self.name, f"request {request.number} is {request_id}")
        timeout_s = request.timeout_s or self.config.request_timeout_s
        self.house.deadlines[request_id] = self.house.loop.time() + timeout_s
        await ask(
            self.router, self.path, request, self.house, request_id=request_id, deadline_s=self._clock() + timeout_s
        )
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


@cache
def _policy_class(name: str) -> type[Policy]:
    """Looked up once: entry points are read from hundreds of files."""
    return type(load_policy(name))


def _mover_of(shape: Shape) -> partial[Mover]:
    return partial(_direct if shape.is_direct else mover_for)


def _direct(pool: KvPool, staging_bytes: int) -> Mover:
    assert isinstance(pool, HostKvPool)
    return DirectMover(pool)
