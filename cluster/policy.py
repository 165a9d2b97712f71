"""`hocket policy`: shows and changes which policies decide, in every router of a pool at once.

A change is tried by every router before it is stored; the stored document is what a router starts with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..bus.base import Bus, SettingChanged
from ..router.control import LOAD_TIMEOUT_S, try_policy
from ..router.control_messages import (
    HISTORY_MAX,
    AskPolicies,
    Canary,
    PoliciesTried,
    PolicyConfig,
    PolicyDocument,
    PolicyStatus,
    TryPolicies,
)
from ..router.policies.base import PolicyError
from .ask_routers import ask_all

SWITCH_TIMEOUT_S = LOAD_TIMEOUT_S + 2.0

Edit = Callable[[PolicyConfig | None], PolicyConfig]


class PolicyRefused(Exception):
    """Nothing was changed; the text says why."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change came to."""

    document: PolicyDocument
    statuses: Sequence[PolicyStatus]  # of the routers, after it
    took_s: float  # from storing it to the last router's word
    silent: int  # routers that did not answer in time

    @property
    def is_everywhere(self) -> bool:
        """Every router that was heard before decides by it."""
        return not self.silent and all(status.version == self.document.version for status in self.statuses)


async def stored_document(bus: Bus, pool: str) -> tuple[PolicyDocument | None, int | None]:
    """The document and its revision. Raises PolicyRefused when it is none, BusError."""
    stored = await bus.settings.get(pool)
    if stored is None:
        return None, None
    try:
        return msgspec.json.decode(stored.value, type=PolicyDocument), stored.revision
    except msgspec.MsgspecError as error:
        raise PolicyRefused(f"the stored document of pool {pool!r} cannot be read: {error}") from error


async def change(bus: Bus, pool: str, edit: Edit) -> Changed:
    """Store what `edit` makes of the current configuration. Raises PolicyRefused, BusError."""
    before = await ask_all(bus, pool, AskPolicies(), PolicyStatus)
    document, revision = await stored_document(bus, pool)
    current = document.config if document else before[0].config if before else None
    config = edit(current)
    history = document.history if document else ()
    if current is not None and current != config and not _failed(before, document):
        history = (*history, current)[-HISTORY_MAX:]
    return await _store(bus, pool, config, history, before=before, document=document, revision=revision)


async def rollback(bus: Bus, pool: str) -> Changed:
    """Back to the last good configuration before the current one. Raises PolicyRefused, BusError."""
    before = await ask_all(bus, pool, AskPolicies(), PolicyStatus)
    document, revision = await stored_document(bus, pool)
    if document is None or not document.history:
        raise PolicyRefused(f"pool {pool!r} has no earlier policies to go back to")
    *history, config = document.history
    return await _store(bus, pool, config, tuple(history), before=before, document=document, revision=revision)


async def _store(
    bus: Bus,
    pool: str,
    config: PolicyConfig,
    history: tuple[PolicyConfig, ...],
    *,
    before: Sequence[PolicyStatus],
    document: PolicyDocument | None,
    revision: int | None,
) -> Changed:
    await _try(bus, pool, config, len(before))
    version = 1 + max([document.version if document else 0, *(status.version for status in before)])
    changed = PolicyDocument(version, config, time.time(), history)
    started_s = time.monotonic()
    try:
        await bus.settings.put(pool, msgspec.json.encode(changed), after=revision)
    except SettingChanged as error:
        raise PolicyRefused(f"{error} at the same time; look at it and try again") from error
    statuses: list[PolicyStatus] = []
    if before:
        question = AskPolicies(reads=True)
        statuses = await ask_all(bus, pool, question, PolicyStatus, count=len(before), timeout_s=SWITCH_TIMEOUT_S)
    return Changed(changed, statuses, time.monotonic() - started_s, len(before) - len(statuses))


async def _try(bus: Bus, pool: str, config: PolicyConfig, routers: int) -> None:
    """By every router, for it is there that the files must be; by ourselves when there is none. Raises PolicyRefused."""
    if not routers:
        try:
            for name in config.seats:
                await asyncio.to_thread(try_policy, name, config, None, 0.0)
        except PolicyError as error:
            raise PolicyRefused(f"{error} (no router answered; tried here)") from error
        return
    question = TryPolicies(config)
    tried = await ask_all(bus, pool, question, PoliciesTried, count=routers, timeout_s=SWITCH_TIMEOUT_S)
    problems = [f"{answer.router_id}: {answer.problem}" for answer in tried if answer.problem]
    if len(tried) < routers:
        problems.append(f"{routers - len(tried)} of {routers} routers did not try it in {SWITCH_TIMEOUT_S:g} s")
    if problems:
        raise PolicyRefused("\n  ".join(["refused, nothing was changed", *problems]))


def _failed(before: Sequence[PolicyStatus], document: PolicyDocument | None) -> bool:
    """Some router cannot use the current version, or had to replace a policy of it."""
    version = document.version if document else 0
    return any(
        status.problem or (status.version == version and any(arm.replaced for arm in status.arms)) for status in before
    )


# ---- edits


def set_primary(name: str, limits: Mapping[str, float]) -> Edit:
    """`name` decides for everybody; shadows stay. `limits` are fields of PolicyConfig."""

    def edit(current: PolicyConfig | None) -> PolicyConfig:
        base = current or PolicyConfig(name)
        return _checked(msgspec.structs.replace(base, primary=absolute(name), canary=None, **limits))

    return edit


def set_canary(name: str, share: float) -> Edit:
    """`name` decides for a share of the sessions; "" ends it."""

    def edit(current: PolicyConfig | None) -> PolicyConfig:
        base = _known(current)
        return _checked(msgspec.structs.replace(base, canary=Canary(absolute(name), share) if name else None))

    return edit


def set_shadows(names: Sequence[str]) -> Edit:
    """Exactly these are asked and never obeyed."""

    def edit(current: PolicyConfig | None) -> PolicyConfig:
        return _checked(msgspec.structs.replace(_known(current), shadows=tuple(map(absolute, names))))

    return edit


def _known(current: PolicyConfig | None) -> PolicyConfig:
    if current is None:
        raise PolicyRefused(
            "no router answers and nothing is stored; name the deciding policy first: hocket policy set"
        )
    return current


def _checked(config: PolicyConfig) -> PolicyConfig:
    """msgspec checks bounds when it decodes, not when a struct is made."""
    try:
        return msgspec.convert(msgspec.to_builtins(config), PolicyConfig)
    except msgspec.ValidationError as error:
        raise PolicyRefused(str(error)) from error


def absolute(name: str) -> str:
    """A policy's file by its full path: routers run in other folders."""
    target, question, options = name.partition("?")
    path, colon, class_name = target.rpartition(":")
    if not colon or not path.endswith(".py"):
        return name
    return f"{Path(path).resolve()}:{class_name}{question}{options}"
