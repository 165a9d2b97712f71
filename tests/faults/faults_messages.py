"""What a test and its engine processes say to each other: one JSON value a line."""

from __future__ import annotations

import msgspec


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


class Decode(_Message, frozen=True):
    """Answer a prompt; with a token its KV comes from somebody."""

    number: int
    token_ids: list[int]
    max_tokens: int
    token: bytes | None = None
    handoff_timeout_s: float = 10.0


class Prefill(_Message, frozen=True):
    """Compute a prompt and hand it over."""

    number: int
    token: bytes
    delivery: int
    token_ids: list[int]
    addresses: tuple[str, ...]
    epoch: int
    fingerprint: str


class Cancel(_Message, frozen=True):
    """The client of this number has gone."""

    number: int


class Look(_Message, frozen=True):
    """Say what you hold."""


class Ready(_Message, frozen=True):
    addresses: tuple[str, ...]
    fingerprint: str
    kv_blocks: int


class Progress(_Message, frozen=True):
    """Of an expected hand-off: somebody has the grant and so many bytes have come; or it is over."""

    token: bytes
    kv_bytes: int
    is_over: bool = False


class Ended(_Message, frozen=True):
    """A task is over; `error` is empty when it went well."""

    number: int
    token_ids: list[int]
    computed_tokens: int
    error: str


class State(_Message, frozen=True):
    """What a process holds."""

    running: int
    waiting: int
    kv_blocks_free: int
    receiving: int
    sending: int
    links: int
    fds: int
    received: dict[str, int]
    sent: dict[str, int]


Command = Decode | Prefill | Cancel | Look
Event = Ready | Progress | Ended | State
