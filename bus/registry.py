"""The workers' cards in a JetStream key-value bucket, without a watch: routers list it, heartbeats tell who lives.

A key-value bucket is a stream that keeps one message a subject
(https://github.com/nats-io/nats-architecture-and-design/blob/main/adr/ADR-8.md); `nats kv` reads it too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from . import subjects
from .base import BusError, NoResponders, QueueUnavailable, RequestTimeout
from .ids import WorkerId
from .jetstream import (
    MESSAGE_NOT_FOUND,
    STREAM_NOT_FOUND,
    ApiAnswer,
    JetStreamError,
    MessageAnswer,
    PubAck,
    StreamInfo,
    api_subject,
    call,
    ensure_bucket,
)
from .messages import WorkerCard, decode, encode

if TYPE_CHECKING:
    from .nats_bus import NatsBus

STREAM = f"KV_{subjects.REGISTRY_BUCKET}"
ROOT = subjects.under("$KV", subjects.REGISTRY_BUCKET)
PUT_TRIES = 10
PUT_TRY_S = 1.0


class NatsRegistry:
    """The last card of each worker."""

    def __init__(self, bus: NatsBus) -> None:
        self._bus = bus
        self._is_ensured = False

    async def put(self, card: WorkerCard) -> None:
        """Store the card; raises BusError when JetStream does not confirm it within about 10 s."""
        for attempt in range(PUT_TRIES):
            try:
                await self._ensure()
                answer = await self._bus.request_raw(
                    subjects.under(ROOT, card.worker_id), encode(card), timeout_s=PUT_TRY_S
                )
                ack = msgspec.json.decode(answer.payload, type=PubAck)
                if ack.error is not None:
                    raise JetStreamError(ack.error)
                return
            except (NoResponders, RequestTimeout) as error:
                self._is_ensured = False
                if attempt + 1 == PUT_TRIES:
                    raise QueueUnavailable(f"the registry did not confirm {card.worker_id}") from error
            await asyncio.sleep(0.1)

    async def get(self, worker: WorkerId) -> WorkerCard | None:
        """The card, or None."""
        return await self._get(subjects.under(ROOT, worker))

    async def _get(self, subject: str) -> WorkerCard | None:
        body = {"last_by_subj": subject}
        try:
            answer = await call(self._bus, api_subject("STREAM", "MSG", "GET", STREAM), body, MessageAnswer)
        except JetStreamError as error:
            if error.err_code in (MESSAGE_NOT_FOUND, STREAM_NOT_FOUND):
                return None
            raise
        if answer.message is None or not answer.message.data:
            return None
        card = decode(answer.message.data)
        if not isinstance(card, WorkerCard):
            raise BusError(f"{subject} holds a {type(card).__name__}, not a card")
        return card

    async def delete(self, worker: WorkerId) -> None:
        """Forget the card. Purged, not marked as deleted: every incarnation has a new name, markers would pile up."""
        body = {"filter": subjects.under(ROOT, worker)}
        try:
            await call(self._bus, api_subject("STREAM", "PURGE", STREAM), body, ApiAnswer)
        except JetStreamError as error:
            if error.err_code != STREAM_NOT_FOUND:
                raise

    async def list(self) -> list[WorkerCard]:
        """All cards, by worker id."""
        body = {"subjects_filter": subjects.all_under(ROOT)}
        try:
            info = await call(self._bus, api_subject("STREAM", "INFO", STREAM), body, StreamInfo)
        except JetStreamError as error:
            if error.err_code == STREAM_NOT_FOUND:
                return []
            raise
        cards = [await self._get(subject) for subject in sorted(info.state.subjects or {})]
        return [card for card in cards if card is not None]

    async def _ensure(self) -> None:
        if self._is_ensured:
            return
        await ensure_bucket(self._bus, STREAM, subjects.all_under(ROOT), replicas=self._bus.jobs.limits.replicas)
        self._is_ensured = True
