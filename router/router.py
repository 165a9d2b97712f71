"""The shell around the decisions: carries out what the request machines, the view and the policy say.

One `Router` is one process's share of the pool. Everything it hears comes in on the bus as callbacks; everything that
waits is a task of its task group. Its callers are the API (`RouterCore`) and the token path (`StreamEvents`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable

from ..bus import subjects
from ..bus.base import Bus, Delivery
from ..bus.ids import HandoffToken, RequestId, RouterId, WorkerId
from ..bus.messages import (
    FINISH_ERROR,
    Cancel,
    EntryDetail,
    PrefillClaimed,
    PrefillDone,
    PrefillFailed,
    PrefillReturned,
    decode,
    encode,
)
from .chooser import Ask, Chooser
from .config import RouterConfig
from .control import Control
from .control_messages import PolicyConfig, Receipt, RouterLoad
from .dispatch import Dispatch
from .gate import Gate
from .generation import Failure, Generation, Overloaded, Started, TokenStreams
from .live import Live
from .losses import WorkerLosses
from .membership import Membership
from .metrics import RouterMetrics
from .policies.base import Policy
from .policy_set import PolicySet, note_end
from .receipts import Receipts
from .repair import TokenRepair
from .request import (
    AskDecode,
    Assign,
    CancelAttempts,
    DeleteJob,
    FailStream,
    Forget,
    Instruction,
    NakJob,
    Phase,
    Pick,
    PublishPrefill,
    Rebind,
    Release,
    ReportError,
    ReportStarted,
    RequestMachine,
)
from .sharing import LoadSharing
from .view import ClusterView

log = logging.getLogger(__name__)

DEADLINE_TICK_S = 0.5


class Router:
    """Implements `generation.RouterCore` and `generation.StreamEvents`."""

    def __init__(
        self,
        config: RouterConfig,
        bus: Bus,
        policy: Policy,
        *,
        router_id: RouterId,
        served_name: str,
        metrics: RouterMetrics,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._bus = bus
        self._served_name = served_name
        self._metrics = metrics
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._router_id = router_id
        self._live: dict[int, Live] = {}
        self._by_request: dict[RequestId, Live] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._is_stopping = False
        self._unsent_cancels: deque[bytes] = deque(maxlen=config.streams_max)  # while there is no connection
        view = ClusterView(suspect_s=config.suspect_s, dead_s=config.dead_s)
        self._losses = WorkerLosses(self._live, view, self._now, clock=clock)
        self.membership = Membership(
            bus, config.pool, view, metrics=metrics, clock=clock, on_lost=self._losses.on_lost
        )  # fmt: skip
        self._wall_clock = wall_clock
        self.receipts = Receipts(router_id, bytes_max=config.receipts_bytes_max)
        self.control = Control(
            bus, config.pool, router_id, PolicyConfig(config.policy), policy, self.receipts,
            install=self._install_policies, load=self._load, metrics=metrics, clock=clock,
        )  # fmt: skip
        self.chooser = Chooser(
            view,
            self.membership.index,
            self.control.policies,
            local_prefill_tokens_max=config.local_prefill_tokens_max,
            rng=self._rng,
        )
        self.sharing = LoadSharing(bus, config.pool, router_id, view, lane_wait_s=config.lane_wait_s, clock=clock)
        self.chooser.waiting_elsewhere = self.sharing.others.waiting
        self.gate = Gate(config.admission_limits(), view, self.sharing, metrics, clock=clock)
        self._dispatch = Dispatch(
            bus, config.pool, router_id, self.membership, metrics,
            placed=self.sharing.jobs, share_of=self.gate.share_of,
            clock=clock, wall_clock=wall_clock,
        )  # fmt: skip
        self._streams: TokenStreams
        self._repair: TokenRepair

    # ---- life

    async def run(self, streams: TokenStreams, on_frame: Callable[[Delivery], None], ready: Callable[[], None]) -> None:
        """Serve until cancelled; `streams` is the token path and `on_frame` its handler. `ready` is called when it hears."""
        self._streams = streams
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._repair = TokenRepair(
                self._bus, self._config.pool, self._router_id, tasks, on_frame=on_frame, metrics=self._metrics
            )
            await self._bus.subscribe(subjects.tokens(self._router_id), on_frame)
            await self._bus.subscribe(subjects.events(self._router_id), self._on_event)
            await self._dispatch.start()
            await self.sharing.start()
            self._bus.on_connection(self._on_connection)
            await self.membership.start(tasks)
            await self.control.start(tasks)
            tasks.create_task(self.membership.watch(), name="watch-workers")
            tasks.create_task(self.sharing.run(), name="share-load")
            tasks.create_task(self._watch_deadlines(), name="watch-deadlines")
            ready()

    def stop_taking(self) -> None:
        """Refuse new requests; those in flight go on."""
        self._is_stopping = True

    @property
    def in_flight(self) -> int:
        """Generations that have not ended."""
        return len(self._live)

    def fail_all(self, code: str, message: str) -> None:
        """End every stream with an error."""
        for live in list(self._live.values()):
            self._now(live, live.machine.failed(Failure(code, message, is_retryable=True)))

    # ---- RouterCore

    async def start(self, generation: Generation, stream_id: int) -> Started:
        """Choose workers and get the request admitted. Raises RouterError."""
        if self._is_stopping or len(self._live) >= self._config.streams_max:
            reason = "the router is stopping" if self._is_stopping else f"{len(self._live)} requests are in flight"
            raise Overloaded(reason, retry_after_s=1.0)
        self._losses.check(generation)
        self.gate.enter(generation, stream_id)
        self._losses.enter(stream_id, generation)
        log.debug("began a request", extra={"request_id": generation.request_id})
        live = Live(RequestMachine(generation), stream_id, self._clock())
        live.record = self.receipts.begin(generation, live.started_s, self._wall_clock())
        self._live[stream_id] = self._by_request[generation.request_id] = live
        self._metrics.running.set(len(self._live))
        try:
            await self._carry_out(live, live.machine.begin())
            return await live.started
        except asyncio.CancelledError:
            self.cancel(stream_id)
            raise

    def cancel(self, stream_id: int) -> None:
        """The client has gone: free everything the request holds."""
        if live := self._live.get(stream_id):
            self._now(live, live.machine.abandoned())
            self._count_end(live, "cancelled")

    def models(self) -> list[str]:
        """Names that clients may ask for."""
        return [self._served_name]

    def receipt(self, request_id: RequestId) -> Receipt | None:
        """Why a request that is still remembered went where it went."""
        return self.receipts.find(request_id)

    def not_ready_reason(self) -> str | None:
        """None when requests can be served now."""
        if not self._bus.is_connected:
            return "no connection to the message bus"
        if not self.membership.view.candidates(self._served_name, ()):
            return f"no decode worker serves {self._served_name!r} now"
        return None

    def prompt_tokens_max(self) -> int | None:
        """The longest prompt plus output that some worker takes."""
        return max((member.card.max_model_len for member in self.membership.view.members("decode")), default=None)

    # ---- StreamEvents

    def on_first_token(self, stream_id: int, detail: EntryDetail | None) -> None:
        """A token was accepted."""
        if live := self._live.get(stream_id):
            self._now(live, live.machine.first_token())
            live.first_token_s = self._clock()
            self._losses.made_token(stream_id)
            self.gate.waits(stream_id, 0)
            live.cached_tokens = detail.cached_tokens if detail else None
            if live.chosen is not None:
                self.chooser.computed(live.chosen)
                if live.cached_tokens is not None:
                    self.membership.check_truth(live.chosen, live.cached_tokens)
            self._metrics.ttft.labels(live.machine.plan).observe(live.first_token_s - live.started_s)

    def on_gap(self, stream_id: int, next_index: int) -> None:
        """Tokens are missing."""
        live = self._live.get(stream_id)
        if live is None or live.machine.worker is None:
            return
        machine, attempt = live.machine, live.machine.attempt
        assert machine.worker is not None
        self._repair.replay(
            machine.worker, machine.generation.request_id, stream_id, attempt, next_index,
            on_lost=lambda: self._on_tokens_lost(stream_id, attempt),
        )  # fmt: skip

    def _on_tokens_lost(self, stream_id: int, attempt: int) -> None:
        live = self._live.get(stream_id)
        if live is not None and live.machine.attempt == attempt:
            self._fail(stream_id, "tokens_lost", "tokens were lost on their way and could not be repaired")

    def on_end(self, stream_id: int, finish: int, output_tokens: int, detail: EntryDetail | None) -> None:
        """The worker's terminal entry was accepted."""
        live = self._live.get(stream_id)
        if live is None:
            return
        machine = live.machine
        if machine.worker is not None:
            self._repair.acknowledge(machine.worker, stream_id, machine.attempt)
        self._metrics.generation_tokens.inc(output_tokens)
        self._observe(live, output_tokens)
        if finish != FINISH_ERROR:
            self._losses.ended_well(stream_id)
        self._now(live, machine.ended())
        self._count_end(live, "error" if finish == FINISH_ERROR else "finished")

    def on_stop_string(self, stream_id: int, output_tokens: int) -> None:
        """The answer is complete on our side."""
        if live := self._live.get(stream_id):
            self._metrics.generation_tokens.inc(output_tokens)
            self._observe(live, output_tokens)
            self._losses.ended_well(stream_id)
            self._now(live, live.machine.abandoned())
            self._count_end(live, "finished")

    def on_late_end(self, worker: WorkerId, stream_id: int, attempt: int) -> None:
        """An end that came again."""
        self._repair.acknowledge(worker, stream_id, attempt)

    # ---- events from the bus

    def _on_connection(self, is_connected: bool) -> None:
        """While we were away a worker may have given our streams up, and will not say so again."""
        if not is_connected:
            return
        while self._unsent_cancels and self._bus.publish_nowait(
            subjects.cancel(self._config.pool), self._unsent_cancels[0]
        ):
            self._unsent_cancels.popleft()
        for stream_id, live in self._live.items():
            next_index = self._streams.next_index(stream_id)
            if live.machine.phase is Phase.RUNNING and next_index is not None:
                self.on_gap(stream_id, next_index)

    def _on_event(self, delivery: Delivery) -> None:
        message = decode(delivery.payload)
        if not isinstance(message, PrefillClaimed | PrefillReturned | PrefillDone | PrefillFailed):
            return
        live = self._by_request.get(message.request_id)
        if live is None:
            return
        match message:
            case PrefillClaimed():
                self._doubt_claimer(live, message.attempt, now_with=message.worker_id)
                if live.chosen is not None and message.attempt == live.machine.attempt:
                    self.chooser.claimed(live.chosen, message.worker_id, self._clock())
                self._now(live, live.machine.claimed(message.attempt, message.worker_id, message.ack_subject))
            case PrefillReturned():
                self._now(live, live.machine.returned(message.attempt, message.worker_id))
            case PrefillDone():
                self.membership.prefilled(message)
                self._now(live, live.machine.prefill_done(message.attempt))
            case PrefillFailed():
                if message.reason == "exhausted":
                    self._doubt_claimer(live, message.attempt)
                log.warning(
                    "prefill failed: %s %s", message.reason, message.detail, extra={"request_id": message.request_id}
                )
                self._now(live, live.machine.prefill_failed(message.attempt))

    def _doubt_claimer(self, live: Live, attempt: int, *, now_with: WorkerId | None = None) -> None:
        """The queue has its job back without a word from who had it: a dead worker is to be known before more die."""
        claimer = live.machine.claimed_by
        if claimer is not None and claimer != now_with and attempt == live.machine.attempt:
            self.membership.doubt(claimer)

    async def _watch_deadlines(self) -> None:
        while True:
            await asyncio.sleep(DEADLINE_TICK_S)
            now = self._clock()
            self.gate.look()
            late = [stream_id for stream_id, live in self._live.items() if live.machine.generation.deadline_s <= now]
            for stream_id in late:
                self._fail(stream_id, "timeout", "not finished before its deadline", status=504)

    def _fail(self, stream_id: int, code: str, message: str, *, status: int = 503) -> None:
        if live := self._live.get(stream_id):
            self._now(live, live.machine.failed(Failure(code, message, is_retryable=True, status=status)))

    # ---- carrying out

    def _now(self, live: Live, instructions: list[Instruction]) -> None:
        """Carry out what a callback caused: at once when nothing has to wait, else in a task."""
        if any(isinstance(instruction, Pick | AskDecode | PublishPrefill) for instruction in instructions):
            assert self._tasks is not None
            self._tasks.create_task(self._carry_out(live, instructions), name="carry-out")
            return
        for instruction in instructions:
            self._do(live, instruction)
        self._note_job(live)

    def _note_job(self, live: Live) -> None:
        """Whether its prefill job still waits in the queue."""
        machine = live.machine
        if self.sharing.jobs.sync(live.stream_id, is_open=machine.is_prefill_open, is_unclaimed=machine.is_unclaimed):
            self.sharing.changed()

    async def _carry_out(self, live: Live, instructions: Iterable[Instruction]) -> None:
        machine = live.machine
        todo = deque(instructions)
        while todo:
            match todo.popleft():
                case Pick() as pick:
                    if not self._losses.must_wait(live, pick):
                        todo.extend(self._pick(live, pick.exclude))
                case AskDecode() as ask:
                    todo.extend(await self._dispatch.ask_decode(machine, live.stream_id, ask))
                case PublishPrefill() as publish:
                    live.published_s = self._clock()
                    todo.extend(await self._dispatch.publish_prefill(machine, live.stream_id, publish))
                case instruction:
                    self._do(live, instruction)
        self._note_job(live)

    def _do(self, live: Live, instruction: Instruction) -> None:
        view = self.membership.view
        match instruction:
            case Assign(worker=worker):
                member = view.get(worker)
                if member is not None:
                    generation = live.machine.generation
                    tokens = generation.prompt_tokens + generation.sampling.max_tokens
                    view.assign(worker, live.stream_id, -(-tokens // member.card.block_tokens))
                    self.sharing.changed()
            case Release(worker=worker):
                view.release(worker, live.stream_id)
                self.sharing.changed()
                if live.chosen is not None:
                    self.chooser.computed(live.chosen)
            case ReportStarted(worker=worker, plan=plan, why=why):
                if not live.started.done():
                    live.started.set_result(Started(live.stream_id, plan, worker, why))
            case ReportError(error=error):
                self._note_end(live, "refused", str(error))
                if not live.started.done():
                    live.started.set_exception(error)
            case Rebind(attempt=attempt):
                self._metrics.retries.inc()
                self._streams.rebind(live.stream_id, attempt)
            case CancelAttempts(attempt=attempt):
                self._cancel(encode(Cancel(live.machine.generation.request_id, attempt)))
            case DeleteJob(sequence=sequence):
                assert self._tasks is not None
                self._tasks.create_task(self._dispatch.delete_job(sequence), name="delete-job")
            case NakJob(ack_subject=ack_subject, delay_s=delay_s):
                self._bus.jobs.nak_for(ack_subject, delay_s)
            case FailStream(failure=failure):
                if live.chosen is not None:
                    self.chooser.released(live.chosen)
                self._streams.fail(live.stream_id, failure)
                self._count_end(live, "failed", f"{failure.code}: {failure.message}")
            case Forget():
                self._live.pop(live.stream_id, None)
                self.gate.leave(live.stream_id)
                self._losses.left(live.stream_id)
                self._by_request.pop(live.machine.generation.request_id, None)
                self._metrics.running.set(len(self._live))

    def _cancel(self, cancel: bytes) -> None:
        if not self._bus.publish_nowait(subjects.cancel(self._config.pool), cancel):
            self._unsent_cancels.append(cancel)

    def _count_end(self, live: Live, outcome: str, detail: str = "") -> None:
        self._metrics.requests.labels(outcome, live.machine.plan).inc()
        self._metrics.e2e.observe(self._clock() - live.started_s)
        self._note_end(live, outcome, detail)

    def _note_end(self, live: Live, end: str, detail: str) -> None:
        """For the receipt and the comparison of policies."""
        if live.record is not None:
            self.receipts.ended(live.record, end, self._clock(), detail=detail, outcome=live.outcome)
        if live.chosen is not None and live.chosen.trace is not None and end != "cancelled":
            is_error = end in ("error", "failed", "refused")
            note_end(live.chosen.trace, live.outcome, plan=live.chosen.plan, is_error=is_error)

    # ---- picking

    def _pick(self, live: Live, exclude: frozenset[WorkerId]) -> list[Instruction]:
        generation, now = live.machine.generation, self._clock()
        if live.chosen is not None:
            self.chooser.released(live.chosen)
        chosen = live.chosen = self.chooser.choose(Ask.of(generation), exclude, now)
        live.chosen_s = now
        if live.record is not None:
            members = self.membership.view.members("decode")
            self.receipts.picked(live.record, chosen, now, members=members, exclude=exclude)
        if chosen is None:
            return live.machine.nothing_to_pick()
        self.chooser.placed(chosen, now)
        self.gate.waits(live.stream_id, chosen.waits_for[1])
        self._metrics.policy_failures.inc(chosen.is_fallback)
        self._metrics.prompt_tokens.inc(generation.prompt_tokens)
        self._metrics.hit_tokens.inc(chosen.worker.hit_blocks * chosen.worker.block_tokens)
        token = HandoffToken(self._rng.randbytes(16))
        return live.machine.picked(
            chosen.worker.worker_id, chosen.plan, chosen.choice.why, token, prefill_ranks=chosen.prefill_ranks,
            lane=chosen.choice.lane,
        )  # fmt: skip

    def _observe(self, live: Live, output_tokens: int) -> None:
        if live.chosen is None:
            return
        now = self._clock()
        ttft_s = itl_s = None
        if live.first_token_s is not None:
            ttft_s = live.first_token_s - live.chosen_s
            itl_s = (now - live.first_token_s) / (output_tokens - 1) if output_tokens > 1 else None
        outcome = live.outcome = live.chosen.outcome(
            prefill_worker=live.machine.prefilled_by,
            cached_tokens=live.cached_tokens,
            ttft_s=ttft_s,
            itl_s=itl_s,
            output_tokens=output_tokens,
        )
        self._metrics.predictions.add("ttft", outcome.predicted_ttft_s, ttft_s)
        self._metrics.predictions.add("itl", outcome.predicted_itl_s, itl_s)
        self.chooser.observe(outcome, now)

    def _load(self) -> RouterLoad:
        return RouterLoad(self._router_id, len(self._live), self.sharing.lanes(), self.membership.loads())

    def _install_policies(self, policies: PolicySet) -> None:
        self.chooser.policy = policies
