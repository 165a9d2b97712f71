"""Simulated workers as the router sees them: a card, admission, heartbeats and KV events around an `EngineModel`.

What a worker says and when is what `workers.presence` and `workers.decode` say: a heartbeat every 0.5 s and at most 50 ms
after a change, an event message after each step that changed the prefix cache, a refusal when a quarter more than the slots
is held.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..bus.ids import WorkerId
from ..bus.messages import Heartbeat, KvEvents, WorkerCard
from ..workers.decode import QUEUE_SHARE
from ..workers.presence import CHANGE_GAP_S
from ..workers.throughput import Throughput
from .engine_model import EngineModel, Listener
from .scenario import MODEL, ResolvedEngine, Scenario

EPOCH = 1


@dataclass(slots=True, eq=False)
class SimWorker:
    """One worker."""

    card: WorkerCard
    engine: EngineModel
    heartbeat_s: float
    link_bytes_per_s: float
    held_max: int
    held: int = 0  # requests admitted and not ended
    version: int = 0  # of the engine's next event
    beat_s: float = 0.0  # when the next heartbeat is due
    last_beat_s: float = -1.0
    kv_seq: int = 0
    link_free_s: float = 0.0  # when its link, in or out, has sent what it was given
    link_bytes: int = 0
    usage_s: float = 0.0  # integral of the share of KV blocks in use
    usage_at_s: float = 0.0
    throughput: Throughput = field(default_factory=Throughput)

    @property
    def worker_id(self) -> WorkerId:
        return self.card.worker_id

    @property
    def is_prefill(self) -> bool:
        return self.card.role == "prefill"

    def heartbeat(self, now: float) -> Heartbeat:
        """What `workers.presence` would say now."""
        engine = self.engine
        free = engine.pool.free_blocks
        self.usage_s += (now - self.usage_at_s) * (1 - free / engine.kv_blocks)
        self.usage_at_s = now
        running = engine.running + len(engine.expecting)
        waiting = len(engine.waiting)
        speed = self.throughput.tokens_per_s
        return Heartbeat(
            self.card.worker_id, EPOCH, self.card.role, running, waiting, free, self.kv_seq, prefill_tokens_per_s=speed
        )

    def take_kv_events(self) -> KvEvents | None:
        """The next message of its prefix cache, if anything changed."""
        events = self.engine.take_events()
        if not events:
            return None
        self.kv_seq += 1
        return KvEvents(self.card.worker_id, EPOCH, self.kv_seq, events)

    def beat_due(self, now: float) -> float:
        """Something changed: when the heartbeat that says so is due."""
        return min(self.beat_s, max(now, self.last_beat_s + CHANGE_GAP_S))


def make_pool(scenario: Scenario, listener: Listener) -> list[SimWorker]:
    """All workers, those that decode first. Raises timing.ProfileError."""
    prefill_engine = scenario.prefill_engine or scenario.engine
    prefill = prefill_engine.resolved() if scenario.prefill else None
    decode = scenario.engine.resolved()
    workers = [
        _make_worker(scenario, "decode", n, decode, listener, slots=decode.slots) for n in range(scenario.decode)
    ]
    if prefill is not None:
        slots = scenario.prefill_slots
        workers += [
            _make_worker(scenario, "prefill", n, prefill, listener, slots=slots) for n in range(scenario.prefill)
        ]
    return workers


def _make_worker(
    scenario: Scenario, role: str, number: int, resolved: ResolvedEngine, listener: Listener, *, slots: int
) -> SimWorker:
    """`slots` are those of its card: what it pulls or admits at once."""
    block_tokens, name = scenario.engine.block_tokens, f"{role}-{number:04d}"
    engine = EngineModel(
        resolved.timing,
        listener,
        kv_blocks=resolved.kv_blocks,
        block_tokens=block_tokens,
        slots=resolved.slots,
        max_batched_tokens=resolved.max_batched_tokens,
        steps_max=scenario.engine.steps_max,
    )
    card = WorkerCard(
        worker_id=WorkerId(name),
        role=role,
        epoch=EPOCH,
        model=MODEL,
        fingerprint="lab",
        block_tokens=block_tokens,
        kv_blocks=resolved.kv_blocks,
        slots=slots,
        max_model_len=resolved.kv_blocks * block_tokens,
        handoff_addresses=("lab://" + name,) if role == "decode" else (),
        engine="lab",
    )
    link_bytes_per_s = scenario.link_gb_per_s * 1e9 * resolved.gpus
    held_max = slots + max(1, slots // QUEUE_SHARE)
    return SimWorker(card, engine, scenario.heartbeat_s, link_bytes_per_s, held_max)


def copy_kv(
    sender: SimWorker, receiver: SimWorker, kv_bytes: int, *, computed: tuple[float, float], layers: int
) -> float:
    """Give both links what a step computed between two times; when the last byte arrives.

    Layer by layer the copy may begin when the first layer is done, and cannot end before the last layer's share has gone
    after the step. A link sends or receives one thing after the other.
    """
    start_s, end_s = computed
    out_s, in_s = kv_bytes / sender.link_bytes_per_s, kv_bytes / receiver.link_bytes_per_s
    copy_s = max(out_s, in_s)
    begin_s = max(start_s + (end_s - start_s) / layers, sender.link_free_s, receiver.link_free_s)
    # The wider link of the two is free again for others before the copy is over.
    sender.link_free_s, receiver.link_free_s = begin_s + out_s, begin_s + in_s
    sender.link_bytes += kv_bytes
    receiver.link_bytes += kv_bytes
    return max(begin_s + copy_s, end_s + copy_s / layers)
