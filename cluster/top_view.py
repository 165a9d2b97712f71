"""What `hocket top` shows: a pool's routers, lanes and workers from what they said last, as records and as lines. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..bus.ids import RouterId, WorkerId
from ..bus.messages import Goodbye, Heartbeat, WorkerCard
from ..router.control_messages import PolicyStatus, RouterLoad, WorkerLoad
from .tables import table

SILENT_S = 1.5  # as a router's suspect_s: such a worker gets no new work
GONE_S = 30.0  # a worker that nobody has heard for so long is no longer shown
_TRUST = ("exact", "catching_up", "approximate")  # best first


class RouterRow(msgspec.Struct, frozen=True):
    """One router. Fields that it did not tell are None."""

    router_id: RouterId
    in_flight: int | None
    waiting_jobs: int | None  # of its prompts, that no prefill worker has claimed
    waiting_tokens: int | None
    version: int | None  # of the policy document that decides; 0: what it was started with
    policy: str | None
    canary: str = ""
    canary_share: float = 0.0
    shadows: tuple[str, ...] = ()
    hit_rate: float | None = None  # of prompt tokens, as engines reported it, under this version
    problem: str = ""  # why it does not use a newer version, or what it had to replace


class LaneRow(msgspec.Struct, frozen=True):
    """Prompts that wait in one lane of the prefill queue, of all routers."""

    lane: str  # the prefill worker they are meant for; "": any
    jobs: int
    tokens: int
    overdue: int  # waited long enough for their worker: any may take them


class WorkerRow(msgspec.Struct, frozen=True):
    """One worker. None: not known."""

    worker_id: WorkerId
    role: str
    state: str  # "ready" | "draining" | "silent" | "left"
    heard_s: float  # since its last sign of life
    running: int | None
    waiting: int | None
    slots: int | None
    streams: int  # of all routers, in flight there
    kv_blocks: int | None
    kv_blocks_used: int | None
    index: str | None  # the least trusting router's mode
    index_by_router: dict[RouterId, str]
    drift: float | None  # the worst router's
    hit_rate: float | None  # of the prompt tokens it was sent
    prefill_tokens_per_s: float | None
    kv_gb_per_s: float | None  # sent by a prefill worker since the router was asked before
    model: str


class PoolView(msgspec.Struct, frozen=True):
    """Everything at one moment."""

    pool: str
    routers: list[RouterRow]
    lanes: list[LaneRow]
    workers: list[WorkerRow]


@dataclass(slots=True)
class _Worker:
    heartbeat: Heartbeat
    heard_s: float
    has_left: bool = False


@dataclass(slots=True)
class _Told:
    """What the routers answered to one question, and when."""

    loads: dict[RouterId, RouterLoad] = field(default_factory=dict)
    at_s: float = 0.0


class PoolState:
    """Fed with what is heard; `view` says what it comes to."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._workers: dict[WorkerId, _Worker] = {}
        self._cards: dict[WorkerId, WorkerCard] = {}
        self._policies: dict[RouterId, PolicyStatus] = {}
        self._told, self._before = _Told(), _Told()

    def heard(self, message: Heartbeat | Goodbye, now: float) -> None:
        """A worker spoke."""
        known = self._workers.get(message.worker_id)
        if isinstance(message, Heartbeat):
            self._workers[message.worker_id] = _Worker(message, now)
        elif known is not None and known.heartbeat.epoch == message.epoch:
            known.has_left = True

    def routers_told(self, loads: Sequence[RouterLoad], policies: Sequence[PolicyStatus], now: float) -> None:
        """Every router that answered this time."""
        self._before, self._told = self._told, _Told({load.router_id: load for load in loads}, now)
        self._policies = {status.router_id: status for status in policies}

    def card(self, card: WorkerCard) -> None:
        """What a worker's card says."""
        self._cards[card.worker_id] = card

    def without_card(self) -> list[WorkerId]:
        """Workers whose card, or that of this incarnation, is not known yet."""
        heard = {worker: known.heartbeat.epoch for worker, known in self._workers.items() if not known.has_left}
        unknown = [worker for load in self._told.loads.values() for worker in load.workers if worker not in heard]
        stale = [w for w, epoch in heard.items() if w not in self._cards or self._cards[w].epoch != epoch]
        return sorted({*stale, *(worker for worker in unknown if worker not in self._cards)})

    def view(self, now: float) -> PoolView:
        """As of now."""
        routers = sorted({*self._told.loads, *self._policies})
        known_to_routers = {worker for load in self._told.loads.values() for worker in load.workers}
        workers = [self._worker_row(worker, now) for worker in sorted({*self._workers, *known_to_routers})]
        shown = [row for row in workers if row.heard_s < GONE_S]
        shown.sort(key=lambda row: (row.role == "decode", row.worker_id))
        return PoolView(self._pool, [self._router_row(router) for router in routers], self._lanes(), shown)

    def _router_row(self, router: RouterId) -> RouterRow:
        load, status = self._told.loads.get(router), self._policies.get(router)
        lanes = load.lanes.values() if load is not None else ()
        row = RouterRow(
            router,
            load.in_flight if load else None,
            sum(lane.jobs for lane in lanes) if load else None,
            sum(lane.tokens for lane in lanes) if load else None,
            status.version if status else None,
            status.config.primary if status else None,
        )
        if status is None:
            return row
        canary = status.config.canary
        replaced = [f"{arm.policy} is replaced: it {arm.replaced}" for arm in status.arms if arm.replaced]
        return msgspec.structs.replace(
            row,
            canary=canary.policy if canary else "",
            canary_share=canary.share if canary else 0.0,
            shadows=status.config.shadows,
            hit_rate=_share(
                sum(arm.cached_tokens for arm in status.arms), sum(arm.cached_of_tokens for arm in status.arms)
            ),
            problem="; ".join(filter(None, [status.problem, *replaced])),
        )

    def _lanes(self) -> list[LaneRow]:
        sums: dict[WorkerId, list[int]] = {}
        for load in self._told.loads.values():
            for lane, of in load.lanes.items():
                held = sums.setdefault(lane, [0, 0, 0])
                sums[lane] = [held[0] + of.jobs, held[1] + of.tokens, held[2] + of.overdue]
        return [LaneRow(lane, *sums[lane]) for lane in sorted(sums)]

    def _worker_row(self, worker: WorkerId, now: float) -> WorkerRow:
        known, card = self._workers.get(worker), self._cards.get(worker)
        loads = {r: load.workers[worker] for r, load in self._told.loads.items() if worker in load.workers}
        heartbeat = known.heartbeat if known else None
        asked_s = now - self._told.at_s
        ages = [now - known.heard_s] if known else [load.heard_s + asked_s for load in loads.values()]
        heard_s = max(0.0, min(ages))
        drifts = [load.drift for load in loads.values() if load.drift is not None]
        is_full = heartbeat is not None and card is not None
        return WorkerRow(
            worker_id=worker,
            role=heartbeat.role if heartbeat else next(load.role for load in loads.values()),
            state=_state(known, heard_s),
            heard_s=heard_s,
            running=heartbeat.running if heartbeat else None,
            waiting=heartbeat.waiting if heartbeat else None,
            slots=card.slots if card else None,
            streams=sum(load.streams for load in loads.values()),
            kv_blocks=card.kv_blocks if card else None,
            kv_blocks_used=card.kv_blocks - heartbeat.kv_blocks_free if is_full and card and heartbeat else None,
            index=max((load.index for load in loads.values()), key=_TRUST.index, default=None),
            index_by_router={router: load.index for router, load in loads.items()},
            drift=max(drifts, default=None),
            hit_rate=_share(
                sum(load.cached_tokens for load in loads.values()), sum(load.prompt_tokens for load in loads.values())
            ),
            prefill_tokens_per_s=heartbeat.prefill_tokens_per_s or None if heartbeat else None,
            kv_gb_per_s=self._gb_per_s(worker, loads),
            model=card.model if card else "",
        )

    def _gb_per_s(self, worker: WorkerId, loads: dict[RouterId, WorkerLoad]) -> float | None:
        """What prefill workers have sent between the last two answers of the same routers."""
        before = self._before.loads
        both = [router for router, load in loads.items() if router in before and load.role == "prefill"]
        passed_s = self._told.at_s - self._before.at_s
        if not both or passed_s <= 0:
            return None
        pairs = [(before[router].workers.get(worker), loads[router]) for router in both]
        sent = sum(now.kv_bytes - (old.kv_bytes if old else 0) for old, now in pairs)
        return max(0, sent) / passed_s / 1e9


