"""The bus on virtual time: `MemoryBroker` with the way there and back of a real nats-server, and what goes wrong on it.

Every connection is a pair of ordered byte streams with a delay. What was on its way when a connection breaks is lost without
a word; a process that does not read is cut off; a partition holds everything up until one side gives up. JetStream can be
away while core messages flow (an election), and repeats deliveries that it had not written down.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..bus.base import BusError, Delivery
from ..bus.client import PING_INTERVAL_S, RECONNECT_WAIT_S
from ..bus.jobs import JobLimits
from ..bus.memory_bus import MemoryBroker, MemoryBus
from ..bus.memory_jobs import MemoryStore
from .log import EventLog
from .loop import Process, VirtualLoop

DIAL_AGAIN_S = 0.25


@dataclass(slots=True)
class BusFaults:
    """What is wrong with the server or the network around it now."""

    delay_s: tuple[float, float] = (0.0001, 0.001)  # each way, from - to
    loss: float = 0.0  # share of messages that vanish on their way to a subscriber
    pending_max: int = 2000  # messages for a process that does not read; one more and the server cuts it off


class LabStore(MemoryStore):
    """The work queue, which tells of each ack: `on_ack(bus, payload of the job)`."""

    on_ack: Callable[[LabBus, bytes], None] = staticmethod(lambda bus, payload: None)

    def acked(self, sequence: int, bus: MemoryBus) -> None:
        """As every store, and tell it."""
        payload = self.payload(sequence)
        if payload is not None:
            assert isinstance(bus, LabBus)
            self.on_ack(bus, payload)
        super().acked(sequence, bus)


class LabBroker(MemoryBroker):
    """The server: a process of its own that is never paused, only stopped."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, log: EventLog, *, jobs: JobLimits | None = None) -> None:
        super().__init__(jobs=jobs, clock=loop.time)
        self.store: LabStore = LabStore(self, jobs or JobLimits())
        self.faults = BusFaults()
        self.log = log
        self.rng = rng
        self.process = Process(loop, "nats")
        self._loop = loop
        self._connections: dict[LabBus, None] = {}

    @property
    def loop(self) -> VirtualLoop:
        """The one loop."""
        return self._loop

    # ---- the way there and back

    def delay_s(self) -> float:
        """One way, once."""
        return self.rng.uniform(*self.faults.delay_s)

    def send(self, bus: MemoryBus, effect: Callable[[], object]) -> None:
        """Over the bus's connection, in order; lost with it."""
        assert isinstance(bus, LabBus)
        if bus.held is not None:
            bus.held.append(partial(self.send, bus, effect))
            return
        bus.out_at = max(math.nextafter(bus.out_at, math.inf), self._loop.time() + self.delay_s())
        self.process.call_at(bus.out_at, self._arrive, bus, bus.connection, effect)

    def _arrive(self, bus: LabBus, connection: int, effect: Callable[[], object]) -> None:
        if self.is_running and connection == bus.connection:
            effect()

    def deliver(self, bus: MemoryBus, call: Callable[..., object], *args: object) -> None:
        """To the bus's process, in order; lost with the connection, or when the process does not read for too long."""
        assert isinstance(bus, LabBus)
        if bus.held is not None:
            bus.held.append(partial(self.deliver, bus, call, *args))
            return
        if bus.process.is_paused:
            bus.pending += 1
            if bus.pending == self.faults.pending_max:
                self.log.add("nats", f"cut {bus.process.name} off: it does not read")
                self.forget(bus)
                bus.process.call_at(bus.in_at + 1e-6, bus.on_cut)  # It reads what came before, then the end.
            if bus.pending >= self.faults.pending_max:
                return
        elif self.faults.loss and self.rng.random() < self.faults.loss:
            self.log.add("nats", f"lost a message to {bus.process.name}")
            return
        bus.in_at = max(math.nextafter(bus.in_at, math.inf), self._loop.time() + self.delay_s())
        bus.process.call_at(bus.in_at, self._enter, bus, bus.connection, call, args)

    def _enter(self, bus: LabBus, connection: int, call: Callable[..., object], args: tuple[object, ...]) -> None:
        bus.pending = 0
        if connection == bus.reading:
            call(*args)

    def hears(self, bus: MemoryBus) -> bool:
        """Whether there is a connection as far as the server knows."""
        return bus in self._connections

    def route(self, sender: MemoryBus, delivery: Delivery) -> None:
        """As every broker, with a line in the log."""
        if self.is_running:
            assert isinstance(sender, LabBus)
            self.log.message(sender.process.name, delivery)
            super().route(sender, delivery)

    # ---- connections

    def accept(self, bus: LabBus) -> bool:
        """A connection is made, if it can be."""
        if not self.is_running or bus.held is not None:
            return False
        bus.connection += 1
        bus.reading = bus.connection
        self._connections[bus] = None
        return True

    def forget(self, bus: LabBus) -> None:
        """The server's side of a connection is gone, with the pulls that were open on it."""
        self._connections.pop(bus, None)
        bus.connection += 1
        self.store.forget(bus)

    def leave(self, bus: MemoryBus) -> None:
        """A bus has closed, or its process has died."""
        assert isinstance(bus, LabBus)
        self.forget(bus)
        super().leave(bus)

    # ---- faults

    def stop(self) -> None:
        """The server dies: every connection breaks, and what was under way is lost."""
        self.log.add("nats", "stopped")
        self.is_running = False
        for bus in tuple(self._connections):
            self.forget(bus)
            bus.process.call_soon(bus.on_cut)

    def start(self) -> None:
        """It is back, and has forgotten its last deliveries."""
        self.log.add("nats", "started")
        self.is_running = True
        self.repeat_deliveries()

    def lose_leader(self) -> None:
        """JetStream answers nobody until `elect`; core messages go on."""
        self.log.add("nats", "lost the stream leader")
        self.store.is_available = False

    def elect(self) -> None:
        """There is a leader again."""
        if not self.store.is_available:
            self.log.add("nats", "elected a stream leader")
            self.store.is_available = True
            self.repeat_deliveries()

    def repeat_deliveries(self) -> None:
        """A new leader delivers again what the old one had not written down, under the same delivery number."""
        self.store.repeat(lambda: self.rng.random() < 0.3)
        self.process.call_soon(self.store.dispatch)

    def partition(self, bus: LabBus) -> None:
        """Nothing gets through in either direction, and nobody is told; see `heal`."""
        self.log.add("nats", f"cannot be reached by {bus.process.name}")
        if bus.held is None:
            bus.held = []
            # Two pings are not answered.
            give_up_at = self._loop.time() + PING_INTERVAL_S * (2 + self.rng.random())
            bus.process.call_at(give_up_at, bus.on_silence, bus.connection)

    def heal(self, bus: LabBus) -> None:
        """It gets through again: late, if both sides still have the connection, or not at all."""
        held, bus.held = bus.held, None
        self.log.add("nats", f"can be reached by {bus.process.name}")
        if bus in self._connections:
            for step in held or ():
                step()


