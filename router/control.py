"""The shell around the policies: reads the stored document, switches to it, and answers the operator's questions.

A router is told of a new document, and reads it again whenever it reconnects and every `REREAD_S`. What it cannot load it
does not use: the last good version goes on deciding, and the status says why.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import xxhash

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery
from ..bus.ids import RouterId
from .control_messages import (
    Answer,
    AskLoad,
    AskPolicies,
    AskReceipt,
    PoliciesTried,
    PolicyConfig,
    PolicyDocument,
    PolicyStatus,
    ReceiptAnswer,
    RouterLoad,
    TryPolicies,
    decode_question,
    encode,
)
from .metrics import RouterMetrics
from .policies.base import Policy, PolicyError, RequestView, WorkerView, load_policy
from .policy_set import PolicySet
from .receipts import Receipts

log = logging.getLogger(__name__)

REREAD_S = 10.0
LOAD_TIMEOUT_S = 5.0
"""A user's module may import much; while it does, the router goes on with the policies it has."""
QUESTIONS_MAX = 16
TRIAL_PICKS = 3
START_TIMEOUT_S = 2.0
"""A router does not wait longer for a store that is away: it starts with its own policy and reads on."""

Inputs = tuple[RequestView, Sequence[WorkerView]]
Made = TypeVar("Made")


