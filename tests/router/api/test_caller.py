"""Who asks: tenant, priority, conversation, patience from the headers, as far as they are to be believed; refusals by limits."""

from __future__ import annotations

import time

import pytest

from hocket.bus.messages import FINISH_LENGTH
from hocket.router.admission import Refusal
from hocket.router.api.caller import caller_of
from hocket.router.api.errors import ApiError
from hocket.router.chooser import Ask
from hocket.router.config import RouterConfig
from hocket.router.generation import refused

from .conftest import ApiFactory, Step

BODY = {"model": "tiny", "prompt": "hello", "max_tokens": 1}
KEY = {"authorization": "Bearer sk-secret"}
NAMED = {"x-hocket-tenant": "acme", "x-hocket-priority": "3"}


def raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def test_the_core_is_told_who_asks_and_how_long_there_is(serve: ApiFactory):
    api = await serve(lambda generation, stream_id: [Step([5], FINISH_LENGTH)], tenant_from="header")
    before = time.monotonic()
    answer = await api.http.post(
        "/v1/completions", json=BODY, headers={**NAMED, "x-hocket-timeout-s": "20", "x-hocket-session": "talk-7"}
    )
    assert answer.status_code == 200, answer.text
    [generation] = api.core.generations.values()
    assert (generation.tenant, generation.priority) == ("acme", 3)
    assert Ask.of(generation).session_id == "talk-7"
    assert before + 20 <= generation.deadline_s <= time.monotonic() + 20


def test_a_key_is_a_tenant_and_stays_a_secret():
    config = RouterConfig(tenant_from="key")
    one = caller_of(raw(KEY), config)
    assert one.tenant
    assert "secret" not in one.tenant
    assert caller_of(raw(KEY), config) == one
    assert caller_of(raw({"authorization": "bearer  other"}), config).tenant not in ("", one.tenant)
    assert caller_of([], config).tenant == ""
    assert caller_of(raw({**KEY, **NAMED}), config) == one  # Its word counts for nothing.


def test_nobody_is_believed_by_default():
    caller = caller_of(raw({**KEY, **NAMED}), RouterConfig())
    assert (caller.tenant, caller.priority, caller.timeout_s) == ("", 0, 600.0)


def test_patience_only_shortens():
    assert caller_of(raw({"x-hocket-timeout-s": "1e9"}), RouterConfig(request_timeout_s=30.0)).timeout_s == 30.0


@pytest.mark.parametrize(
    "header",
    [
        {"x-hocket-tenant": "a b"},
        {"x-hocket-tenant": "x" * 65},
        {"x-hocket-priority": "9"},
        {"x-hocket-priority": "nan"},
        {"x-hocket-priority": "high"},
        {"x-hocket-session": "a\tb"},
        {"x-hocket-session": "x" * 129},
        {"x-hocket-timeout-s": "0"},
        {"x-hocket-timeout-s": "-1"},
        {"x-hocket-timeout-s": "soon"},
    ],
)
def test_a_header_that_cannot_be_read_is_named(header: dict[str, str]):
    with pytest.raises(ApiError) as caught:
        caller_of(raw(header), RouterConfig(tenant_from="header"))
    assert caught.value.status == 400
    assert caught.value.param == next(iter(header))


@pytest.mark.parametrize(
    ("refusal", "status", "retry_after"),
    [
        (Refusal("tenant_limit", "the tenant holds 5 of its 5", 2.2), 429, "3"),
        (Refusal("overloaded", "9 of 9 are in flight", 1.0), 503, "1"),
        (Refusal("deadline", "it would start in 9.0 s", 7.0), 503, "7"),
        (Refusal("too_large", "900 KV blocks are over the limit", 0.0), 400, None),
    ],
)
async def test_a_refusal_reaches_the_client(serve: ApiFactory, refusal: Refusal, status: int, retry_after: str | None):
    api = await serve()
    api.core.error = refused(refusal)
    answer = await api.http.post("/v1/completions", json=BODY)
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.json()["error"]["code"] == refusal.reason
    assert answer.json()["error"]["message"] == refusal.detail
