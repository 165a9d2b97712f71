"""Chaos search: a pool of some shape, requests, and faults of every kind at random times, all from one seed.

While faults are at work only safety is asked for: no wrong token, no second end. After they have stopped everything must
finish within `LIVENESS_S`, answer again, give back whatever was held, and stop when told to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ..bus.messages import SamplingParams
from .clients import POISON, VOCABULARY, Request
from .house import House
from .log import EventLog
from .loop import Deadlock, VirtualLoop, run
from .members import Member, Shape, WorkerMember

FAULTS_S = (2.0, 14.0)  # when they begin and, at the latest, end
DEAD_S = 3.0  # of silence
CALM_S = 8.0  # after the last fault: dead workers are noticed, new ones known
LIVENESS_S = 10.0  # after the last fault, for every request that was open, besides the timeouts of hand-offs
SETTLE_S = 70.0  # for jobs whose end nobody could tell: their time to live
POLICIES = (
    *("kv", "cost", "round_robin", "random", "least_loaded", "power_of_two"),
    *("prefix_affinity", "session_affinity", "lmetric", "mix"),
)
HOW_REQUESTS_END = frozenset(
    (
        *(
            "answered",
            "left",
            "router_lost",
            "no_router",
            "no_worker",
            "overloaded",
            "decode_worker_lost",
            "tokens_lost",
        ),
        "quarantined",  # Workers that died twice around it, of whatever: a router cannot know.
    )
)
POISONED_MAX = 3  # workers that one request may kill


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong; `pick` says with whom, as a share of those who are there then."""

    at_s: float
    kind: str
    duration_s: float
    pick: float

    def __str__(self) -> str:
        return f"{self.at_s:.3f} s {self.kind} for {self.duration_s:.3f} s (pick {self.pick:.3f})"


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    seed: int
    shape: Shape
    requests: list[Request]
    faults: list[Fault]
    skews_s: list[float]  # of each host's clock


@dataclass(slots=True)
class Outcome:
    """How a run went."""

    seed: int
    violations: list[str]
    lines: list[str]
    ends: dict[str, int] = field(default_factory=dict)
    virtual_s: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.violations


# ---- drawing


def draw(seed: int) -> Plan:
    """The plan of a seed."""
    rng = random.Random(seed)
    shape = Shape(
        routers=rng.choice((1, 2)),
        prefill=rng.choice((0, 1, 1, 2, 2, 3)),
        decode=rng.choice((1, 2, 2, 3)),
        policy=rng.choice(POLICIES),
        local_prefill_tokens_max=rng.choice((0, 8, 32)),
        request_timeout_s=40.0,
        slots=rng.choice((2, 4, 8)),
        prefill_slots=rng.choice((1, 2, 4)),
        block_tokens=rng.choice((4, 8)),
        kv_blocks=rng.choice((40, 64, 200)),
        chunk_tokens=rng.choice((8, 32, 128)),
        prefill_ms_per_token=rng.choice((0.5, 2.0, 8.0)),
        itl_ms=rng.choice((5.0, 20.0, 60.0)),
        handoff_timeout_s=rng.choice((1.0, 2.0, 4.0)),
        is_direct=rng.random() < 0.7,
        max_deliver=rng.choice((2, 4)),
        ack_wait_s=rng.choice((15.0, 15.0, 3.0, 1.0)),
        link_bytes_per_s=rng.choice((1e9, 1e5, 1e4, 2e3)),  # a token's KV is 16 B
        link_latency_s=rng.choice((0.0002, 0.005)),
    )
    begin_s, end_s = FAULTS_S
    faults = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4, 6))):
        at_s = rng.uniform(begin_s, end_s - 0.5)
        faults.append(Fault(at_s, rng.choice(sorted(KINDS)), _duration_s(rng, end_s - at_s), rng.random()))
    hosts = shape.routers + shape.prefill + shape.decode
    skews_s = [rng.choice((1e4, 1e4, 1e4, 1e4 + 3600.0, 1e4 - 3600.0, 1e6)) for _ in range(hosts)]
    return Plan(seed, shape, _requests(rng), sorted(faults, key=lambda fault: fault.at_s), skews_s)


