"""Asks every router of a pool at once, for the commands of an operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from ..bus import subjects
from ..bus.base import Bus, Delivery
from ..bus.nats_bus import NatsBus
from ..router.control_messages import (
    Answer,
    PoliciesTried,
    PolicyStatus,
    Question,
    ReceiptAnswer,
    RouterLoad,
    decode_answer,
    encode,
)

QUIET_S = 0.3
"""Routers answer in a few ms; how many there are nobody knows."""
ANSWERS_S = 3.0

OneAnswer = TypeVar("OneAnswer", PoliciesTried, PolicyStatus, ReceiptAnswer, RouterLoad)


@asynccontextmanager
async def pool_bus(nats: str) -> AsyncIterator[Bus]:
    """A connection for one command. Raises BusError."""
    bus = NatsBus(nats, name="operator")
    try:
        await bus.connect()
        yield bus
    finally:
        await bus.aclose()


async def ask_all(
    bus: Bus,
    pool: str,
    question: Question,
    kind: type[OneAnswer],
    *,
    count: int | None = None,
    timeout_s: float = ANSWERS_S,
) -> list[OneAnswer]:
    """Every answer, by router: `count` of them or what came in time; without `count` until nobody answers any more."""
    answers: dict[str, OneAnswer] = {}
    news: asyncio.Queue[Answer | None] = asyncio.Queue(1024)  # more routers than that go uncounted

    def on_answer(delivery: Delivery) -> None:
        news.put_nowait(None if delivery.is_no_responders else decode_answer(delivery.payload))

    inbox = bus.new_inbox()
    subscription = await bus.subscribe(inbox, on_answer)
    try:
        bus.publish_nowait(subjects.routers(pool), encode(question), reply=inbox)
        async with asyncio.timeout(timeout_s):
            while count is None or len(answers) < count:
                quiet_s = QUIET_S if count is None and answers else timeout_s
                answer = await asyncio.wait_for(news.get(), quiet_s)
                if answer is None:
                    break
                if isinstance(answer, kind):
                    answers[answer.router_id] = answer
    except TimeoutError:
        pass
    finally:
        await subscription.unsubscribe()
    return [answers[router] for router in sorted(answers)]
