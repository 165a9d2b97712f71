"""The shell around the cluster view: hears heartbeats and KV events, fetches cards and snapshots, asks the silent."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery, NoResponders
from ..bus.ids import WorkerId
from ..bus.messages import (
    Goodbye,
    Heartbeat,
    KvEvents,
    KvSnapshot,
    KvSnapshotRequest,
    Message,
    Ping,
    PrefillDone,
    decode,
    encode,
)
from .chooser import Chosen
from .control_messages import WorkerLoad
from .index import PrefixIndex
from .kv_feed import FeedMode, KvFeed
from .metrics import RouterMetrics
from .truth import TruthCheck
from .view import ClusterView, Member

log = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
TICK_S = 0.25
HEARD_S = 0.7  # the usual time between two heartbeats, and some
WARM_MAX_S = 2.0
PAUSE_S = 1.0
"""A gap between ticks that means we were suspended ourselves: what the workers said meanwhile is still to be read."""
SNAPSHOT_RETRY_S = 1.0
"""A snapshot that failed is asked for again after this long."""


@dataclass(slots=True)
class _Reported:
    """What the engine of one worker has reported of our requests."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    kv_bytes: int = 0


class Membership:
    """Keeps `view` and `index` in step with the pool; `on_lost(member, is_silent)` is called once for each that is gone."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        view: ClusterView,
        *,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        on_lost: Callable[[Member, bool], None],
    ) -> None:
        self.view = view
        self.index = PrefixIndex()
        self._bus = bus
        self._pool = pool
        self._metrics = metrics
        self._clock = clock
        self._on_lost = on_lost
        self._feeds: dict[WorkerId, KvFeed] = {}
        self._truth = TruthCheck()
        self._reported: dict[WorkerId, _Reported] = {}
        self._asking: set[tuple[str, WorkerId]] = set()
        self._tasks: asyncio.TaskGroup | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Begin to hear; what has to wait runs in `tasks`."""
        self._tasks = tasks
        self._bus.on_connection(self._on_connection)
        await self._bus.subscribe(subjects.load_all(self._pool), self._on_load)
        await self._bus.subscribe(subjects.kv_events_all(self._pool), self._on_kv_events)

    async def wait_warm(self) -> None:
        """Until every worker has been heard, with its card and its prefix cache; `WARM_MAX_S` at the most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WARM_MAX_S):
                await asyncio.sleep(HEARD_S)
                while self._asking:  # noqa: ASYNC110  # Bounded, and only at the start.
                    await asyncio.sleep(0.01)

    async def watch(self) -> None:
        """Look for silent workers until cancelled."""
        ticked_s = self._clock()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            if not self._bus.is_connected or now - ticked_s > PAUSE_S:
                self.view.freeze(now)
            ticked_s = now
            suspects, dead = self.view.silent(now)
            for worker in suspects:
                log.warning("worker silent", extra={"worker_id": worker})
                self._ask("ping", worker, self._ping(worker))
            for worker in dead:
                self.lost(worker, "silent", is_silent=True)

    def lost(self, worker: WorkerId, why: str, *, is_silent: bool = False) -> None:
        """The worker is dead or has left, or (silent) may only hang; unknown ones are ignored."""
        member = self.view.leave(worker)
        if member is None:
            return
        log.warning("worker lost: %s", why, extra={"worker_id": worker})
        self._feeds.pop(worker, None)
        self._truth.forget(worker)
        self._reported.pop(worker, None)
        self._metrics.forget_worker(worker)
        self.index.remove_worker(worker)
        self._metrics.worker_losses.labels(member.card.role).inc()
        self._count()
        self._on_lost(member, is_silent)

    def doubt(self, worker: WorkerId) -> None:
        """Something sent to the worker was not answered: ask it now instead of waiting for its silence."""
        self._ask("ping", worker, self._ping(worker))

    def check_truth(self, chosen: Chosen, cached_tokens: int) -> None:
        """What the engine had of the prompt in its cache, against what was predicted when it was chosen.

        A worker that is not believed has to be right by its events alone to be believed again.
        """
        worker = chosen.worker
        feed = self._feeds.get(worker.worker_id)
        if feed is None:
            return
        blocks = worker.hit_blocks if feed.mode is FeedMode.EXACT else chosen.told_blocks
        drift = self._truth.observe(
            worker.worker_id, told_tokens=chosen.told_blocks * worker.block_tokens,
            predicted_tokens=blocks * worker.block_tokens, cached_tokens=cached_tokens,
            prompt_tokens=chosen.request.prompt_tokens,
        )  # fmt: skip
        self._count_reported(worker.worker_id, chosen.request.prompt_tokens, cached_tokens)
        self._metrics.index_drift.labels(worker.worker_id).set(drift)
        if feed.on_truth(has_drifted=self._truth.has_drifted(worker.worker_id)):
            log.warning("prefix index drifted: %.2f of the tokens", drift, extra={"worker_id": worker.worker_id})
            self._ask("snapshot", worker.worker_id, self._fetch_snapshot(worker.worker_id))
        self._show_mode(worker.worker_id, feed)

    def prefilled(self, done: PrefillDone) -> None:
        """A prefill worker reports one prompt."""
        if self.view.get(done.worker_id) is not None:
            prompt_tokens = done.computed_tokens + done.cached_tokens
            self._count_reported(done.worker_id, prompt_tokens, done.cached_tokens, done.kv_bytes)

    def loads(self) -> dict[WorkerId, WorkerLoad]:
        """Every worker, as it is known here now."""
        now = self._clock()
        return {member.card.worker_id: self._load_of(member, now) for member in self.view.members()}

    def _load_of(self, member: Member, now: float) -> WorkerLoad:
        worker = member.card.worker_id
        reported = self._reported.get(worker, _Reported())
        return WorkerLoad(
            role=member.card.role,
            index=self._feeds[worker].mode.value,
            heard_s=now - member.seen_s,
            is_suspect=member.is_suspect,
            streams=len(member.in_flight),
            drift=self._truth.drift(worker),
            prompt_tokens=reported.prompt_tokens,
            cached_tokens=reported.cached_tokens,
            kv_bytes=reported.kv_bytes,
        )

    def _count_reported(self, worker: WorkerId, prompt_tokens: int, cached_tokens: int, kv_bytes: int = 0) -> None:
        reported = self._reported.setdefault(worker, _Reported())
        reported.prompt_tokens += prompt_tokens
        reported.cached_tokens += cached_tokens
        reported.kv_bytes += kv_bytes

    def _show_mode(self, worker: WorkerId, feed: KvFeed) -> None:
        self.view.trust(worker, feed.mode.value)
        self._metrics.show_mode(worker, feed.mode.value)

    # ---- what comes in

    def _on_connection(self, is_connected: bool) -> None:
        self.view.freeze(self._clock())

    def _on_load(self, delivery: Delivery) -> None:
        match decode(delivery.payload):
            case Heartbeat(is_stuck=True, worker_id=worker, epoch=epoch):
                self._on_stuck(worker, epoch)
            case Heartbeat() as heartbeat:
                if not self.view.heard(heartbeat, self._clock()):
                    self._ask("card", heartbeat.worker_id, self._fetch_card(heartbeat))
                elif (feed := self._feeds.get(heartbeat.worker_id)) and feed.on_heartbeat(heartbeat.kv_event_seq):
                    self._show_mode(heartbeat.worker_id, feed)
                    self._ask("snapshot", heartbeat.worker_id, self._fetch_snapshot(heartbeat.worker_id))
            case Goodbye(worker_id=worker):
                self.lost(worker, "goodbye")

    def _on_stuck(self, worker: WorkerId, epoch: int) -> None:
        """Its engine hangs: what runs there ends no more, and it will say goodbye in a few seconds."""
        member = self.view.get(worker)
        if member is not None and member.card.epoch == epoch:
            self.lost(worker, "its engine hangs")

    def _on_kv_events(self, delivery: Delivery) -> None:
        message = decode(delivery.payload)
        if not isinstance(message, KvEvents):
            return
        member = self.view.get(message.worker_id)
        feed = self._feeds.get(message.worker_id)
        if member is None or feed is None or member.card.epoch != message.epoch:
            return
        if feed.on_events(message):
            self._show_mode(message.worker_id, feed)
            self._ask("snapshot", message.worker_id, self._fetch_snapshot(message.worker_id))

    # ---- what is asked

    def _ask(self, what: str, worker: WorkerId, question: Coroutine[None, None, None]) -> None:
        """At most one question of a kind at a time for each worker."""
        if (what, worker) in self._asking or self._tasks is None:
            question.close()
            return
        self._asking.add((what, worker))
        task = self._tasks.create_task(question, name=f"{what}-{worker}")
        task.add_done_callback(lambda _: self._asking.discard((what, worker)))

    async def _fetch_card(self, heartbeat: Heartbeat) -> None:
        worker = heartbeat.worker_id
        try:
            card = await self._bus.registry.get(worker)
        except BusError as error:
            log.warning("no card: %s", error, extra={"worker_id": worker})
            return
        if card is None or card.epoch != heartbeat.epoch or self.view.get(worker) is not None:
            return
        self.view.join(card, heartbeat, self._clock())
        log.info("worker joined", extra={"worker_id": worker})
        self._count()
        feed = self._feeds[worker] = KvFeed(self.index, worker)
        self._show_mode(worker, feed)
        self._ask("snapshot", worker, self._fetch_snapshot(worker))

    async def _ping(self, worker: WorkerId) -> None:
        try:
            answer = await self._request(worker, Ping())
        except NoResponders:
            self.lost(worker, "nobody listens")
            return
        except BusError:
            return
        if isinstance(answer, Heartbeat) and answer.is_stuck:
            self._on_stuck(worker, answer.epoch)
        elif isinstance(answer, Heartbeat):
            self.view.heard(answer, self._clock())

    async def _fetch_snapshot(self, worker: WorkerId) -> None:
        while (feed := self._feeds.get(worker)) is not None:
            try:
                answer = await self._request(worker, KvSnapshotRequest())
            except (BusError, msgspec.MsgspecError) as error:
                log.info("no snapshot yet: %s", error, extra={"worker_id": worker})
                await asyncio.sleep(SNAPSHOT_RETRY_S)
                continue
            if self._feeds.get(worker) is not feed:
                return
            if isinstance(answer, KvSnapshot):
                is_short = feed.on_snapshot(answer)
                self._show_mode(worker, feed)
                if not is_short:
                    return

    async def _request(self, worker: WorkerId, question: Message) -> Message:
        subject = subjects.control(self._pool, worker)
        return decode(await self._bus.request(subject, encode(question), timeout_s=ASK_TIMEOUT_S))

    def _count(self) -> None:
        for role in ("prefill", "decode"):
            self._metrics.workers.labels(role).set(len(self.view.members(role)))