class Control:
    """Keeps a router's `PolicySet` in step with the pool's document; `install` puts a new one in place.

    It begins with `policy`, as `config` names it, which decides until there is a document.
    """

    def __init__(
        self,
        bus: Bus,
        pool: str,
        router_id: RouterId,
        config: PolicyConfig,
        policy: Policy,
        receipts: Receipts,
        *,
        install: Callable[[PolicySet], None],
        load: Callable[[], RouterLoad],
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self.policies = PolicySet(
            config, [policy], version=0, timer=time.perf_counter, scratch_rng=random.Random(), on_replaced=self._on_replaced
        )  # fmt: skip
        self._bus = bus
        self._pool = pool
        self._router_id = router_id
        self._receipts = receipts
        self._install = install
        self._load_now = load
        self._metrics = metrics
        self._clock = clock
        self._since_s = clock()
        self._sources: dict[str, str] = {name: source_digest(name) for name in config.seats}
        self._revision: int | None = None  # of the document that decides
        self._problem = ""
        self._reading = asyncio.Lock()
        self._questions = 0
        self._reread = asyncio.Event()
        self._tasks: asyncio.TaskGroup | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Take over the stored document, if there is one, and begin to hear."""
        self._tasks = tasks
        self._bus.on_connection(lambda is_connected: self._reread.set() if is_connected else None)
        await self._bus.subscribe(subjects.routers(self._pool), self._on_question)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self.read()
        except TimeoutError:
            log.warning("the stored policies could not be read in time")
            self._reread.set()
        tasks.create_task(self._keep_reading(), name="read-policies")

    async def read(self) -> None:
        """Switch to the stored document unless it decides already. What is wrong with it is in `status()`."""
        async with self._reading:
            try:
                stored = await self._bus.settings.get(self._pool)
            except BusError as error:
                log.info("the stored policies could not be read: %s", error)
                return
            if stored is None or stored.revision == self._revision:
                return
            try:
                document = msgspec.json.decode(stored.value, type=PolicyDocument)
                policies = await self._load(document)
            except (msgspec.MsgspecError, PolicyError) as error:
                self._refuse(str(error))
                return
            self._revision = stored.revision
            self._refuse("")
            self._switch(policies)

    def status(self) -> PolicyStatus:
        """What decides here, and how it does."""
        policies = self.policies
        return PolicyStatus(
            self._router_id,
            policies.version,
            policies.config,
            [arm.status for arm in policies.arms],
            [shadow.status for shadow in policies.shadows],
            self._clock() - self._since_s,
            self._problem,
            {name: digest for name, digest in self._sources.items() if digest},
        )

    # ---- switching

    def _switch(self, policies: PolicySet) -> None:
        log.info("policies version %d decide: %s", policies.version, msgspec.json.encode(policies.config).decode())
        for place in ("primary", "canary", "shadow"):
            self._metrics.policies_replaced.labels(place).set(0)
        self._metrics.policy_version.set(policies.version)
        self.policies, self._since_s = policies, self._clock()
        self._install(policies)

    def _on_replaced(self, place: str, policy: str, why: str) -> None:
        log.error("policy %s (%s) is replaced: it %s", policy, place, why)
        self._metrics.policies_replaced.labels(place).inc()

    def _refuse(self, problem: str) -> None:
        if problem and problem != self._problem:
            log.error("the stored policies are not used: %s", problem)
        self._problem = problem
        self._metrics.policy_refused.set(bool(problem))

    async def _load(self, document: PolicyDocument) -> PolicySet:
        """A policy that works and has not changed goes on with what it has learnt; raises PolicyError."""
        sources = await _in_thread(lambda: {name: source_digest(name) for name in document.config.seats})
        kept = self._kept(sources)

        def load() -> list[Policy]:
            return [kept[name].pop() if kept.get(name) else load_fresh(name) for name in document.config.seats]

        loaded = await _in_thread(load)
        self._sources = sources
        return self.policies.successor(document.config, loaded, version=document.version)

    def _kept(self, sources: dict[str, str]) -> dict[str, list[Policy]]:
        """Last is first: an arm's knowledge goes before a shadow's."""
        kept: dict[str, list[Policy]] = {}
        for seat in (*reversed(self.policies.shadows), *reversed(self.policies.arms)):
            name = seat.status.policy
            if not seat.is_out and not seat.status.raised and sources.get(name) == self._sources.get(name):
                kept.setdefault(name, []).append(seat.policy)
        return kept

    async def _keep_reading(self) -> None:
        while True:
            try:
                async with asyncio.timeout(REREAD_S):
                    await self._reread.wait()
            except TimeoutError:
                pass
            self._reread.clear()
            await self.read()

    # ---- answering

    def _on_question(self, delivery: Delivery) -> None:
        question = decode_question(delivery.payload)
        match question:
            case AskReceipt(request_id=request_id):
                found, held = self._receipts.find(request_id), len(self._receipts)
                oldest_s = self._receipts.oldest_s(self._clock())
                self._answer(delivery, ReceiptAnswer(self._router_id, found, held, oldest_s))
            case AskLoad():
                self._answer(delivery, self._load_now())
            case AskPolicies(reads=False):
                self._answer(delivery, self.status())
            case AskPolicies() | TryPolicies():
                if self._tasks is not None and self._questions < QUESTIONS_MAX:
                    self._questions += 1
                    self._tasks.create_task(self._work_on(question, delivery), name="operator-question")

    async def _work_on(self, question: AskPolicies | TryPolicies, delivery: Delivery) -> None:
        try:
            if isinstance(question, TryPolicies):
                problem = await self._try(question.config)
                self._answer(delivery, PoliciesTried(self._router_id, problem))
            else:
                await self.read()
                self._answer(delivery, self.status())
        finally:
            self._questions -= 1

    def _answer(self, delivery: Delivery, answer: Answer) -> None:
        if delivery.reply:
            self._bus.publish_nowait(delivery.reply, encode(answer))

    async def _try(self, config: PolicyConfig) -> str:
        """Load every policy and let it decide about the last request again; what is wrong, or ""."""
        newest = self._receipts.newest()
        inputs = (newest.request, newest.candidates) if newest is not None else None
        now = self._clock()

        def try_all() -> None:
            for name in config.seats:
                try_policy(name, config, inputs, now)

        try:
            await _in_thread(try_all)
        except PolicyError as error:
            return str(error)
        return ""


def load_fresh(name: str) -> Policy:
    """`load_policy`, but of a user's file or module as it is now. Raises PolicyError.

    A module is made anew and not reloaded in place: the policy that decides now goes on in the old one, whatever comes of it.
    """
    target, colon, _ = name.partition("?")[0].rpartition(":")
    if not colon or target.startswith(f"{__name__.partition('.')[0]}."):
        return load_policy(name)
    old = sys.modules.pop(target, None)
    path = target if target.endswith(".py") else getattr(old, "__file__", None)
    if path:  # Compiled files are told apart by second and length: an edit could be missed.
        Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)
    try:
        return load_policy(name)
    except PolicyError:
        if old is not None:
            sys.modules[target] = old
        raise


def try_policy(name: str, config: PolicyConfig, inputs: Inputs | None, now: float) -> None:
    """Load it and let it pick for `inputs`; raises PolicyError when it cannot or takes longer than its budget."""
    policy = load_fresh(name)
    if inputs is None:
        return
    request, workers = inputs
    picks_s = []
    for seed in range(TRIAL_PICKS):
        # Of this thread alone: the router's own loop runs beside it.
        start = time.thread_time()
        try:
            choice = policy.pick(request, workers, now, random.Random(seed))
            chosen = choice.worker_id
        except Exception as error:  # A user's policy may raise anything.
            raise PolicyError(f"policy {name!r} raised {type(error).__name__}: {error}") from error
        picks_s.append(time.thread_time() - start)
        if all(worker.worker_id != chosen for worker in workers):
            raise PolicyError(f"policy {name!r} chose {chosen!r}, which was not offered")
    if min(picks_s) * 1000 > config.pick_budget_ms:
        raise PolicyError(
            f"policy {name!r} takes {min(picks_s) * 1000:.1f} ms a pick, over its {config.pick_budget_ms:g} ms"
        )


def source_digest(name: str) -> str:
    """Tells one state of a user's file or module from another; "" for an installed policy, or when it is not there."""
    target, colon, _ = name.partition("?")[0].rpartition(":")
    if not colon:
        return ""
    try:
        path = target if target.endswith(".py") else getattr(importlib.util.find_spec(target), "origin", None)
        return xxhash.xxh3_64_hexdigest(Path(path).read_bytes()) if path else ""
    except (OSError, ImportError, ValueError):
        return ""


async def _in_thread(make: Callable[[], Made]) -> Made:
    """As asyncio.to_thread, but a user's module that never returns does not keep the process from ending.

    Raises PolicyError for whatever went wrong in it, and after `LOAD_TIMEOUT_S`.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Made] = loop.create_future()

    def settle(made: Made | None, error: PolicyError | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(made)  # type: ignore[arg-type]  # Made itself may be None.

    def work() -> None:
        made: Made | None = None
        failed: PolicyError | None = None
        try:
            made = make()
        except PolicyError as error:
            failed = error
        except Exception as error:  # What belongs to a user's module may raise anything.
            failed = PolicyError(f"{type(error).__name__}: {error}")
        try:
            loop.call_soon_threadsafe(settle, made, failed)
        except RuntimeError:
            return  # The loop has ended meanwhile.

    threading.Thread(target=work, name="load-policies", daemon=True).start()
    try:
        async with asyncio.timeout(LOAD_TIMEOUT_S):
            return await done
    except TimeoutError:
        raise PolicyError(f"the policies did not load in {LOAD_TIMEOUT_S:g} s") from None
