"""What the router's shell keeps of each generation in flight."""

from __future__ import annotations

import asyncio

from .chooser import Chosen
from .generation import Started
from .policies.base import Outcome
from .receipts import Record
from .request import Pick, RequestMachine


class Live:
    """One generation in flight: its machine and what the shell must remember of it."""

    __slots__ = (
        "cached_tokens",
        "chosen",
        "chosen_s",
        "first_token_s",
        "machine",
        "outcome",
        "parked",
        "published_s",
        "record",
        "started",
        "started_s",
        "stream_id",
    )

    def __init__(self, machine: RequestMachine, stream_id: int, now: float) -> None:
        self.machine = machine
        self.stream_id = stream_id
        self.started_s = now
        self.published_s = 0.0
        self.chosen: Chosen | None = None  # by the newest attempt
        self.chosen_s = now
        self.first_token_s: float | None = None
        self.cached_tokens: int | None = None  # that the decode engine reported
        self.outcome: Outcome | None = None
        self.parked: Pick | None = None  # until it is its turn
        self.record: Record | None = None  # for its receipt
        self.started: asyncio.Future[Started] = asyncio.get_running_loop().create_future()
