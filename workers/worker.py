"""The worker process: an engine, the bus, and the role that joins them; from the first connection to the goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NoReturn, Protocol, TypeVar

import msgspec

from ..bus.base import Bus, BusError
from ..bus.ids import WorkerId
from ..bus.messages import WorkerCard
from ..bus.nats_bus import NatsBus
from ..bus.subjects import token
from .checkup import Checkup
from .config import WorkerConfig
from .decode import DecodeWorker
from .engines.base import Engine, EngineError, EngineInfo
from .metrics import serve_metrics
from .prefill import PrefillWorker
from .presence import Presence
from .stopping import Stop
from .watchdog import LOOK_S, Watchdog

log = logging.getLogger(__name__)
T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0  # for the engine; it promises as much


@dataclass(frozen=True, slots=True)
class Identity:
    """One incarnation of a worker."""

    worker_id: WorkerId
    epoch: int

    @staticmethod
    def new(config: WorkerConfig, rng: random.Random | None = None) -> Identity:
        """Raises ValueError when the configured name cannot be part of a subject."""
        rng = rng or random.SystemRandom()
        parts = [config.role, config.worker_id, rng.randbytes(4).hex()]
        return Identity(WorkerId(token("-".join(filter(None, parts)))), rng.getrandbits(63) or 1)


class Role(Protocol):
    """What `DecodeWorker` and `PrefillWorker` have in common."""

    listening: asyncio.Event  # set when work can come

    async def run(self) -> None:
        """Work until cancelled; then nothing of it is left. Raises EngineDead."""

    async def drain(self) -> None:
        """Take nothing more; returns when the last request has ended."""


def open_engine(config: WorkerConfig, identity: Identity) -> Engine:
    """The engine that `config` names; imported now, for vLLM takes seconds. Raises EngineError."""
    if config.engine == "sim":
        from .engines.sim.engine import SimEngine

        return SimEngine(config, worker_id=identity.worker_id, epoch=identity.epoch)
    from .engines.vllm.engine import VllmEngine

    return VllmEngine(config, worker_id=identity.worker_id, epoch=identity.epoch)


async def run_worker(
    config: WorkerConfig,
    *,
    bus: Bus | None = None,
    engine: Engine | None = None,
    identity: Identity | None = None,
    stop: asyncio.Event | None = None,
    on_ready: Callable[[WorkerCard], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Serve until told to stop; the process's exit code: 0 stopped, 1 failed.

    Without `stop` it listens to SIGTERM and SIGINT; without `on_ready` it prints one line of JSON on stdout. An `engine`
    that is passed in was made for `identity`. Raises ValueError for a name that no worker can have.
    """
    identity = identity or Identity.new(config)
    stopping = Stop(stop)
    with stopping.on_signals() if stop is None else contextlib.nullcontext():
        worker = Worker(config, identity, stopping, bus or NatsBus(config.nats, name=identity.worker_id), clock)
        try:
            return await worker.run(engine, on_ready or print_ready)
        except (BusError, EngineError) as error:
            log.error("worker failed: %s", error, extra={"worker_id": identity.worker_id})
            return 1
        finally:
            await worker.aclose()


def print_ready(card: WorkerCard) -> None:
    """Tell the supervisor, which waits for this line."""
    print(msgspec.json.encode({"ready": card.worker_id, "role": card.role}).decode(), flush=True)


def card_of(config: WorkerConfig, identity: Identity, info: EngineInfo) -> WorkerCard:
    return WorkerCard(
        worker_id=identity.worker_id,
        role=config.role,
        epoch=identity.epoch,
        model=config.served_name or PurePath(config.model).name or config.model,
        fingerprint=info.fingerprint,
        block_tokens=info.block_tokens,
        kv_blocks=info.kv_blocks,
        slots=info.slots,
        max_model_len=info.max_model_len,
        handoff_addresses=info.handoff_addresses,
        engine=info.description,
        tp_size=info.tp_size,
    )


