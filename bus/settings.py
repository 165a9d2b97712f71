"""What operators decide, in a JetStream key-value bucket without a watch, written by compare-and-set.

A watch is deaf for up to 20 s after a restart of the server; whoever changes a document tells its readers, and they read
it again when they reconnect and at intervals. `nats kv get hk_config KEY` reads it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from . import subjects
from .base import NoResponders, QueueUnavailable, RequestTimeout, Setting, SettingChanged
from .jetstream import (
    MESSAGE_NOT_FOUND,
    STREAM_NOT_FOUND,
    WRONG_LAST_SEQUENCE,
    JetStreamError,
    MessageAnswer,
    PubAck,
    api_subject,
    call,
    ensure_bucket,
)

if TYPE_CHECKING:
    from .nats_bus import NatsBus

STREAM = f"KV_{subjects.SETTINGS_BUCKET}"
ROOT = subjects.under("$KV", subjects.SETTINGS_BUCKET)
PUT_TIMEOUT_S = 5.0


class NatsSettings:
    """One small document under each key."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus

    async def get(self, key: str) -> Setting | None:
        """The newest, or None. Raises BusError when JetStream does not answer for about 5 s."""
        body = {"last_by_subj": subjects.under(ROOT, key)}
        try:
            answer = await call(self._bus, api_subject("STREAM", "MSG", "GET", STREAM), body, MessageAnswer)
        except JetStreamError as error:
            if error.err_code in (MESSAGE_NOT_FOUND, STREAM_NOT_FOUND):
                return None
            raise
        if answer.message is None or not answer.message.data:  # Without data: deleted by `nats kv del`.
            return None
        return Setting(answer.message.data, answer.message.seq)

    async def put(self, key: str, value: bytes, *, after: int | None) -> int:
        """Store it in place of revision `after`; not tried again, since a lost confirmation looks like a conflict."""
        await self._ensure()
        header = f"NATS/1.0\r\nNats-Expected-Last-Subject-Sequence: {after or 0}\r\n\r\n".encode()
        subject = subjects.under(ROOT, key)
        try:
            answer = await self._bus.request_raw(subject, value, timeout_s=PUT_TIMEOUT_S, header=header)
        except (NoResponders, RequestTimeout) as error:
            raise QueueUnavailable(f"JetStream did not confirm the setting {key!r}") from error
        ack = msgspec.json.decode(answer.payload, type=PubAck)
        if ack.error is None:
            return ack.seq
        if ack.error.err_code in WRONG_LAST_SEQUENCE:
            raise SettingChanged(f"the setting {key!r} was changed by somebody else")
        raise JetStreamError(ack.error)

    async def _ensure(self) -> None:
        await ensure_bucket(self._bus, STREAM, subjects.all_under(ROOT), replicas=self._bus.jobs.limits.replicas)
