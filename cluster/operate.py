"""Runs an operator's command on a pool: `hocket policy ...` and `hocket explain`. Exit 0: done; 1: not."""

from __future__ import annotations

import json

import msgspec

from ..bus.base import BusError
from ..router.control_messages import AskPolicies, PolicyStatus
from .ask_routers import ask_all, pool_bus
from .config import PoolConfig, server_here
from .explain import absence, find_receipt, receipt_lines
from .policy import Changed, Edit, PolicyRefused, change, rollback, stored_document
from .policy_report import policy_json, policy_lines


class OperateError(Exception):
    """Nothing was done; the text says why and what would help."""


async def show_policies(config: PoolConfig, *, as_json: bool) -> int:
    """Print which policies decide and how they do. Raises OperateError."""
    try:
        async with pool_bus(config.nats or server_here(config.pool)) as bus:
            routers = await ask_all(bus, config.pool, AskPolicies(), PolicyStatus)
            document, _ = await stored_document(bus, config.pool)
    except (BusError, PolicyRefused) as error:
        raise OperateError(str(error)) from error
    if as_json:
        print(json.dumps(policy_json(config.pool, document, routers), indent=2))
    else:
        print("\n".join(policy_lines(config.pool, document, routers)))
    return 0


async def change_policies(config: PoolConfig, edit: Edit | None) -> int:
    """Switch every router to what `edit` makes of the configuration; without one, back to the last good one."""
    try:
        async with pool_bus(config.nats or server_here(config.pool)) as bus:
            changed = await (rollback(bus, config.pool) if edit is None else change(bus, config.pool, edit))
    except (BusError, PolicyRefused) as error:
        raise OperateError(str(error)) from error
    print("\n".join(_change_lines(changed)))
    return 0 if changed.is_everywhere else 1


async def explain(config: PoolConfig, request_id: str, *, as_json: bool) -> int:
    """Print a request's receipt. Raises OperateError."""
    try:
        async with pool_bus(config.nats or server_here(config.pool)) as bus:
            receipt, answers = await find_receipt(bus, config.pool, request_id)
    except BusError as error:
        raise OperateError(str(error)) from error
    if receipt is None:
        raise OperateError(absence(request_id, config.pool, answers))
    print(json.dumps(msgspec.to_builtins(receipt), indent=2) if as_json else "\n".join(receipt_lines(receipt)))
    return 0


def _change_lines(changed: Changed) -> list[str]:
    version, config = changed.document.version, changed.document.config
    lines = [f"version {version}: {config.primary} decides"]
    if config.canary is not None:
        lines.append(f"  for {config.canary.share:.1%} of the sessions {config.canary.policy} instead")
    lines += [f"  {name} is asked and not obeyed" for name in config.shadows]
    routers = len(changed.statuses) + changed.silent
    if not routers:
        return [*lines, "no router answered; those that start later begin with it"]
    there = sum(status.version == version for status in changed.statuses)
    lines.append(f"on {there} of {routers} routers after {changed.took_s * 1000:.0f} ms")
    lines += [
        f"! {status.router_id} decides by version {status.version}: {status.problem or 'it has not read the newest yet'}"
        for status in changed.statuses
        if status.version != version
    ]
    return lines
