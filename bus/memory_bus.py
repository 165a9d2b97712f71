"""The bus in one process: the contract of `base.py` without a server, deterministic, on whatever clock the loop has.

For `lab/` (virtual time) and for tests of single parts. Messages are delivered in the order they were published, in a later
turn of the loop than they were published in; `MemoryBroker.stop` and `MemoryBus.drop` cut connections. Everything between a
bus and the broker goes through `MemoryBroker.send` and `MemoryBroker.deliver`, where a broker of another kind may be slow or
lose it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import TypeVar

from . import subjects
from .base import (
    BusDisconnected,
    BusError,
    Delivery,
    Handler,
    NoResponders,
    QueueUnavailable,
    RequestTimeout,
    Setting,
    SettingChanged,
)
from .ids import WorkerId
from .jetstream import API_TIMEOUT_S
from .jobs import JobLimits
from .memory_jobs import MemoryJobQueue, MemoryStore, confirmed
from .messages import WorkerCard, decode, encode
from .server import MAX_PAYLOAD_BYTES

log = logging.getLogger(__name__)
T = TypeVar("T")

WAIT_CONNECTED_S = 10.0


class MemoryBroker:
    """What a nats-server is for NatsBus. `clock` is the loop's time unless another is given."""

    def __init__(self, *, jobs: JobLimits | None = None, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self._interests: dict[str, dict[MemorySubscription, None]] = {}  # by subject: "a.b", or "a.*" as it is written
        self._wildcards: dict[MemorySubscription, None] = {}  # every other pattern
        self._turns: dict[tuple[str, str], int] = {}  # whose turn it is in a queue group
        self._buses: dict[MemoryBus, None] = {}
        self._bus_numbers = itertools.count(1)
        self.is_running = True
        self.store: MemoryStore = MemoryStore(self, jobs or JobLimits())
        self.cards: dict[WorkerId, bytes] = {}
        self.settings: dict[str, Setting] = {}
        self.setting_revisions = itertools.count(1)
        self.handler_errors = 0

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop everything runs on."""
        return asyncio.get_running_loop()

    def now(self) -> float:
        """The time of the queue."""
        return self._clock() if self._clock is not None else self.loop.time()

    def stop(self) -> None:
        """As when the server dies: connections end, what is on its way is lost, jobs and cards stay."""
        self.is_running = False
        for bus in self._buses:
            bus.set_connected(False)

    def start(self) -> None:
        """As when the server is back: every bus that was not dropped connects again, oldest first."""
        self.is_running = True
        for bus in tuple(self._buses):
            bus.set_connected(not bus.is_dropped)
        self.store.dispatch()

    def enter(self, bus: MemoryBus) -> int:
        """A bus connects; its number."""
        self._buses[bus] = None
        return next(self._bus_numbers)

    def leave(self, bus: MemoryBus) -> None:
        """A bus has closed."""
        self._buses.pop(bus, None)
        for held in (*self._interests.values(), self._wildcards):
            for subscription in [held_one for held_one in held if held_one.bus is bus]:
                del held[subscription]

    # ---- the way there and back

    def send(self, bus: MemoryBus, effect: Callable[[], object]) -> None:
        """Have `effect` happen at the broker, in a later turn of the loop, after what this bus has sent before."""
        self.loop.call_soon(effect)

    def deliver(self, bus: MemoryBus, call: Callable[..., object], *args: object) -> None:
        """From the broker to a bus, in order."""
        call(*args)

    def hears(self, bus: MemoryBus) -> bool:
        """Whether the broker sees a connection of this bus."""
        return bus.is_connected

    def serve(self, bus: MemoryBus, effect: Callable[[], T]) -> asyncio.Future[T]:
        """Ask the durable side (queue, registry); the future stays open when it does not answer."""
        answer: asyncio.Future[T] = self.loop.create_future()

        def serve() -> None:
            if not (self.is_running and self.store.is_available and self.hears(bus)):
                return
            try:
                result = effect()
            except BusError as error:
                self.deliver(bus, _answer, answer, None, error)
            else:
                self.deliver(bus, _answer, answer, result, None)

        self.send(bus, serve)
        return answer

    # ---- interests

    def add(self, subscription: MemorySubscription) -> None:
        """An interest."""
        if subscription.is_pattern:
            self._wildcards[subscription] = None
        else:
            self._interests.setdefault(subscription.subject, {})[subscription] = None

    def discard(self, subscription: MemorySubscription) -> None:
        """No interest any more."""
        self._wildcards.pop(subscription, None)
        held = self._interests.get(subscription.subject)
        if held is not None:
            held.pop(subscription, None)
            if not held:
                del self._interests[subscription.subject]

    def route(self, sender: MemoryBus, delivery: Delivery) -> None:
        """Hand a message to everyone who is there now, or tell the sender that nobody is."""
        if not self.is_running:
            return
        subject, one_above = delivery.subject, subjects.all_under(delivery.subject.rpartition(".")[0])
        takers = [*self._interests.get(subject, ()), *self._interests.get(one_above, ())]
        takers += [taker for taker in self._wildcards if matches(taker.subject, subject)]
        takers = [taker for taker in takers if self.hears(taker.bus)]
        if takers:
            for taker in self._one_of_each_queue(takers):
                self.deliver(taker.bus, self._hand, taker, delivery)
        elif delivery.reply and self.hears(sender):
            self.route(sender, Delivery(delivery.reply, "", b"", True))

    def _one_of_each_queue(self, takers: list[MemorySubscription]) -> list[MemorySubscription]:
        chosen = [taker for taker in takers if not taker.queue]
        groups: dict[tuple[str, str], list[MemorySubscription]] = {}
        for taker in takers:
            if taker.queue:
                groups.setdefault((taker.subject, taker.queue), []).append(taker)
        for key, members in groups.items():
            turn = self._turns[key] = self._turns.get(key, -1) + 1
            chosen.append(members[turn % len(members)])
        return chosen

    def _hand(self, taker: MemorySubscription, delivery: Delivery) -> None:
        try:
            taker.handler(delivery)
        except Exception:  # As in the NATS read loop: one bad message costs no other.
            self.handler_errors += 1
            log.exception("the handler of %s failed", delivery.subject)


class MemorySubscription:
    """One interest in a subject."""

    def __init__(self, bus: MemoryBus, broker: MemoryBroker, subject: str, handler: Handler, queue: str) -> None:
        self.bus = bus
        self.subject = subject
        self.handler = handler
        self.queue = queue
        exact = subject.removesuffix(".*")
        self.is_pattern = "*" in exact or ">" in exact
        self._broker = broker

    async def unsubscribe(self) -> None:
        """No delivery starts after this returns."""
        self._broker.discard(self)


class MemoryBus:
    """One process's connection to a MemoryBroker."""

    def __init__(self, broker: MemoryBroker, *, name: str = "") -> None:
        self._broker = broker
        self._name = name
        self._inbox = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[Delivery]] = {}
        self._listeners: list[Callable[[bool], None]] = []
        self._connected = asyncio.Event()
        self._fatal = asyncio.Event()
        self._fatal_error = BusError("the bus is closed")
        self._jobs = MemoryJobQueue(self, broker.store)
        self._registry = MemoryRegistry(self, broker)
        self._settings = MemorySettings(self, broker)
        self.is_dropped = False

    @property
    def jobs(self) -> MemoryJobQueue:
        """The work queue."""
        return self._jobs

    @property
    def registry(self) -> MemoryRegistry:
        """The cards of the workers."""
        return self._registry

    @property
    def settings(self) -> MemorySettings:
        """What operators decide."""
        return self._settings

    @property
    def broker(self) -> MemoryBroker:
        """Where it is connected."""
        return self._broker

    @property
    def is_connected(self) -> bool:
        """Whether a message can be sent now."""
        return self._connected.is_set()

    async def connect(self) -> None:
        """Raises BusError when the broker is stopped."""
        if not self._broker.is_running:
            raise BusError("cannot reach the memory broker: it is stopped")
        self._inbox = subjects.under("_INBOX", str(self._broker.enter(self)))
        self._broker.add(
            MemorySubscription(
                self,
                self._broker,
                subjects.all_under(subjects.under(self._inbox, "r")),
                self._on_reply,
                "",
            )
        )
        self.set_connected(True)

    async def aclose(self) -> None:
        """Leave; what was published before is delivered."""
        await self._jobs.aclose()
        await asyncio.sleep(0)
        self.set_connected(False)
        self._broker.leave(self)

    def drop(self) -> None:
        """Lose the connection, until `restore`."""
        self.is_dropped = True
        self.set_connected(False)

    def restore(self) -> None:
        """Get the connection back."""
        self.is_dropped = False
        self.set_connected(self._broker.is_running)

    def fail(self, reason: str) -> None:
        """As when the server refuses us for good."""
        self._fatal_error = BusError(reason)
        self._fatal.set()

    def set_connected(self, is_connected: bool) -> None:
        """Called by the broker."""
        if is_connected == self._connected.is_set():
            return
        if is_connected:
            self._connected.set()
            self._jobs.on_connected()
        else:
            self._connected.clear()
            for waiter in self._waiting.values():
                if not waiter.done():
                    waiter.set_exception(BusDisconnected("the connection was lost before the answer came"))
        for listener in tuple(self._listeners):
            listener(is_connected)

    async def wait_connected(self, timeout_s: float) -> None:
        """At least one turn of the loop; raises QueueUnavailable when there is no connection in time."""
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise QueueUnavailable(f"no connection to the broker in {timeout_s:g} s") from None

    async def fatal(self) -> BusError:
        """Waits for `fail`."""
        await self._fatal.wait()
        return self._fatal_error

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(is_connected)` on every change."""
        self._listeners.append(listener)

    # ---- core messages

    def publish_nowait(self, subject: str, payload: bytes, *, reply: str = "") -> bool:
        """Queue a message for a later turn of the loop; False while disconnected."""
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise ValueError(f"payload of {len(payload)} B exceeds the server's max_payload of {MAX_PAYLOAD_BYTES} B")
        if not subject or (subject + reply).split() != [subject + reply]:
            raise ValueError(f"not a subject: {subject!r} (reply {reply!r})")
        if not self.is_connected:
            return False
        delivery = Delivery(subject, reply, payload)
        self._broker.send(self, lambda: self._broker.route(self, delivery))
        return True

    async def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> MemorySubscription:
        """Returns when messages come."""
        subscription = MemorySubscription(self, self._broker, subject, handler, queue)
        self._broker.add(subscription)
        try:
            await self.wait_connected(WAIT_CONNECTED_S)
        except BaseException as error:  # Also when it is cancelled: nobody would ever unsubscribe.
            self._broker.discard(subscription)
            if isinstance(error, QueueUnavailable):
                raise BusDisconnected("no connection to the broker") from error
            raise
        return subscription

    def new_inbox(self) -> str:
        """A subject of our own that nobody else uses."""
        return subjects.under(self._inbox, "i", str(next(self._numbers)))

    async def request(self, subject: str, payload: bytes, *, timeout_s: float) -> bytes:
        """Publish and wait for one answer."""
        reply = subjects.under(self._inbox, "r", str(next(self._numbers)))
        if not self.publish_nowait(subject, payload, reply=reply):
            raise BusDisconnected("no connection to the broker")
        waiter: asyncio.Future[Delivery] = self._broker.loop.create_future()
        self._waiting[reply] = waiter
        timer = self._broker.loop.call_later(timeout_s, _expire, waiter, subject, timeout_s)
        try:
            answer = await waiter
        finally:
            timer.cancel()
            del self._waiting[reply]
        if answer.is_no_responders:
            raise NoResponders(f"nobody listens on {subject}")
        return answer.payload

    def _on_reply(self, delivery: Delivery) -> None:
        waiter = self._waiting.get(delivery.subject)
        if waiter is not None and not waiter.done():
            waiter.set_result(delivery)


class MemoryRegistry:
    """The last card of each worker; kept as bytes, so that a card crosses it as it crosses NATS."""

    def __init__(self, bus: MemoryBus, broker: MemoryBroker) -> None:
        self._bus = bus
        self._broker = broker

    async def put(self, card: WorkerCard) -> None:
        """Store the card."""
        await self._ask(lambda: self._broker.cards.__setitem__(card.worker_id, encode(card)))

    async def get(self, worker: WorkerId) -> WorkerCard | None:
        """The card, or None."""
        payload = await self._ask(lambda: self._broker.cards.get(worker))
        return None if payload is None else _card(payload)

    async def delete(self, worker: WorkerId) -> None:
        """Forget the card."""
        await self._ask(lambda: self._broker.cards.pop(worker, None))

    async def list(self) -> list[WorkerCard]:
        """All cards, by worker id."""
        cards = await self._ask(lambda: dict(self._broker.cards))
        return [_card(cards[worker]) for worker in sorted(cards)]

    async def _ask(self, effect: Callable[[], T]) -> T:
        if not self._bus.is_connected:
            raise BusDisconnected("no connection to the broker")
        return await confirmed(self._bus, effect, "a card", timeout_s=API_TIMEOUT_S)


class MemorySettings:
    """One small document under each key."""

    def __init__(self, bus: MemoryBus, broker: MemoryBroker) -> None:
        self._bus = bus
        self._broker = broker

    async def get(self, key: str) -> Setting | None:
        """The newest, or None."""
        token = subjects.token(key)
        return await self._ask(lambda: self._broker.settings.get(token))

    async def put(self, key: str, value: bytes, *, after: int | None) -> int:
        """Store it in place of revision `after`."""
        token = subjects.token(key)

        def store() -> int | None:
            held = self._broker.settings.get(token)
            if (held.revision if held else None) != after:
                return None
            stored = self._broker.settings[token] = Setting(value, next(self._broker.setting_revisions))
            return stored.revision

        revision = await self._ask(store)
        if revision is None:
            raise SettingChanged(f"the setting {key!r} was changed by somebody else")
        return revision

    async def _ask(self, effect: Callable[[], T]) -> T:
        if not self._bus.is_connected:
            raise BusDisconnected("no connection to the broker")
        return await confirmed(self._bus, effect, "a setting", timeout_s=API_TIMEOUT_S)


def matches(pattern: str, subject: str) -> bool:
    """Whether a subscription to `pattern` (`*`: one token, `>`: the rest) gets messages on `subject`."""
    wanted, given = pattern.split("."), subject.split(".")
    for index, part in enumerate(wanted):
        if part == ">":
            return len(given) > index
        if index >= len(given) or part not in ("*", given[index]):
            return False
    return len(wanted) == len(given)


def _card(payload: bytes) -> WorkerCard:
    card = decode(payload)
    assert isinstance(card, WorkerCard)
    return card


def _answer(waiter: asyncio.Future[T], result: T, error: BusError | None) -> None:
    if waiter.done():
        return
    if error is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(result)


def _expire(waiter: asyncio.Future[Delivery], subject: str, timeout_s: float) -> None:
    if not waiter.done():
        waiter.set_exception(RequestTimeout(f"no answer on {subject} in {timeout_s:g} s"))
