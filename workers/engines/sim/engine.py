"""The verifying simulator as an engine: schedules like vLLM in small, moves real bytes, takes as long as it is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import PurePath

from ....bus.messages import KvEvent
from ....transport.base import (
    Chunk,
    Expectation,
    GroupBlocks,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
    Transport,
)
from ....transport.endpoint import HandoffEndpoint
from ....transport.errors import TransportError
from ....transport.ranks import RankedEndpoint, RankProbe
from ....transport.registry import open_transports
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
from ..step_log import StepLog, step_of
from .kv import SimKv, cells_of, next_states, sim_layouts
from .scheduler import AnyWork, Scheduler
from .vocabulary import sim_vocabulary
from .work import DecodeWork, PrefillWork

log = logging.getLogger(__name__)
KV_BLOCKS = 8192  # when not told: 8 MiB of 32-token blocks in 4 layers
MODEL_LEN_MAX = 32768  # when not told
LAG_MAX_S = 0.005  # time lost to a late timer is made up for, time lost to a busy machine is not


class SimEngine:
    """Implements `Engine`. Everything happens on the loop that started it."""

    def __init__(
        self,
        config: WorkerConfig,
        *,
        worker_id: str,
        epoch: int,
        transports: Sequence[Transport] | None = None,
        make_endpoint: Callable[..., HandoffEndpoint] = HandoffEndpoint,
    ) -> None:
        self._config = config
        name = config.served_name or PurePath(config.model).name  # A folder may lie elsewhere on another host.
        layouts = sim_layouts(
            name,
            block_tokens=config.block_tokens,
            layers=config.sim_layers,
            heads=config.sim_heads,
            tp_size=config.tp,
        )
        self.kv = SimKv(layouts, config.kv_blocks or KV_BLOCKS)
        self.vocabulary = sim_vocabulary(config.model, config.sim_vocab)
        kv_tokens = self.kv.blocks * config.block_tokens
        self._model_len_max = config.max_model_len or min(MODEL_LEN_MAX, kv_tokens)
        if self._model_len_max > kv_tokens:
            raise EngineError(
                f"max_model_len {self._model_len_max} needs more KV than {kv_tokens} tokens; raise kv_blocks"
            )
        self._ranks = [
            make_endpoint(
                pool,
                open_transports(config.transports) if transports is None else transports,
                worker_name=worker_id,
                epoch=epoch,
                bind_host=config.bind,
                listens=config.role == "decode",
            )
            for pool in self.kv.pools
        ]
        self.endpoint = RankedEndpoint(self._ranks)
        self._wake = asyncio.Event()
        self._moves = asyncio.Event()
        self._moves.set()
        self._steps = 0
        self._step_log: StepLog | None = None
        self._scheduler = Scheduler(
            self.kv,
            self.vocabulary,
            slots=config.slots,
            chunk_tokens=config.chunk_tokens,
            on_room=self._wake.set,
        )
        self._handlers: list[Callable[[list[KvEvent]], None]] = []
        self._busy_until = 0.0
        self._task: asyncio.Task[None] | None = None
        self._dead: EngineDead | None = None
        self._is_dead = asyncio.Event()

    async def start(self) -> EngineInfo:
        try:
            await self.endpoint.start()
        except TransportError as error:
            raise EngineError(f"no transport of {self._config.transports!r} runs here: {error}") from error
        self._loop = asyncio.get_running_loop()
        if self._config.step_log:
            self._step_log = StepLog.at(self._config.step_log, self._loop.time)
        self._task = self._loop.create_task(self._run(), name="sim engine")
        self._task.add_done_callback(self._on_run_ended)
        return EngineInfo(
            fingerprint=self._ranks[0].layout.fingerprint(),
            block_tokens=self._config.block_tokens,
            kv_blocks=self.kv.blocks,
            slots=self._config.slots,
            max_model_len=self._model_len_max,
            handoff_addresses=self.endpoint.addresses,
            description="sim",
            tp_size=self._config.tp,
        )

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        self._check(task.token_ids)
        work = PrefillWork(list(task.token_ids), self._config.block_tokens, task=task, done=self._loop.create_future())
        self._add(work)
        try:
            return await work.done
        finally:
            self._drop(work)

    async def decode(self, task: DecodeTask, on_step: Callable[[StepOutput], None]) -> None:
        self._check(task.token_ids)
        room = self._model_len_max - len(task.token_ids)
        if room < 1:
            raise BadTask(f"a prompt of {len(task.token_ids)} tokens leaves no room in {self._model_len_max}")
        work = DecodeWork(
            list(task.token_ids),
            self._config.block_tokens,
            task=task,
            on_step=on_step,
            done=self._loop.create_future(),
            tokens_max=min(task.sampling.max_tokens, room),
            handoff_token=task.handoff_token,
        )
        self._add(work)
        try:
            await work.done
        finally:
            self._drop(work)

    def is_held(self, block: int) -> bool:
        """Whether some task has this block of the KV."""
        return self._scheduler.blocks.is_held(block)

    def break_down(self, why: str) -> None:
        """As when the process of an engine dies: every task fails, and the worker must be started again."""
        if self._task is not None:
            self._task.cancel()
        self._fail_all(EngineDead(why))

    def hang(self) -> None:
        """Begin no step and no layer any more, and tell nobody, until `go_on`."""
        self._moves.clear()

    def go_on(self) -> None:
        """After `hang`."""
        self._moves.set()

    def load(self) -> EngineLoad:
        scheduler = self._scheduler
        free = scheduler.blocks.free_blocks
        due = len(scheduler.computing) + len(scheduler.running)
        if not scheduler.active and free == self.kv.blocks:  # Nobody else has what they wait for.
            due += len(scheduler.waiting)
        return EngineLoad(len(scheduler.active), len(scheduler.waiting), free, self._steps, due)

    def on_kv_events(self, handler: Callable[[list[KvEvent]], None]) -> None:
        self._handlers.append(handler)

    def handoff_counts(self) -> HandoffCounts:
        """For the metrics."""
        stats = self.endpoint.stats
        return HandoffCounts(
            received=stats.received,
            sent=stats.sent,
            kv_bytes_received=stats.kv_bytes_received,
            kv_bytes_sent=stats.kv_bytes_sent,
            transports=tuple(stats.links.values()),
        )

    async def probe_links(self, addresses: tuple[str, ...], *, decode_epoch: int, decode_ranks: int) -> list[RankProbe]:
        """For `hocket doctor`."""
        return await self.endpoint.probe(addresses, decode_epoch=decode_epoch, decode_ranks=decode_ranks)

    async def failed(self) -> EngineDead:
        await self._is_dead.wait()
        assert self._dead is not None
        return self._dead

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._fail_all(EngineDead("the engine was closed"))
        if self._step_log is not None:
            self._step_log.close()
        await self.endpoint.aclose()

    # Tasks come and go.

    def _check(self, token_ids: list[int]) -> None:
        if self._dead is not None:
            raise EngineDead(str(self._dead))
        if not token_ids:
            raise BadTask("the prompt is empty")
        if len(token_ids) > self._model_len_max:
            raise BadTask(f"a prompt of {len(token_ids)} tokens is longer than {self._model_len_max}")
        if min(token_ids) < 0:
            raise BadTask(f"token id {min(token_ids)} is negative")

    def _add(self, work: AnyWork) -> None:
        self._scheduler.waiting.append(work)
        self._wake.set()

    def _drop(self, work: AnyWork) -> None:
        """The end of every task. Blocks that somebody may still read or write stay held until the endpoint says so."""
        work.is_over = True
        if work in self._scheduler.active:
            self._scheduler.end(work)
        elif work in self._scheduler.waiting:
            self._scheduler.waiting.remove(work)
        if isinstance(work, PrefillWork):
            if work.is_open:
                self.endpoint.abort(work.task.key, "cancelled")
                return
        elif work.is_receiving:
            self.endpoint.cancel(work.task.handoff_token or b"")
            return
        self._scheduler.free(work)

    def _on_run_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the simulator failed", exc_info=error)
            self._fail_all(EngineDead(f"the simulator failed: {error!r}"))

    def _fail_all(self, error: EngineDead) -> None:
        if self._dead is None:
            self._dead = error
        for work in [*self._scheduler.active, *self._scheduler.waiting]:
            if not work.done.done():
                work.done.set_exception(EngineDead(str(self._dead)))
        self._is_dead.set()

    # Steps.

    async def _run(self) -> None:
        while True:
            await self._moves.wait()
            self._admit()
            parts = self._scheduler.plan()
            if not parts and not self._scheduler.running:
                self._wake.clear()
                await self._wake.wait()
                self._busy_until = self._loop.time()  # Idle time is not lost time.
                continue
            await self._step(parts)
            self._steps += 1
            self._tell_events()

    def _admit(self) -> None:
        while (work := self._scheduler.admit()) is not None:
            if isinstance(work, PrefillWork):
                self._open(work)
            else:
                self._begin(work)

    async def _step(self, parts: list[tuple[AnyWork, int]]) -> None:
        decoding = list(self._scheduler.running)
        tokens = sum(end - work.computed for work, end in parts)
        step_ms = tokens * self._config.sim_prefill_ms_per_token + (self._config.sim_itl_ms if decoding else 0.0)
        if self._step_log is not None:
            lengths = [(work.computed, end - work.computed) for work, end in parts]
            self._step_log.begin(step_of([*lengths, *((work.computed, 1) for work in decoding)]))
        computed = []
        for work, end in parts:
            states = next_states(work.state, work.tokens[work.computed : end])
            blocks = work.blocks[work.whole_blocks : -(-end // work.block_tokens)]
            if isinstance(work, PrefillWork):
                group = GroupBlocks(work.whole_blocks, tuple(blocks))
                self.endpoint.announce(work.task.key, Chunk(work.computed, end, (group,)))
            cells = cells_of(states, self.kv.planes).reshape(self.kv.layers, self.kv.heads, -1)
            computed.append((work, end, blocks, states, cells))
        layers = self.kv.layers if parts else 1  # Nobody waits for a layer when only tokens are made.
        for layer in range(layers):
            await self._spend(step_ms / 1000 / layers)
            await self._moves.wait()
            for work, _, blocks, _, cells in computed:
                if not work.is_over:
                    self.kv.write(layer, blocks, cells[layer])
                    if isinstance(work, PrefillWork):
                        self.endpoint.layer_ready(work.task.key, layer)
        if not step_ms:
            await asyncio.sleep(0)
        if self._step_log is not None:
            self._step_log.end()
        for work, end, _, states, _ in computed:
            if not work.is_over:
                work.computed, work.state = end, states[-1]
                self._scheduler.store(work)
                if end == len(work.tokens):
                    self._on_prompt_computed(work)
        self._scheduler.make_tokens([work for work in decoding if work in self._scheduler.running])

    async def _spend(self, duration_s: float) -> None:
        """Wait until the engine has been busy for so much longer."""
        if duration_s <= 0:
            return
        now = self._loop.time()
        self._busy_until = max(self._busy_until, now - LAG_MAX_S) + duration_s
        await asyncio.sleep(max(0.0, self._busy_until - now))

    def _on_prompt_computed(self, work: AnyWork) -> None:
        del self._scheduler.computing[work]
        if isinstance(work, DecodeWork):
            self._scheduler.start_decoding(work)
            self._scheduler.make_tokens([work])

    def _tell_events(self) -> None:
        if events := self._scheduler.blocks.take_events():
            for handler in self._handlers:
                handler(events)

    # Prefill: the hand-off's sending side.

    def _open(self, work: PrefillWork) -> None:
        task = work.task
        order = SendOrder(
            key=task.key,
            addresses=task.decode_addresses,
            decode_epoch=task.decode_epoch,
            fingerprint=task.fingerprint,
            tokens=len(work.tokens),
            timeout_s=task.timeout_s,
        )

        def on_event(event: SendReleased | SendEnd) -> None:
            if isinstance(event, SendReleased):
                work.is_over = True
                work.is_open = False
                self._scheduler.free(work)
            else:
                self._on_send_end(work, event)

        try:
            self.endpoint.open(order, on_event, decode_ranks=task.decode_ranks)
        except ValueError as error:
            work.done.set_exception(BadTask(f"the hand-off cannot begin: {error}"))
            return
        work.is_open = True
        if work.cached_blocks:
            group = GroupBlocks(0, tuple(work.blocks[: work.cached_blocks]))
            self.endpoint.announce(task.key, Chunk(0, work.computed, (group,)))
            self.endpoint.layers_ready(task.key, range(self.kv.layers))
        if work.computed < len(work.tokens):
            self._scheduler.computing[work] = None

    def _on_send_end(self, work: PrefillWork, event: SendEnd) -> None:
        if work in self._scheduler.active:
            self._scheduler.end(work)
        if work.done.done():
            return
        if event.is_landed:
            cached_tokens = work.cached_blocks * work.block_tokens
            work.done.set_result(PrefillOutcome(len(work.tokens) - cached_tokens, cached_tokens, event.kv_bytes))
        else:
            work.done.set_exception(HandoffFailed(event.reason))

    # Decode: the hand-off's receiving side, then token by token.

    def _begin(self, work: DecodeWork) -> None:
        token, work.handoff_token = work.handoff_token, None
        if token is None:
            self._compute_rest(work)
            return
        expectation = Expectation(
            token=token,
            attempt=work.task.attempt,
            groups=(GroupBlocks(work.cached_blocks, tuple(work.blocks[work.cached_blocks :])),),
            end_token=len(work.tokens),
            timeout_s=work.task.handoff_timeout_s,
        )

        def on_end(end: ReceiveEnd) -> None:
            self._on_receive_end(work, end)

        work.is_receiving = True
        try:
            self.endpoint.expect(expectation, on_end, prefill_ranks=work.task.prefill_ranks)
        except ValueError as error:
            work.is_receiving = False
            work.done.set_exception(BadTask(f"the hand-off cannot be expected: {error}"))

    def _on_receive_end(self, work: DecodeWork, end: ReceiveEnd) -> None:
        work.is_receiving = False
        if work.is_over:
            self._scheduler.free(work)
            return
        if end.is_landed:
            work.cached_tokens, work.computed_here = work.computed, 1
            work.skip_to(len(work.tokens))
            self._scheduler.store(work)
            self._scheduler.start_decoding(work)
            log.debug("made a request runnable", extra={"request_id": work.task.request_id})
        else:
            log.info("hand-off failed, computing the rest: %s", end.reason, extra={"request_id": work.task.request_id})
            good = min(end.good_token, len(work.tokens) - 1)
            work.skip_to(max(work.computed, good - good % work.block_tokens))
            self._scheduler.store(work)
            self._compute_rest(work)
        self._wake.set()

    def _compute_rest(self, work: DecodeWork) -> None:
        if not work.made:
            work.cached_tokens = work.cached_blocks * work.block_tokens
            work.computed_here = len(work.tokens) - work.computed
        self._scheduler.computing[work] = None
