"""Which requests a router lets in: limits in prompt tokens and KV blocks, by tenant and for the cluster. Pure.

Two things are counted for each request. Its prompt tokens, while they wait for prefill; its KV blocks (prompt and the most
it may generate), until it has ended. What the other routers hold is counted as they last said, so between their messages
the sum of all routers may go over a limit; a worker admits or refuses by what it really has.

When the cluster's limit is reached, tenants are served by weight. The guaranteed share of a tenant is its part of the limit
among those that hold or want something. Who was refused is owed the rest of its share until it has got what it asked for:
tenants over theirs are let in only as far as that stays free. Who waits longest and wants more than its share in one piece
is owed all of it, by everybody. So a tenant may use all of an idle cluster, gives it back as fast as its
requests end, and nobody waits for ever.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

Meta = msgspec.Meta

RETRY_MIN_S = 1.0
RETRY_MAX_S = 60.0
RETRY_UNKNOWN_S = 2.0  # nothing has ended yet
OWED_S = 5.0  # a refused tenant is owed its share for so long after Retry-After; who comes back later starts over
OWED_MAX = 256  # tenants, the newest; names cost nothing
HALF_LIFE_S = 10.0  # of the measured drain rate

Reason = Literal["tenant_limit", "overloaded", "too_large", "deadline"]
Pair = tuple[int, int]
"""Prompt tokens that wait for prefill, and KV blocks."""


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may hold; 0: no limit of its own."""

    weight: Annotated[float, Meta(gt=0)] = 1.0
    waiting_tokens_max: Annotated[int, Meta(ge=0)] = 0
    kv_blocks_max: Annotated[int, Meta(ge=0)] = 0


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cluster takes in; 0: no limit."""

    waiting_tokens_max: Annotated[int, Meta(ge=0)] = 0
    kv_blocks_max: Annotated[int, Meta(ge=0)] = 0
    wait_max_s: Annotated[float, Meta(ge=0)] = 0.0  # for the start of the prefill, as predicted
    each_tenant: TenantLimits = TenantLimits()  # of those that are not named
    tenants: dict[str, TenantLimits] = {}

    def of(self, tenant: str) -> TenantLimits:
        """The limits of this tenant."""
        return self.tenants.get(tenant, self.each_tenant)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not now (or, `too_large`, never)."""

    reason: Reason
    detail: str
    retry_after_s: float


