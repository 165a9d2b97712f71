"""Who asks, as the headers of a request say it: tenant, priority, conversation, patience."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..config import RouterConfig
from .errors import bad_request

TENANT = "x-hocket-tenant"
PRIORITY = "x-hocket-priority"
SESSION = "x-hocket-session"
TIMEOUT = "x-hocket-timeout-s"
PRIORITY_MAX = 8
_TENANT = re.compile(r"[!-~]{1,64}\Z")
_SESSION = re.compile(r"[!-~]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class Caller:
    """One client for the purposes of limits and order."""

    tenant: str
    priority: int
    timeout_s: float
    session_id: str = ""  # of the conversation; "": not said


def caller_of(headers: Iterable[tuple[bytes, bytes]], config: RouterConfig) -> Caller:
    """Raises ApiError (400) for a header that cannot be read. Who may name its tenant also says its priority."""
    given = {name: value for name, value in headers if name.startswith((b"x-hocket-", b"authorization"))}
    tenant, priority = "", 0
    if config.tenant_from == "key":
        scheme, _, key = given.get(b"authorization", b"").partition(b" ")
        if key and scheme.lower() == b"bearer":
            tenant = hashlib.sha256(key.strip()).hexdigest()[:16]  # The key itself is nobody's business.
    elif config.tenant_from == "header":
        tenant = given.get(TENANT.encode(), b"").decode("latin-1")
        if tenant and not _TENANT.match(tenant):
            raise bad_request(f"{TENANT} is 1 to 64 visible ASCII characters", TENANT)
        priority = int(_number(given, PRIORITY, 0, -PRIORITY_MAX, PRIORITY_MAX))
    session_id = given.get(SESSION.encode(), b"").decode("latin-1")
    if session_id and not _SESSION.match(session_id):
        raise bad_request(f"{SESSION} is 1 to 128 visible ASCII characters", SESSION)
    timeout_s = _number(given, TIMEOUT, config.request_timeout_s, 0.001, float("inf"))
    return Caller(tenant, priority, min(timeout_s, config.request_timeout_s), session_id)


def _number(given: dict[bytes, bytes], name: str, default: float, low: float, high: float) -> float:
    text = given.get(name.encode())
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise bad_request(f"{name} is a number from {low:g} to {high:g}", name)
    return value
