"""A trace on a simulated pool, by discrete events: no waiting, no loop, no clock. Same scenario, same result.

The router's decisions are the router's own code (view, index, KV feed, chooser, policy, request machine), told what a real
router would be told and as late: heartbeats, KV events and answers arrive one bus hop after they were sent. Around them are
engine models and links. Nothing is lost and nobody dies here; that is the business of the fault search.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..bus.ids import WorkerId
from ..bus.messages import Heartbeat, KvEvents
from ..router.chooser import Chosen
from ..router.generation import Overloaded
from ..router.policies.base import load_policy
from ..router.request import AskDecode, Assign, Instruction, Pick, PublishPrefill, Release, ReportError, RequestMachine
from .engine_model import Kind, Work
from .pool import SimWorker, copy_kv, make_pool
from .prefill_queue import PrefillQueue
from .router_model import RouterModel
from .scenario import Outcome, Scenario
from .traces import Trace, Turn

PROGRESS_REQUESTS = 200


@dataclass(slots=True, eq=False)
class Request:
    """One turn on its way, and what is kept of it."""

    index: int
    turn: Turn
    chain: list[int]
    arrived_s: float
    router: RouterModel
    machine: RequestMachine | None = None
    chosen: Chosen | None = None
    chosen_s: float = 0.0
    worker: SimWorker | None = None
    prefiller: SimWorker | None = None
    work: Work | None = None
    prefill_work: Work | None = None
    first_s: float | None = None
    end_s: float | None = None
    outcome: Outcome = "ok"
    refusals: int = 0
    sent_tokens: int = 0  # of the prompt: given to the link
    computed: list[tuple[int, float, float]] = field(
        default_factory=list
    )  # chunks that wait for the other side's blocks
    sent_s: float = 0.0  # when the last byte that was given to the link arrives
    is_prefilled: bool = False


@dataclass(slots=True)
class Replayed:
    """What came out of a run."""

    scenario: Scenario
    requests: list[Request]
    workers: list[SimWorker]
    duration_s: float
    messages: Counter[str]
    events: int
    index_blocks_max: int
    policy_failures: int
    ttft_errors: list[float]  # |predicted - seen| / seen, where the policy predicts
    itl_errors: list[float]


class Replay:
    """One run; `progress(ended, all)` is called now and then."""

    def __init__(
        self, trace: Trace, scenario: Scenario, progress: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        self._trace = trace
        self._scenario = scenario
        self._progress = progress
        self._now = 0.0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._sequence = 0
        self._requests: list[Request] = []
        self._live: dict[int, Request] = {}  # on a worker
        self._followers: dict[int, list[int]] = {}
        self._ended = 0
        self._next_turn = 0
        self._messages: Counter[str] = Counter()
        self._rng = random.Random(scenario.seed)
        self._routers = [
            RouterModel(
                load_policy(scenario.policy),
                local_prefill_tokens_max=scenario.local_prefill_tokens_max,
                block_tokens=scenario.engine.block_tokens,
                rng=random.Random(f"{scenario.seed}/{number}"),
            )
            for number in range(scenario.routers)
        ]
        self._queue: PrefillQueue[Request] = PrefillQueue()
        self._kv_bytes, self._layers = scenario.kv_shape()
        self._workers = make_pool(scenario, self)
        self._by_id = {worker.worker_id: worker for worker in self._workers}

    def run(self) -> Replayed:
        """To the end of the last request."""
        for worker in self._workers:
            self._join(worker)
        self._release_turns()
        heap = self._heap
        events = 0
        turns = len(self._trace.turns)
        while heap and self._ended < turns:
            self._now, _, act, arguments = heapq.heappop(heap)
            act(*arguments)
            events += 1
        assert self._ended == turns, f"{turns - self._ended} requests never ended"
        self._messages["token_frame"] = sum(w.engine.steps for w in self._workers if not w.is_prefill)
        self._requests.sort(key=lambda request: request.index)
        return Replayed(
            self._scenario,
            self._requests,
            self._workers,
            self._now,
            self._messages,
            events,
            max(router.index_blocks_max for router in self._routers),
            sum(router.policy_failures for router in self._routers),
            [error for router in self._routers for error in router.ttft_errors],
            [error for router in self._routers for error in router.itl_errors],
        )

    def _at(self, when_s: float, act: Callable[..., None], *arguments: object) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when_s, self._sequence, act, arguments))

    def _hop(self, kind: str, act: Callable[..., None], *arguments: object) -> None:
        """One message over the bus."""
        self._messages[kind] += 1
        self._at(self._now + self._scenario.bus_s, act, *arguments)

    # ---- the pool

    def _join(self, worker: SimWorker) -> None:
        for router in self._routers:
            router.join(worker)
        if worker.is_prefill:
            self._queue.pull(worker, worker.card.slots)
        # Workers did not start at the same instant.
        worker.beat_s = self._rng.random() * worker.heartbeat_s
        self._at(worker.beat_s, self._beat, worker, worker.beat_s)

    def _beat(self, worker: SimWorker, due_s: float) -> None:
        if due_s != worker.beat_s:
            return  # A change made it come earlier.
        worker.engine.sync(self._now)
        self._reschedule(worker)
        self._publish_kv(worker)
        worker.last_beat_s = self._now
        worker.beat_s = self._now + worker.heartbeat_s
        self._at(worker.beat_s, self._beat, worker, worker.beat_s)
        self._hop("heartbeat", self._on_heartbeat, worker.heartbeat(self._now))

    def _changed(self, worker: SimWorker) -> None:
        due_s = worker.beat_due(self._now)
        if due_s < worker.beat_s:
            worker.beat_s = due_s
            self._at(due_s, self._beat, worker, due_s)

    def _publish_kv(self, worker: SimWorker) -> None:
        message = worker.take_kv_events()
        if message is not None:
            self._hop("kv_events", self._on_kv_events, message)

    def _on_heartbeat(self, heartbeat: Heartbeat) -> None:
        for router in self._routers:
            router.on_heartbeat(heartbeat, self._now)

    def _on_kv_events(self, message: KvEvents) -> None:
        for router in self._routers:
            router.on_kv_events(message)

    def _reschedule(self, worker: SimWorker) -> None:
        worker.version += 1
        if worker.engine.next_s is not None:
            self._at(worker.engine.next_s, self._step, worker, worker.version)

    def _step(self, worker: SimWorker, version: int) -> None:
        if version != worker.version:
            return
        worker.engine.finish_run()
        self._publish_kv(worker)
        self._reschedule(worker)

    # ---- clients

    def _release_turns(self) -> None:
        """Let the first clients ask."""
        turns = self._trace.turns
        for index, turn in enumerate(turns):
            if turn.after is not None:
                self._followers.setdefault(turn.after, []).append(index)
        if self._scenario.concurrency:
            for _ in range(self._scenario.concurrency):
                self._next_client()
            return
        for index, turn in enumerate(turns):
            if turn.after is None:
                self._at(turn.arrival_s, self._arrive, index)

    def _next_client(self) -> None:
        turns = self._trace.turns
        while self._next_turn < len(turns) and turns[self._next_turn].after is not None:
            self._next_turn += 1
        if self._next_turn < len(turns):
            self._at(self._now, self._arrive, self._next_turn)
            self._next_turn += 1

    def _arrive(self, index: int) -> None:
        turn = self._trace.turns[index]
        chain = turn.chain(self._scenario.engine.block_tokens)
        router = self._routers[index % len(self._routers)]
        request = Request(index, turn, chain, self._now, router)
        self._requests.append(request)
        self._ask(request)

    def _ask(self, request: Request) -> None:
        deadline_s = request.arrived_s + self._scenario.timeout_s
        generation = request.router.generation(request.index, request.turn, deadline_s)
        request.machine = RequestMachine(generation)
        self._carry_out(request, request.machine.begin())

    def _end(self, request: Request, outcome: Outcome) -> None:
        assert request.end_s is None, "a request ends once"
        request.outcome, request.end_s = outcome, self._now
        request.machine = request.chosen = None  # Let go: a large trace keeps only what is reported.
        request.chain = []
        self._ended += 1
        for index in self._followers.pop(request.index, ()):
            turn = self._trace.turns[index]
            self._at(max(turn.arrival_s, self._now + turn.think_s), self._arrive, index)
        if self._scenario.concurrency and not request.turn.session:
            self._next_client()
        if self._ended % PROGRESS_REQUESTS == 0:
            self._progress(self._ended, len(self._trace.turns))

    # ---- the router's shell

    def _carry_out(self, request: Request, instructions: list[Instruction]) -> None:
        todo = deque(instructions)
        while todo:
            match todo.popleft():
                case Pick(exclude=exclude):
                    todo.extend(self._pick(request, exclude))
                case Assign(worker=worker):
                    request.router.assign(worker, request.index, request.turn)
                case Release(worker=worker):
                    request.router.release(worker, request.index, request.chosen)
                case AskDecode() as ask:
                    self._hop("decode_job", self._offer, request, ask)
                case PublishPrefill():
                    self._messages["prefill_job"] += 3  # Published, confirmed, pulled.
                    self._at(self._now + self._scenario.queue_s, self._published, request)
                case ReportError(error=error):
                    self._not_started(request, error.retry_after_s if isinstance(error, Overloaded) else None)
                case _:
                    pass

    def _pick(self, request: Request, exclude: frozenset[WorkerId]) -> list[Instruction]:
        assert request.machine is not None
        request.chosen_s = self._now
        request.chosen, instructions = request.router.pick(
            request.machine, request.turn, request.chain, exclude, self._now, request.chosen
        )
        return instructions

    def _not_started(self, request: Request, retry_after_s: float | None) -> None:
        """A client that is told to come back does, until its time is over."""
        again_s = self._now + (retry_after_s or 0.0)
        if retry_after_s is None:
            self._end(request, "too_long")
        elif again_s >= request.arrived_s + self._scenario.timeout_s:
            self._end(request, "timeout")
        else:
            self._at(again_s, self._ask, request)

    # ---- the decode worker

    def _offer(self, request: Request, ask: AskDecode) -> None:
        worker = self._by_id[ask.worker]
        turn, machine = request.turn, request.machine
        assert machine is not None
        if turn.prompt_tokens + turn.output_tokens > worker.card.max_model_len:
            self._hop("refused", self._refused, request, ask.attempt, "too_long")
            return
        if worker.held >= worker.held_max:
            request.refusals += 1
            self._hop("refused", self._refused, request, ask.attempt, "busy")
            return
        worker.held += 1
        self._live[request.index] = request
        request.worker = worker
        kind: Kind = "local" if ask.token is None else "remote"
        request.work = Work(request.index, kind, turn.prompt_tokens, turn.output_tokens, request.chain)
        self._submit(worker, request.work)
        self._hop("admitted", self._admitted, request, ask.attempt)

    def _submit(self, worker: SimWorker, work: Work) -> None:
        worker.engine.submit(work, self._now)
        self._reschedule(worker)
        self._changed(worker)

    def _refused(self, request: Request, attempt: int, reason: str) -> None:
        assert request.machine is not None
        self._carry_out(request, request.machine.refused(attempt, reason, "", 1.0))

    def _admitted(self, request: Request, attempt: int) -> None:
        if request.machine is not None:
            self._carry_out(request, request.machine.admitted(attempt))

    # ---- the prefill queue and worker

    def _published(self, request: Request) -> None:
        assert request.machine is not None
        self._carry_out(request, request.machine.published(request.machine.attempt, request.index))
        lane_wait_s = self._scenario.lane_wait_s
        assert request.chosen is not None
        lane = request.chosen.choice.lane
        if lane is None or lane_wait_s is None:
            self._queue.publish(request)
        else:
            self._queue.publish(request, lane)
            self._at(self._now + lane_wait_s, self._leave_lane, request, lane)
        self._deliver()

    def _leave_lane(self, request: Request, lane: WorkerId) -> None:
        self._queue.give_to_all(request, lane)
        self._deliver()

    def _deliver(self) -> None:
        while (found := self._queue.next()) is not None:
            request, worker = found
            request.prefiller = worker
            turn = request.turn
            request.prefill_work = Work(request.index, "prefill", turn.prompt_tokens, 1, request.chain)
            worker.throughput.begin(self._now)
            self._submit(worker, request.prefill_work)
            self._hop("prefill_claimed", self._claimed, request, worker.worker_id)

    def _claimed(self, request: Request, worker: WorkerId) -> None:
        if request.chosen is not None:
            request.router.claimed(request.chosen, worker, self._now)
        if request.machine is not None:
            self._carry_out(request, request.machine.claimed(request.machine.attempt, worker, ""))

    # ---- what engines tell (engine_model.Listener)

    def on_allocated(self, work: Work, now: float) -> None:
        """The decode worker has room: what was computed meanwhile can go."""
        request = self._request_of(work)
        request.sent_tokens = work.cached_tokens  # The grant says what need not be sent.
        chunks, request.computed = request.computed, []
        for end_tokens, _, _ in chunks[-1:]:
            self._send(request, end_tokens, now, now)
        if request.is_prefilled:
            self._land(request)

    def on_chunk(self, work: Work, tokens: int, start_s: float, end_s: float) -> None:
        """KV goes over the link as it is computed, if the other side has room for it."""
        request = self._request_of(work)
        if request.work is not None and request.work.blocks:
            self._send(request, work.computed, start_s, end_s)
        else:
            request.computed.append((work.computed, start_s, end_s))

    def on_first(self, work: Work, now: float) -> None:
        """The router hears of it with the step's frame."""
        self._at(now + self._scenario.bus_s, self._first_token, self._request_of(work))

    def on_done(self, work: Work, now: float) -> None:
        """An answer is complete, or a prompt."""
        request = self._request_of(work)
        if work.kind == "prefill":
            request.is_prefilled = True
            if request.work is not None and request.work.blocks:
                self._land(request)
            return
        assert request.worker is not None
        request.worker.held -= 1
        self._changed(request.worker)
        self._messages["finish_ack"] += 1
        self._at(now + self._scenario.bus_s, self._answered, request)

    def _request_of(self, work: Work) -> Request:
        return self._live[work.key]

    # ---- the link

    def _send(self, request: Request, end_tokens: int, start_s: float, end_s: float) -> None:
        """Give the link what was computed in a step from `start_s` to `end_s`."""
        assert request.prefiller is not None
        assert request.worker is not None
        tokens = end_tokens - request.sent_tokens
        if tokens <= 0:
            return
        request.sent_tokens = end_tokens
        layers = self._layers if self._scenario.is_layerwise else 1
        request.sent_s = copy_kv(
            request.prefiller, request.worker, tokens * self._kv_bytes, computed=(start_s, end_s), layers=layers
        )

    def _land(self, request: Request) -> None:
        self._at(max(request.sent_s, self._now) + self._scenario.link_latency_s, self._landed, request)

    def _landed(self, request: Request) -> None:
        assert request.work is not None
        assert request.prefill_work is not None
        assert request.worker is not None
        assert request.prefiller is not None
        decoder, prefiller = request.worker, request.prefiller
        decoder.engine.landed(request.work, self._now)
        self._publish_kv(decoder)
        self._reschedule(decoder)
        prefiller.throughput.end(self._now, request.turn.prompt_tokens - request.prefill_work.cached_tokens)
        prefiller.engine.release(request.prefill_work, self._now)
        self._reschedule(prefiller)
        self._queue.pull(prefiller)
        self._changed(prefiller)
        self._messages["prefill_done"] += 2  # Told to the router, acked to the queue.
        self._at(self._now + self._scenario.bus_s, self._prefill_done, request)
        self._deliver()

    # ---- what the router hears

    def _prefill_done(self, request: Request) -> None:
        if request.machine is not None:
            self._carry_out(request, request.machine.prefill_done(request.machine.attempt))

    def _first_token(self, request: Request) -> None:
        request.first_s = self._now
        if request.chosen is not None and request.work is not None:
            request.router.first_token(request.chosen, request.work.cached_tokens)
        if request.machine is not None:
            self._carry_out(request, request.machine.first_token())

    def _answered(self, request: Request) -> None:
        machine, chosen, work = request.machine, request.chosen, request.work
        assert machine is not None
        assert chosen is not None
        assert work is not None
        assert request.first_s is not None
        gaps = request.turn.output_tokens - 1
        request.router.observe(
            chosen,
            machine.prefilled_by,
            work.cached_tokens,
            ttft_s=request.first_s - request.chosen_s,
            itl_s=(self._now - request.first_s) / gaps if gaps else None,
            output_tokens=request.turn.output_tokens,
            now=self._now,
        )
        self._carry_out(request, machine.ended())
        del self._live[request.index]
        self._end(request, "ok")