def _state(known: _Worker | None, heard_s: float) -> str:
    if known is not None and known.has_left:
        return "left"
    if heard_s >= SILENT_S:
        return "silent"
    return "draining" if known is not None and known.heartbeat.is_draining else "ready"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


# ---- lines

_ROUTER_HEAD = ("router", "in flight", "waiting", "tokens", "version", "policy", "canary", "shadows", "hit")
_LANE_HEAD = ("lane", "jobs", "tokens", "overdue")
_WORKER_HEAD = (
    *("worker", "role", "state", "heard", "run", "wait", "slots", "streams", "blocks used"),
    *("index", "drift", "hit", "prefill tok/s", "KV GB/s"),
)


def top_lines(view: PoolView) -> list[str]:
    """The screen."""
    in_flight = sum(row.in_flight or 0 for row in view.routers)
    ready = sum(row.state == "ready" for row in view.workers)
    lines = [
        f"pool {view.pool}: {_count(len(view.routers), 'router')}, {in_flight} in flight, "
        f"{ready} of {_count(len(view.workers), 'worker')} ready"
    ]
    if view.routers:
        lines += ["", *table(_ROUTER_HEAD, [_router_cells(row) for row in view.routers])]
    if view.lanes:
        lanes = [(row.lane or "any worker", str(row.jobs), str(row.tokens), str(row.overdue)) for row in view.lanes]
        lines += ["", *table(_LANE_HEAD, lanes)]
    if view.workers:
        lines += ["", *table(_WORKER_HEAD, [_worker_cells(row) for row in view.workers])]
    return [*lines, *(f"! {row.router_id}: {row.problem}" for row in view.routers if row.problem)]