class LabBus(MemoryBus):
    """One process's connection."""

    def __init__(self, broker: LabBroker, process: Process) -> None:
        super().__init__(broker, name=process.name)
        self.process = process
        self.connection = 0  # grows with each that is made or lost; what belongs to an older one is lost
        self.reading = 0  # the connection that the process's own side reads
        self.held: list[Callable[[], None]] | None = None  # while partitioned: what waits to get through
        self.pending = 0  # delivered and not read, while the process is paused
        self.out_at = self.in_at = 0.0  # when the last message arrives there, and here
        self._lab = broker
        self._is_left = False

    async def connect(self) -> None:
        """Raises BusError when the server cannot be reached."""
        if not self._lab.accept(self):
            raise BusError(f"{self.process.name} cannot reach the server")
        await super().connect()

    def on_cut(self) -> None:
        """The process sees the end of its connection."""
        if not self.is_connected:
            return
        self.reading = 0
        self.set_connected(False)
        self._dial_after(RECONNECT_WAIT_S + self._lab.rng.random() * 0.2)

    def on_silence(self, connection: int) -> None:
        """The process gives a connection up on which nothing came for too long."""
        if self.held is not None and connection == self.connection:
            self.held.clear()
            self._lab.forget(self)
            self.on_cut()

    def _dial_after(self, delay_s: float) -> None:
        self._lab.loop.call_later(delay_s, self._dial)

    def _dial(self) -> None:
        if self._is_left:
            return
        if self._lab.accept(self):
            self.set_connected(True)
        else:
            self._dial_after(DIAL_AGAIN_S)

    async def aclose(self) -> None:
        """Leave; what was published before is on its way."""
        if self.is_connected and self.held is None:
            await asyncio.sleep(max(0.0, self.out_at - self._lab.loop.time()))
        self._is_left = True
        await super().aclose()