class Worker:
    """One worker's parts, in the order they come up; `aclose` takes down whatever came up."""

    def __init__(
        self, config: WorkerConfig, identity: Identity, stop: Stop, bus: Bus, clock: Callable[[], float]
    ) -> None:
        self._config = config
        self._identity = identity
        self._stop = stop
        self._bus = bus
        self._clock = clock
        self._engine: Engine | None = None
        self._presence: Presence | None = None
        self._checkup: Checkup | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._stop_metrics: Callable[[], None] = lambda: None

    async def run(self, engine: Engine | None, on_ready: Callable[[WorkerCard], None]) -> int:
        """Raises BusError or EngineError when it cannot start or go on."""
        asked = self._own(self._stop.asked.wait(), "stop")
        start = self._own(self._start(engine), "start")
        await asyncio.wait([asked, start], return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            log.info("told to stop before the engine was ready")
            return 0
        card = await start
        assert self._engine is not None
        presence, role = self._join(card, self._engine)
        serving = self._own(role.run(), card.role)
        broken = [self._own(self._engine.failed(), "engine"), self._own(self._bus.fatal(), "bus"), serving]
        await asyncio.wait([self._own(role.listening.wait(), "listen"), *broken], return_when=asyncio.FIRST_COMPLETED)
        await presence.join()
        broken.append(self._own(presence.run(), "presence"))
        watch = self._watch(self._engine, presence)
        broken.append(self._own(watch, "watchdog"))
        assert self._checkup is not None
        broken.append(self._own(self._checkup.run(), "checkup"))
        log.info("ready: %s with %s", card.worker_id, card.engine)
        on_ready(card)
        await asyncio.wait([asked, *broken], return_when=asyncio.FIRST_COMPLETED)
        if asked.done() and not any(task.done() for task in broken):
            await self._drain(presence, role, broken)
        code = 0
        for task in broken:
            if task.done():
                error = task.exception()
                is_bug = error is not None and not isinstance(error, BusError | EngineError)
                log.error("%s failed: %s", task.get_name(), error or task.result(), exc_info=error if is_bug else None)
                code = 1
        await self._end(serving)
        return code

    async def aclose(self) -> None:
        """Leave nothing behind. Bounded."""
        for task in list(self._tasks):
            await self._end(task)
        if self._presence is not None:
            await self._presence.leave()
        self._stop_metrics()
        if self._engine is not None:
            try:
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._engine.aclose()
            except TimeoutError:
                log.error("the engine did not close within %g s", CLOSE_TIMEOUT_S)
        await self._bus.aclose()

    async def _start(self, engine: Engine | None) -> WorkerCard:
        await self._bus.connect()
        self._engine = engine or open_engine(self._config, self._identity)
        return card_of(self._config, self._identity, await self._engine.start())

    def _join(self, card: WorkerCard, engine: Engine) -> tuple[Presence, Role]:
        config = self._config
        presence = Presence(self._bus, config.pool, card, engine, heartbeat_s=config.heartbeat_s)
        self._presence = presence
        checkup = Checkup(self._bus, card, engine, transports=config.transports)
        self._checkup = checkup
        role: Role
        if config.role == "decode":
            decode = role = DecodeWorker(
                self._bus,
                config.pool,
                card,
                engine,
                handoff_timeout_s=config.handoff_timeout_s,
                on_change=presence.changed,
            )
            checkup.otherwise = decode.on_control
            counts = None
        else:
            prefill = role = PrefillWorker(
                self._bus,
                config.pool,
                card,
                engine,
                handoff_timeout_s=config.handoff_timeout_s,
                on_change=presence.changed,
                clock=self._clock,
            )
            presence.prefill_tokens_per_s = lambda: prefill.throughput.tokens_per_s
            presence.waiting = lambda: prefill.held
            counts = prefill.counts
        presence.on_control = checkup.on_control
        if config.metrics_port:
            self._stop_metrics = serve_metrics(config.metrics_port, card, engine, counts)
        return presence, role

    async def _watch(self, engine: Engine, presence: Presence) -> NoReturn:
        """Give an engine that hangs up: from then on it is one that died."""
        watchdog = Watchdog(self._config.hang_timeout_s)
        while True:
            await asyncio.sleep(LOOK_S)
            load = engine.load()
            if watchdog.look(load, self._clock()):
                presence.stuck()
                engine.break_down(f"no step for {watchdog.stuck_s:.0f} s, though {load.due} requests wait for one")
                await asyncio.Event().wait()

    async def _drain(self, presence: Presence, role: Role, broken: Sequence[asyncio.Task[object]]) -> None:
        """Let running requests finish, within `grace_s` and until a second signal."""
        log.info("draining")
        presence.is_draining = True
        presence.changed()
        if self._checkup is not None:
            self._checkup.is_draining = True
        drained = self._own(role.drain(), "drain")
        hurried = self._own(self._stop.hurried.wait(), "hurry")
        await asyncio.wait(
            [drained, hurried, *broken], timeout=self._config.grace_s, return_when=asyncio.FIRST_COMPLETED
        )
        if not drained.done():
            log.warning("cancelled what still ran")

    def _own(self, work: Coroutine[None, None, T], name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        return task

    async def _end(self, task: asyncio.Task[object]) -> None:
        """Cancel it and wait; how it failed was said by then."""
        self._tasks.discard(task)
        task.cancel()
        await asyncio.wait([task], timeout=CLOSE_TIMEOUT_S)
        if task.done() and not task.cancelled():
            task.exception()