def _duration_s(rng: random.Random, most_s: float) -> float:
    """Short and long ones alike often."""
    return min(most_s, 10 ** rng.uniform(-2, 1.2))


def _requests(rng: random.Random) -> list[Request]:
    prefixes = [rng.choices(VOCABULARY, k=rng.randint(8, 60)) for _ in range(3)]
    requests = []
    for number in range(rng.randint(8, 20)):
        prompt = rng.choice(prefixes) * (rng.random() < 0.6) + rng.choices(VOCABULARY, k=rng.randint(1, 50))
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 24), temperature=rng.choice((0.0, 0.8)), seed=rng.randint(0, 99)
        )
        leaves_s = rng.uniform(0.0, 2.0) if rng.random() < 0.1 else None
        timeout_s = rng.uniform(1.0, 8.0) if rng.random() < 0.15 else None
        requests.append(Request(number, prompt, sampling, rng.uniform(1.0, FAULTS_S[1]), leaves_s, timeout_s))
    if rng.random() < 0.1:
        poison = requests[0]
        poison.prompt[-1], poison.arrival_s = POISON, rng.uniform(1.0, 6.0)
    return requests


# ---- faults


class Saboteur:
    """Does what the plan says to the house, and undoes it."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._undo: dict[Callable[[], None], None] = {}  # what is still at work

    def strike(self, fault: Fault) -> None:
        """Now."""
        self._house.log.add("fault", str(fault))
        undo = KINDS[fault.kind](self._house, fault)
        if undo is not None:
            self._undo[undo] = None
            self._house.loop.call_later(fault.duration_s, self._end, undo)

    def _end(self, undo: Callable[[], None]) -> None:
        if undo in self._undo:
            del self._undo[undo]
            undo()

    def stop(self) -> None:
        """End whatever is at work."""
        for undo in list(self._undo):
            self._end(undo)


Undo = Callable[[], None] | None


def _one(fault: Fault, among: list[Member]) -> Member | None:
    return among[int(fault.pick * len(among))] if among else None


def _members(house: House) -> list[Member]:
    return [*house.live_workers, *house.live_routers]


def _kill(house: House, fault: Fault) -> Undo:
    victim = _one(fault, _members(house))
    if victim is not None:
        victim.kill()
        house.restart(victim, fault.duration_s)
    return None


def _kill_worker(house: House, fault: Fault) -> Undo:
    victim = _one(fault, [*house.live_workers])
    if victim is not None:
        victim.kill()
        house.restart(victim, fault.duration_s)
    return None


def _stop_worker(house: House, fault: Fault) -> Undo:
    workers = [worker for worker in house.live_workers if not worker.is_asked]
    if workers:
        workers[int(fault.pick * len(workers))].ask_to_stop()
    return None


def _engine_of(house: House, fault: Fault) -> WorkerMember | None:
    ready = [worker for worker in house.live_workers if worker.card is not None and not worker.process.is_paused]
    return ready[int(fault.pick * len(ready))] if ready else None


def _break_engine(house: House, fault: Fault) -> Undo:
    victim = _engine_of(house, fault)
    if victim is not None:
        victim.break_engine()
    return None


def _hang_engine(house: House, fault: Fault) -> Undo:
    """For ever: the worker has to notice."""
    victim = _engine_of(house, fault)
    if victim is not None:
        victim.hang()
    return None


def _stall_engine(house: House, fault: Fault) -> Undo:
    victim = _engine_of(house, fault)
    if victim is None:
        return None
    victim.hang()
    return victim.go_on


def _pause(house: House, fault: Fault) -> Undo:
    victim = _one(fault, [member for member in _members(house) if not member.process.is_paused])
    if victim is None:
        return None
    house.log.add(victim.name, "paused")
    victim.process.pause()

    def undo() -> None:
        house.log.add(victim.name, "resumed")
        victim.process.resume()

    return undo


def _partition(house: House, fault: Fault) -> Undo:
    victim = _one(fault, [member for member in _members(house) if member.bus.held is None])
    if victim is None:
        return None
    house.broker.partition(victim.bus)
    return lambda: house.broker.heal(victim.bus)


def _stop_nats(house: House, fault: Fault) -> Undo:
    if not house.broker.is_running:
        return None
    house.broker.stop()
    return house.broker.start


def _lose_leader(house: House, fault: Fault) -> Undo:
    house.broker.lose_leader()
    # 4.5 to 8 s, an election of raft (reference: docs/bus.md); it ends when it ends.
    house.loop.call_later(4.5 + 3.5 * fault.pick, house.broker.elect)
    return None


def _lose_messages(house: House, fault: Fault) -> Undo:
    house.broker.faults.loss = 0.02 + 0.4 * fault.pick

    def undo() -> None:
        house.broker.faults.loss = 0.0

    return undo


def _slow_bus(house: House, fault: Fault) -> Undo:
    usual_s = house.broker.faults.delay_s
    house.broker.faults.delay_s = (0.0, 0.4 * fault.pick)

    def undo() -> None:
        house.broker.faults.delay_s = usual_s

    return undo


def _impatient_nats(house: House, fault: Fault) -> Undo:
    """A server with little room for who does not read, and somebody who does not."""
    house.broker.faults.pending_max = 3 + int(fault.pick * 40)
    return _pause(house, fault)


def _stall(house: House, fault: Fault) -> Undo:
    wires = list(house.net.wires)
    chosen = wires[int(fault.pick * len(wires)) :][:2]
    for wire in chosen:
        wire.writes_late = True
        wire.stall()

    def undo() -> None:
        for wire in chosen:
            wire.resume()

    return undo


def _slow_links(house: House, fault: Fault) -> Undo:
    usual, latency_s = house.net.faults.bytes_per_s, house.net.faults.latency_s
    house.net.faults.bytes_per_s = 10 ** (3 + 3 * fault.pick)
    for wire in house.net.wires:
        wire.bytes_per_s = house.net.faults.bytes_per_s

    def undo() -> None:
        house.net.faults.bytes_per_s = usual
        house.net.faults.latency_s = latency_s
        for wire in house.net.wires:
            wire.bytes_per_s = usual

    return undo


def _cut_links(house: House, fault: Fault) -> Undo:
    wires = list(house.net.wires)
    for wire in wires[int(fault.pick * len(wires)) :]:
        wire.cut()
    return None


def _corrupt(house: House, fault: Fault) -> Undo:
    for wire in house.net.wires:
        wire.corrupt_messages = 1 + int(fault.pick * 4)
    return None


def _slow_aborts(house: House, fault: Fault) -> Undo:
    """Links that need long to be aborted, and stall."""
    house.net.faults.abort_s = 2.0 * fault.pick
    return _stall(house, fault)


KINDS: dict[str, Callable[[House, Fault], Undo]] = {
    "kill": _kill,
    "kill a worker": _kill_worker,
    "stop a worker": _stop_worker,
    "break an engine": _break_engine,
    "hang an engine": _hang_engine,
    "stall an engine": _stall_engine,
    "pause": _pause,
    "partition": _partition,
    "stop nats": _stop_nats,
    "lose the leader": _lose_leader,
    "lose messages": _lose_messages,
    "slow bus": _slow_bus,
    "cut off slow readers": _impatient_nats,
    "stall links": _stall,
    "slow links": _slow_links,
    "cut links": _cut_links,
    "corrupt messages": _corrupt,
    "slow aborts": _slow_aborts,
}


# ---- one run


async def play(loop: VirtualLoop, plan: Plan, log: EventLog) -> House:
    """Run a plan to its end; the house says what was violated."""
    house = House(loop, random.Random(plan.seed ^ 0xC4A05), plan.shape, log)
    with house.logging():
        await house.start(plan.skews_s)
        saboteur = Saboteur(house)
        for request in plan.requests:
            loop.call_at(request.arrival_s, house.send, request)
        for fault in plan.faults:
            loop.call_at(fault.at_s, saboteur.strike, fault)
        await _until(loop, FAULTS_S[1])
        saboteur.stop()
        house.broker.elect()
        log.add("fault", "all ended")
        await asyncio.sleep(CALM_S)
        house.is_calm = True
        for stale in house.stale_members():
            house.violate(stale)
        await _prove_alive(house, plan)
        await _settle(house)
        await house.stop()
    return house


async def _until(loop: VirtualLoop, when: float) -> None:
    await asyncio.sleep(max(0.0, when - loop.time()))


async def _prove_alive(house: House, plan: Plan) -> None:
    """Old requests end, and new ones are answered, though perhaps not at the first try.

    A worker may still be full; an idle engine that hangs is found out only by a request.
    """
    end_s = house.loop.time() + LIVENESS_S
    hides_hung = any(worker.is_hung for worker in house.live_workers)
    rng = random.Random(plan.seed)
    for number in range(1000, 1003):
        ends = ["overloaded"]
        while house.loop.time() < end_s:
            prompt = rng.choices(VOCABULARY, k=40)
            proof = Request(number, prompt, SamplingParams(max_tokens=4), house.loop.time())
            house.send(proof)
            await _ended(house, [proof], end_s)
            ends = proof.ends
            if ends != ["overloaded"] and not (
                hides_hung and ends in (["no_worker"], ["decode_worker_lost"], ["quarantined"])
            ):
                break
        if ends != ["answered"]:
            house.violate(f"request {number} came after the faults and was not answered: {ends}")
    # A lost word from a prefill worker costs a hand-off's timeout, and who waits for the slot behind it waits as long.
    in_time_s = FAULTS_S[1] + LIVENESS_S + 2 * plan.shape.handoff_timeout_s
    await _ended(house, plan.requests, max(in_time_s, house.loop.time()))
    for killed in house.poisoned.values():
        if killed > _poisoned_max(house, plan):
            house.violate(f"{killed} workers died of one prompt")
    for request in plan.requests:
        if not request.ends or request.ended_s > in_time_s:
            house.violate(f"request {request.number} has not ended by {in_time_s} s")
        elif request.timeout_s and request.ends == ["timeout"]:
            if request.ended_s < request.arrival_s + request.timeout_s:
                house.violate(f"request {request.number} was given up before its deadline")
        elif request.timeout_s and request.ends == ["deadline"]:
            pass  # Too much waits before it.
        elif not HOW_REQUESTS_END.issuperset(request.ends):
            house.violate(f"request {request.number} ended in a way that nobody should see: {request.ends}")


def _poisoned_max(house: House, plan: Plan) -> int:
    """Workers that one prompt may kill: one an attempt, when each death is noticed and judged before the queue tries again.

    It is not where the queue waits no longer than the silence that means death, nor where the router has died itself: then an
    attempt may cost a decode worker, and a prefill worker for each delivery of its job.
    """
    is_judged = plan.shape.ack_wait_s > DEAD_S and all(router.is_alive for router in house.routers)
    return POISONED_MAX if is_judged else POISONED_MAX * (1 + plan.shape.max_deliver)


async def _ended(house: House, requests: list[Request], until_s: float) -> None:
    while house.loop.time() < until_s and not all(request.ends for request in requests):  # noqa: ASYNC110  # Virtual time.
        await asyncio.sleep(0.25)


async def _settle(house: House) -> None:
    end_s = house.loop.time() + SETTLE_S
    while (leaks := house.leaks()) and house.loop.time() < end_s:  # noqa: ASYNC110  # Virtual time.
        await asyncio.sleep(0.5)
    for leak in leaks:
        house.violate(leak)


def run_seed(seed: int, plan: Plan | None = None) -> Outcome:
    """One run."""
    plan = plan or draw(seed)
    logs: list[EventLog] = []

    async def main(loop: VirtualLoop) -> House:
        logs.append(EventLog(loop.time))
        return await play(loop, plan, logs[0])

    try:
        house = run(main)
    except Deadlock as error:
        return Outcome(seed, [str(error)], logs[0].lines)
    ends: dict[str, int] = {}
    for request in plan.requests:
        for how in request.ends:
            ends[how] = ends.get(how, 0) + 1
    return Outcome(seed, house.violations, logs[0].lines, ends, house.loop.time())