def _router_cells(row: RouterRow) -> Sequence[str]:
    canary = f"{row.canary} {row.canary_share:.0%}" if row.canary else "-"
    return (
        row.router_id, _whole(row.in_flight), _whole(row.waiting_jobs), _whole(row.waiting_tokens), _whole(row.version),
        row.policy or "-", canary, ", ".join(row.shadows) or "-", _percent(row.hit_rate),
    )  # fmt: skip


def _worker_cells(row: WorkerRow) -> Sequence[str]:
    blocks = "-" if row.kv_blocks_used is None else f"{row.kv_blocks_used}/{row.kv_blocks}"
    modes = set(row.index_by_router.values())
    index = row.index or "-"
    if len(modes) > 1:  # Not every router sees it like that.
        index += f" {sum(mode == index for mode in row.index_by_router.values())}/{len(row.index_by_router)}"
    return (
        row.worker_id, row.role, row.state, f"{row.heard_s:.1f} s", _whole(row.running), _whole(row.waiting), _whole(row.slots),
        str(row.streams), blocks, index, _percent(row.drift), _percent(row.hit_rate), _whole(row.prefill_tokens_per_s),
        "-" if row.kv_gb_per_s is None else f"{row.kv_gb_per_s:.2f}",
    )  # fmt: skip


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
