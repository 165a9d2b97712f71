"""What `hocket policy show` prints: the figures of all routers added up, a row for each policy. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

from ..router.control_messages import ArmStatus, Distribution, PolicyDocument, PolicyStatus, ShadowStatus
from .tables import Row, table

Status = TypeVar("Status", ArmStatus, ShadowStatus)


def policy_lines(pool: str, document: PolicyDocument | None, routers: Sequence[PolicyStatus]) -> list[str]:
    """The whole report."""
    lines = [_head(pool, document, routers)]
    lines += _problems(document, routers)
    if not routers:
        return lines
    version = max(status.version for status in routers)
    arms, shadows = added_up(routers, version)
    lines += ["", *table(_ARM_HEAD, [_arm_row(arm) for arm in arms])]
    if shadows:
        lines += ["", *table(_SHADOW_HEAD, [_shadow_row(shadow) for shadow in shadows])]
    for arm in arms:
        if arm.replaced:
            lines.append(f"! {arm.arm} {arm.policy}: {_INSTEAD[arm.arm]}: it {arm.replaced}")
        elif arm.last_error:
            lines.append(f"! {arm.arm} {arm.policy} failed {arm.raised} times, last {arm.last_error}")
    lines += [
        f"! shadow {shadow.policy} is not asked any more: it {shadow.stopped}" for shadow in shadows if shadow.stopped
    ]
    return lines


def policy_json(pool: str, document: PolicyDocument | None, routers: Sequence[PolicyStatus]) -> dict[str, object]:
    """The same for programs; a distribution as count, mean, p50, p99."""
    version = max((status.version for status in routers), default=0)
    arms, shadows = added_up(routers, version)
    return {
        "pool": pool,
        "document": msgspec.to_builtins(document),
        "version": version,
        "arms": [_plain(arm) for arm in arms],
        "shadows": [_plain(shadow) for shadow in shadows],
        "routers": [
            {
                "router_id": status.router_id,
                "version": status.version,
                "since_s": status.since_s,
                "problem": status.problem,
                "sources": status.sources,
                "replaced": {arm.arm: arm.replaced for arm in status.arms if arm.replaced},
            }
            for status in routers
        ],
    }


def added_up(routers: Iterable[PolicyStatus], version: int) -> tuple[list[ArmStatus], list[ShadowStatus]]:
    """The policies of `version`, each with the figures of all routers in which it decides.

    Routers that were started with different policies have rows of their own.
    """
    alike: dict[bytes, list[PolicyStatus]] = {}
    for status in routers:
        if status.version == version:
            alike.setdefault(msgspec.json.encode(status.config), []).append(status)
    arms, shadows = [], []
    for statuses in alike.values():
        arms += [_sum(same) for same in zip(*(status.arms for status in statuses), strict=True)]
        shadows += [_sum(same) for same in zip(*(status.shadows for status in statuses), strict=True)]
    return arms, shadows


def _sum(parts: Sequence[Status]) -> Status:
    total = msgspec.convert(msgspec.to_builtins(parts[0]), type(parts[0]))
    for part in parts[1:]:
        for name in part.__struct_fields__:
            value, held = getattr(part, name), getattr(total, name)
            if isinstance(held, Distribution):
                held.merge(value)
            else:
                setattr(total, name, held or value if isinstance(held, str) else held + value)
    return total


def _plain(status: ArmStatus | ShadowStatus) -> dict[str, object]:
    values = {name: getattr(status, name) for name in status.__struct_fields__}
    return {name: _points(value) if isinstance(value, Distribution) else value for name, value in values.items()}


def _points(values: Distribution) -> dict[str, float | int | None]:
    return {"count": values.count, "mean": values.mean, "p50": values.quantile(0.5), "p99": values.quantile(0.99)}


# ---- lines

_INSTEAD = {"primary": "least loaded decides in its place", "canary": "the primary decides in its place"}


def _head(pool: str, document: PolicyDocument | None, routers: Sequence[PolicyStatus]) -> str:
    count = f"{len(routers)} router{'' if len(routers) == 1 else 's'}"
    if document is None:
        return f"pool {pool}, {count}, nothing stored: each router decides by its own --policy"
    when = datetime.datetime.fromtimestamp(document.set_unix_s).astimezone().isoformat(" ", "seconds")
    config = document.config
    budget = f"budget {config.pick_budget_ms:g} ms a pick, {config.failures_max} failures in {config.window_s:g} s"
    back = f"{len(document.history)} to roll back to"
    return f"pool {pool}, {count}, version {document.version} set {when}, {budget}, {back}"


def _problems(document: PolicyDocument | None, routers: Sequence[PolicyStatus]) -> list[str]:
    stored = document.version if document else 0
    lines = [
        f"! {status.router_id} decides by version {status.version}: {status.problem or 'it has not read the newest yet'}"
        for status in routers
        if status.version != stored
    ]
    for name in sorted({name for status in routers for name in status.sources}):
        if len({status.sources.get(name) for status in routers}) > 1:
            lines.append(f"! {name} is not the same file for every router")
    return lines


_ARM_HEAD = (
    *("arm", "policy", "picks", "ended", "errors", "TTFT mean", "p50", "p99", "predicted off by"),
    *("ITL p50", "p99", "cached", "raised", "slow", "pick p50", "p99"),
)
_SHADOW_HEAD = (
    *(
        "shadow",
        "asked",
        "same worker",
        "and plan",
        "TTFT expected",
        "predicted off by",
        "excess cost of what was done",
    ),
    *("raised", "slow", "pick p50", "p99"),
)


def _arm_row(arm: ArmStatus) -> Row:
    return (
        arm.arm, arm.policy, str(arm.picks), str(arm.requests), str(arm.errors),
        _ms(arm.ttft_s.mean), _ms(arm.ttft_s.quantile(0.5)), _ms(arm.ttft_s.quantile(0.99)),
        _percent(arm.prediction_error.quantile(0.5)), _ms(arm.itl_s.quantile(0.5)), _ms(arm.itl_s.quantile(0.99)),
        _share(arm.cached_tokens, arm.cached_of_tokens), str(arm.raised), str(arm.overruns),
        _us(arm.pick_s.quantile(0.5)), _us(arm.pick_s.quantile(0.99)),
    )  # fmt: skip


def _shadow_row(shadow: ShadowStatus) -> Row:
    gain_s = _per(shadow.ttft_gain_s, shadow.ttft_pairs)
    excess = _per(shadow.cost_excess, shadow.cost_pairs)
    return (
        shadow.policy, f"{shadow.scored} of {shadow.seen}",
        _share(shadow.same_worker, shadow.scored), _share(shadow.same_plan, shadow.scored),
        "-" if gain_s is None else f"{-gain_s * 1000:+.1f} ms", _percent(shadow.prediction_error.quantile(0.5)),
        "-" if excess is None else f"{excess:.3g}", str(shadow.raised), str(shadow.overruns),
        _us(shadow.pick_s.quantile(0.5)), _us(shadow.pick_s.quantile(0.99)),
    )  # fmt: skip


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f} ms"


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.0f} us"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _share(part: int, whole: int) -> str:
    return _percent(_per(part, whole))


def _per(total: float, count: int) -> float | None:
    return total / count if count else None
