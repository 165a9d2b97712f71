"""A worker as others see it: its card, its heartbeat, its answers to Ping and KvSnapshotRequest, its KV events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery, Subscription
from ..bus.messages import Goodbye, Heartbeat, KvEvent, KvSnapshotRequest, Message, Ping, WorkerCard, decode, encode
from .engines.base import Engine
from .kv_ledger import KvLedger

log = logging.getLogger(__name__)
CHANGE_GAP_S = 0.05  # between two heartbeats that a change causes
REGISTER_AGAIN_S = 1.0

ControlHandler = Callable[[Message, Delivery], None]


class Presence:
    """Publishes while `run` runs. Set `on_control` for the control messages that only one role understands."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        card: WorkerCard,
        engine: Engine,
        *,
        heartbeat_s: float,
    ) -> None:
        self._bus = bus
        self._pool = pool
        self.card = card
        self._engine = engine
        self._heartbeat_s = heartbeat_s
        self.on_control: ControlHandler | None = None
        self._ledger = KvLedger(card.worker_id, card.epoch)
        self._subscription: Subscription | None = None
        self._changed = asyncio.Event()
        self._reconnected = asyncio.Event()
        self._last: Heartbeat | None = None
        self._is_left = False
        self.is_draining = False
        self.is_stuck = False
        self.waiting: Callable[[], int] = lambda: 0  # what waits outside of the engine
        self.prefill_tokens_per_s: Callable[[], float] = lambda: 0.0

    async def join(self) -> None:
        """Listen, then show the card. Raises BusError when the registry does not take it."""
        self._engine.on_kv_events(self._on_kv_events)
        subject = subjects.control(self._pool, self.card.worker_id)
        self._subscription = await self._bus.subscribe(subject, self._on_delivery)
        await self._bus.registry.put(self.card)
        self._bus.on_connection(self._on_connection)
        self._beat()

    async def run(self) -> None:
        """Heartbeats until cancelled; shows the card again after each reconnect."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._register_again(), name="register")
            while True:
                await asyncio.sleep(min(CHANGE_GAP_S, self._heartbeat_s))
                try:
                    async with asyncio.timeout(max(0.0, self._heartbeat_s - CHANGE_GAP_S)):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                self._changed.clear()
                self._beat()

    def stuck(self) -> None:
        """The engine hangs; every router hears it now."""
        self.is_draining = self.is_stuck = True
        self._beat()

    def changed(self) -> None:
        """Something that the heartbeat tells is different now: send one soon."""
        self._changed.set()

    async def leave(self) -> None:
        """Say goodbye and take the card back, as far as the bus lets us."""
        self._is_left = True
        if self._subscription is None:
            return
        await self._subscription.unsubscribe()
        goodbye = Goodbye(self.card.worker_id, self.card.epoch)
        self._bus.publish_nowait(subjects.load(self._pool, self.card.worker_id), encode(goodbye))
        try:
            async with asyncio.timeout(1.0):
                await self._bus.registry.delete(self.card.worker_id)
        except (BusError, TimeoutError) as error:
            log.warning("left without taking the card back: %s", error)

    def heartbeat(self) -> Heartbeat:
        load = self._engine.load()
        return Heartbeat(
            worker_id=self.card.worker_id,
            epoch=self.card.epoch,
            role=self.card.role,
            running=load.running,
            waiting=load.waiting + self.waiting(),
            kv_blocks_free=load.kv_blocks_free,
            kv_event_seq=self._ledger.seq,
            is_draining=self.is_draining,
            prefill_tokens_per_s=self.prefill_tokens_per_s(),
            steps=load.steps,
            due=load.due,
            is_stuck=self.is_stuck,
        )

    def reply(self, delivery: Delivery, answer: Message) -> None:
        """Answer a request, if it was one."""
        if delivery.reply:
            self._bus.publish_nowait(delivery.reply, encode(answer))

    def _beat(self) -> None:
        if not self._is_left:
            self._bus.publish_nowait(subjects.load(self._pool, self.card.worker_id), encode(self.heartbeat()))

    async def _register_again(self) -> None:
        while True:
            await self._reconnected.wait()
            self._reconnected.clear()
            try:
                await self._bus.registry.put(self.card)
            except BusError as error:
                log.info("card not taken yet: %s", error)
                self._reconnected.set()
                await asyncio.sleep(REGISTER_AGAIN_S)

    def _on_connection(self, is_connected: bool) -> None:
        if is_connected:
            self._reconnected.set()
            self._changed.set()

    def _on_kv_events(self, events: list[KvEvent]) -> None:
        # Told also while nobody can hear it: the gap in seq makes the routers ask for a snapshot.
        message = self._ledger.apply(events)
        self._bus.publish_nowait(subjects.kv_events(self._pool, self.card.worker_id), encode(message))

    def _on_delivery(self, delivery: Delivery) -> None:
        try:
            message = decode(delivery.payload)
        except msgspec.MsgspecError as error:
            log.warning("dropped a control message that is none: %s", error)
            return
        match message:
            case Ping():
                self.reply(delivery, self.heartbeat())
            case KvSnapshotRequest():
                self.reply(delivery, self._ledger.snapshot())
            case _ if self.on_control is not None:
                self.on_control(message, delivery)
            case _:
                log.warning("dropped a %s: not for a %s worker", type(message).__name__, self.card.role)