class DrainRate:
    """How fast something ends, per second, with a memory of some seconds."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._since_s: float | None = None
        self._at_s = 0.0

    def add(self, amount: float, now: float) -> None:
        """So much has ended."""
        if self._since_s is None:
            self._since_s = self._at_s = now
        self._sum = self._faded(now) + amount
        self._at_s = now

    def per_s(self, now: float) -> float:
        """0.0 while nothing is known."""
        if self._since_s is None:
            return 0.0
        # The integral of the fading over the time that was observed, at least a second.
        seen_s = HALF_LIFE_S / math.log(2) * (1 - math.pow(0.5, max(now - self._since_s, 1.0) / HALF_LIFE_S))
        return self._faded(now) / seen_s

    def _faded(self, now: float) -> float:
        return self._sum * math.pow(0.5, (now - self._at_s) / HALF_LIFE_S)


@dataclass(slots=True)
class _Owed:
    need: Pair  # of the last request
    refused: Pair  # of all since the tenant was refused first, less what was let in since
    since_s: float
    until_s: float


@dataclass(slots=True)
class _Held:
    tenant: str
    tokens: int
    blocks: int


@dataclass(slots=True)
class Admission:
    """What is in flight, and whether one more fits. `limits`, `others` and `prefill_tokens_per_s` may change at any time."""

    limits: AdmissionLimits = AdmissionLimits()
    others: Mapping[str, Pair] = field(default_factory=dict)  # by tenant, of the other routers
    prefill_tokens_per_s: float = 0.0  # of all prefill workers together; 0.0: not known
    _held: dict[int, _Held] = field(default_factory=dict)
    _own: dict[str, list[int]] = field(default_factory=dict)
    _owed: dict[str, _Owed] = field(default_factory=dict)
    _rates: tuple[DrainRate, DrainRate] = field(default_factory=lambda: (DrainRate(), DrainRate()))

    def tenants(self) -> dict[str, Pair]:
        """What each tenant holds through this router."""
        return {tenant: (held[0], held[1]) for tenant, held in self._own.items()}

    def held(self, tenant: str) -> Pair:
        """What it holds through all routers."""
        own, others = self._own.get(tenant, (0, 0)), self.others.get(tenant, (0, 0))
        return own[0] + others[0], own[1] + others[1]

    def total(self) -> Pair:
        """What all tenants hold through all routers."""
        pairs = (*self._own.values(), *self.others.values())
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)

    def offer(self, key: int, tenant: str, need: Pair, deadline_s: float, now: float) -> Refusal | None:
        """None: it is in, until `release(key)`. A key that is in already stays as it is."""
        if key in self._held:
            return None
        refusal = self._refusal(tenant, need, deadline_s, now)
        if refusal is None:
            self._pay(tenant, need, now)
            self._held[key] = _Held(tenant, *need)
            own = self._own.setdefault(tenant, [0, 0])
            own[0], own[1] = own[0] + need[0], own[1] + need[1]
        return refusal

    def waits(self, key: int, tokens: int, now: float) -> None:
        """No more of its prompt than this is to be computed: 0 once it is, or what its worker's cache does not hold."""
        held = self._held.get(key)
        if held is not None and tokens < held.tokens:
            if tokens:  # A cache hit: nothing was computed.
                self._drop(held, held.tokens - tokens, 0)
            else:
                self._give(held, held.tokens, 0, now)

    def release(self, key: int, now: float) -> bool:
        """It has ended; False when that was known."""
        held = self._held.pop(key, None)
        if held is None:
            return False
        self._give(held, held.tokens, held.blocks, now)
        return True

    def _give(self, held: _Held, tokens: int, blocks: int, now: float) -> None:
        self._drop(held, tokens, blocks)
        for rate, amount in zip(self._rates, (tokens, blocks), strict=True):
            if amount:
                rate.add(amount, now)

    def _drop(self, held: _Held, tokens: int, blocks: int) -> None:
        held.tokens -= tokens
        held.blocks -= blocks
        own = self._own[held.tenant]
        own[0], own[1] = own[0] - tokens, own[1] - blocks
        if own == [0, 0]:
            del self._own[held.tenant]

    # ---- deciding

    def _refusal(self, tenant: str, need: Pair, deadline_s: float, now: float) -> Refusal | None:
        limits, mine = self.limits, self.limits.of(tenant)
        total, held = self.total(), self.held(tenant)
        self._forget_owed(now)
        for place, (what, limit, own_limit) in enumerate(
            (
                ("waiting prompt tokens", limits.waiting_tokens_max, mine.waiting_tokens_max),
                ("KV blocks", limits.kv_blocks_max, mine.kv_blocks_max),
            )
        ):
            if 0 < min(limit or need[place], own_limit or need[place]) < need[place]:
                return Refusal("too_large", f"{need[place]} {what} are over the limit", 0.0)
            if own_limit and held[place] + need[place] > own_limit:
                over = held[place] + need[place] - own_limit
                detail = f"the tenant holds {held[place]} of its {own_limit} {what}, this takes {need[place]}"
                return Refusal("tenant_limit", detail, self._retry_s(place, over, now))
            if limit and (over := total[place] + need[place] + self._owed_to_others(tenant, need, place) - limit) > 0:
                retry_s = self._retry_s(place, over, now)
                self._owe(tenant, need, now, retry_s)
                detail = f"{total[place]} of {limit} {what} are in flight, this takes {need[place]}"
                return Refusal("overloaded", detail, retry_s)
        return self._too_late(total[0], deadline_s, now)

    def _too_late(self, waiting_tokens: int, deadline_s: float, now: float) -> Refusal | None:
        if self.prefill_tokens_per_s <= 0:
            return None
        # Decode workers may compute prompts, too, and a hand-off that failed says little of speed: what was seen counts.
        wait_s = waiting_tokens / max(self.prefill_tokens_per_s, self._per_s(0, now))
        if now + wait_s >= deadline_s:
            over_s = now + wait_s - deadline_s
            detail = f"it would start in {wait_s:.1f} s, {over_s:.1f} s after its deadline"
            return Refusal("deadline", detail, _bounded(over_s))
        if 0 < self.limits.wait_max_s < wait_s:
            return Refusal("overloaded", f"it would start in {wait_s:.1f} s", _bounded(wait_s - self.limits.wait_max_s))
        return None

    def _retry_s(self, place: int, over: int, now: float) -> float:
        """Until so much has ended, at the rate of the last seconds; the other routers' part ends as fast as ours."""
        per_s = self._per_s(place, now)
        return _bounded(over / per_s) if per_s > 0 else RETRY_UNKNOWN_S

    def _per_s(self, place: int, now: float) -> float:
        """What has ended of it lately, through all routers; 0.0: not known."""
        own = sum(held[place] for held in self._own.values())
        return self._rates[place].per_s(now) * self.total()[place] / own if own else 0.0

    # ---- fair shares

    def _share(self, tenant: str, place: int) -> float:
        """The part of the limit that is guaranteed to it."""
        limit = (self.limits.waiting_tokens_max, self.limits.kv_blocks_max)[place]
        active = {tenant, *self._own, *self.others, *self._owed}
        return limit * self.limits.of(tenant).weight / sum(self.limits.of(one).weight for one in active)

    def _owed_to_others(self, tenant: str, need: Pair, place: int) -> int:
        """What must stay free besides `need`."""
        largest = self._oldest_large(place)
        if largest is not None:  # From everybody, or it would never fit.
            return 0 if largest == tenant else self._owed[largest].need[place]
        if self.held(tenant)[place] + need[place] <= self._share(tenant, place):
            return 0
        owed = 0
        for other, claim in self._owed.items():
            if other != tenant and claim.refused[place]:
                owed += max(0, math.ceil(self._share(other, place)) - self.held(other)[place])
        return owed

    def _oldest_large(self, place: int) -> str | None:
        """Who waits longest, if it holds nothing and wants more than its share in one piece."""
        claims = ((claim.since_s, tenant) for tenant, claim in self._owed.items() if claim.refused[place])
        oldest = min(claims, default=(0.0, None))[1]
        if oldest is None or self.held(oldest)[place] or self._owed[oldest].need[place] <= self._share(oldest, place):
            return None
        return oldest

    def _owe(self, tenant: str, need: Pair, now: float, retry_s: float) -> None:
        claim = self._owed.pop(tenant, None) or _Owed(need, (0, 0), now, now)
        refused = claim.refused[0] + need[0], claim.refused[1] + need[1]
        self._owed[tenant] = _Owed(need, refused, claim.since_s, now + retry_s + OWED_S)
        if len(self._owed) > OWED_MAX:
            del self._owed[min(self._owed, key=lambda one: self._owed[one].until_s)]

    def _pay(self, tenant: str, need: Pair, now: float) -> None:
        claim = self._owed.pop(tenant, None)
        if claim is not None:
            left = max(0, claim.refused[0] - need[0]), max(0, claim.refused[1] - need[1])
            if left != (0, 0):
                self._owed[tenant] = _Owed((0, 0), left, now, claim.until_s)

    def _forget_owed(self, now: float) -> None:
        for tenant in [tenant for tenant, claim in self._owed.items() if claim.until_s <= now]:
            del self._owed[tenant]


def _bounded(retry_s: float) -> float:
    return min(max(retry_s, RETRY_MIN_S), RETRY_MAX_S)
