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
from .scenario import MODEL, ResolvedEngine

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


def make_worker(
    name: str, role: str, resolved: ResolvedEngine, listener: Listener, *, block_tokens: int, steps_max: int,
    heartbeat_s: float, link_bytes_per_s: float, slots: int,
) -> SimWorker:  # fmt: skip
    """A worker of the pool; `slots` are those of its card."""
    engine = EngineModel(
        resolved.timing,
        listener,
        kv_blocks=resolved.kv_blocks,
        block_tokens=block_tokens,
        slots=resolved.slots,
        max_batched_tokens=resolved.max_batched_tokens,
        steps_max=steps_max,
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
    return SimWorker(card, engine, heartbeat_s, link_bytes_per_s, held_max=slots + max(1, slots // QUEUE_SHARE))
