"""What a decode worker owes its routers: every token from the first until its end is acknowledged. Plain state, told the time.

A frame may be lost without a word (core NATS), so nothing is forgotten when it is sent: a router that misses tokens asks
for a replay, an end is sent again until the router has it, and a lost connection starts again a little before where it broke.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from .ids import RouterId, WorkerId
from .messages import FINISH_NONE, Entry, EntryDetail, FinishAck, ReplayRequest, TokenFrame

FINISH_AGAIN_S = 0.25
FINISH_GIVE_UP_S = 30.0
RECENT_S = 1.0  # what was sent so shortly before a disconnect is sent again: it may not have left this host
PROBE_S = 0.1  # between tries at a router that nobody hears for; its reconnection takes 0.1 to 0.3 s
GRACE_S = 3.0  # after our own reconnection the routers may still be on their way back

Piece = tuple[Entry, EntryDetail | None]


@dataclass(frozen=True, slots=True)
class OutboxTimes:
    """When to send again and when to give up, in seconds."""

    finish_again_s: float = FINISH_AGAIN_S
    finish_give_up_s: float = FINISH_GIVE_UP_S
    gone_after_s: float = 1.0  # of nothing but refusals: the router has gone; longer than a reconnection of the router
    grace_s: float = GRACE_S


class _Stream:
    """One attempt of one request."""

    __slots__ = (
        "attempt",
        "details",
        "ends",
        "finish",
        "finish_came_with_tokens",
        "finish_detail",
        "give_up_at",
        "send_again_at",
        "sent",
        "stream_id",
        "tokens",
    )

    def __init__(self, stream_id: int, attempt: int) -> None:
        self.stream_id = stream_id
        self.attempt = attempt
        self.tokens: list[int] = []
        self.details: list[tuple[int, EntryDetail]] = []  # (index of its first token, detail)
        self.ends: list[int] = []  # of `details`: index after its last token
        self.sent = 0
        self.finish = FINISH_NONE
        self.finish_came_with_tokens = False
        self.finish_detail: EntryDetail | None = None  # without what belongs to tokens
        self.send_again_at = 0.0
        self.give_up_at = 0.0

    def append(self, token_ids: Sequence[int], finish: int, detail: EntryDetail | None) -> None:
        first = len(self.tokens)
        self.tokens.extend(token_ids)
        if detail is not None and token_ids:
            self.details.append((first, detail))
            self.ends.append(len(self.tokens))
        if finish != FINISH_NONE:
            self.finish = finish
            self.finish_came_with_tokens = bool(token_ids)
            if detail is not None:
                self.finish_detail = msgspec.structs.replace(detail, logprobs=())

    def pieces(self, first: int) -> list[Piece]:
        """Everything from the token `first` on, and the end if there is one."""
        pieces: list[Piece] = []
        position, tokens = first, self.tokens
        if self.details:
            for number in range(bisect_right(self.ends, first), len(self.ends)):
                start, detail = self.details[number]
                if start > position:
                    pieces.append((self._entry(position, start), None))
                    position = start
                pieces.append((self._entry(position, self.ends[number]), _without(detail, position - start)))
                position = self.ends[number]
        if position < len(tokens):
            pieces.append((self._entry(position, len(tokens)), None))
        if self.finish != FINISH_NONE:
            if pieces and (self.finish_came_with_tokens or self.finish_detail is None):
                (stream_id, attempt, index, ids, _), detail_of_last = pieces[-1]
                pieces[-1] = ((stream_id, attempt, index, ids, self.finish), detail_of_last)
            else:
                end: Entry = (self.stream_id, self.attempt, len(tokens), [], self.finish)
                pieces.append((end, self.finish_detail))
        return pieces

    def _entry(self, start: int, stop: int) -> Entry:
        return (self.stream_id, self.attempt, start, self.tokens[start:stop], FINISH_NONE)


def _without(detail: EntryDetail, skipped: int) -> EntryDetail:
    """The detail of an entry whose first tokens are left out."""
    if skipped == 0:
        return detail
    return msgspec.structs.replace(detail, logprobs=detail.logprobs[skipped:], computed_tokens=None, cached_tokens=None)


class _Router:
    """What is held for one router."""

    __slots__ = ("dirty", "ended", "hold_until", "probed_at", "recent", "refused_at", "streams", "suspect_since")

    def __init__(self) -> None:
        self.streams: dict[tuple[int, int], _Stream] = {}
        self.dirty: dict[_Stream, None] = {}
        self.ended: dict[_Stream, None] = {}  # by `send_again_at`, which only grows
        self.recent: deque[tuple[float, list[Entry]]] = deque()  # frames of the last RECENT_S, by when they were sent
        self.hold_until = 0.0
        self.suspect_since: float | None = None  # the first refusal of an unbroken row
        self.refused_at = 0.0
        self.probed_at: float | None = None

    def owe_again(self, entries: Iterable[Entry]) -> None:
        """These did not arrive, or may not have."""
        for stream_id, attempt, first_index, _, _ in entries:
            stream = self.streams.get((stream_id, attempt))
            if stream is not None:
                stream.sent = min(stream.sent, first_index)
                self.dirty[stream] = None

    def rewind(self, since: float) -> None:
        while self.recent:
            sent_at, entries = self.recent.pop()
            if sent_at < since:
                break
            self.owe_again(entries)
        self.recent.clear()

    def sent(self, now: float, entries: list[Entry]) -> None:
        self.recent.append((now, entries))
        while self.recent[0][0] < now - RECENT_S:
            self.recent.popleft()

    def next_at(self) -> float | None:
        """When something is to be sent without a new token."""
        if self.dirty:
            return self.hold_until
        if self.ended:
            return max(self.hold_until, next(iter(self.ended)).send_again_at)
        return None


class OutboxState:
    """The decisions of `TokenOutbox`: what to send to whom, when."""

    def __init__(self, worker_id: WorkerId, epoch: int, times: OutboxTimes) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._times = times
        self._routers: dict[RouterId, _Router] = {}
        self._frozen_until = 0.0

    @property
    def streams(self) -> int:
        """Attempts held."""
        return sum(len(router.streams) for router in self._routers.values())

    @property
    def unacknowledged(self) -> int:
        """Ends that no router has confirmed yet."""
        return sum(len(router.ended) for router in self._routers.values())

    def open(self, router_id: RouterId, stream_id: int, attempt: int) -> None:
        """An attempt was admitted."""
        router = self._routers.get(router_id)
        if router is None:
            router = self._routers[router_id] = _Router()
        router.streams.setdefault((stream_id, attempt), _Stream(stream_id, attempt))

    def add(
        self,
        key: tuple[RouterId, int, int],
        token_ids: Sequence[int],
        finish: int,
        detail: EntryDetail | None,
        now: float,
    ) -> bool:
        """What a step made for (router, stream, attempt); False when that is not open, or has ended."""
        router = self._routers.get(key[0])
        stream = None if router is None else router.streams.get(key[1:])
        if router is None or stream is None or stream.finish != FINISH_NONE:
            return False
        stream.append(token_ids, finish, detail)
        router.dirty[stream] = None
        if finish != FINISH_NONE:
            stream.send_again_at = now + self._times.finish_again_s
            stream.give_up_at = now + self._times.finish_give_up_s
            router.ended[stream] = None
        return True

    def acknowledge(self, ack: FinishAck) -> None:
        """The router has these ends."""
        for stream_id, attempt in ack.finished:
            self.forget(ack.router_id, stream_id, attempt)

    def forget(self, router_id: RouterId, stream_id: int, attempt: int) -> None:
        """Nobody wants this attempt any more."""
        router = self._routers.get(router_id)
        if router is None:
            return
        stream = router.streams.pop((stream_id, attempt), None)
        if stream is not None:
            router.dirty.pop(stream, None)
            router.ended.pop(stream, None)
        if not router.streams:
            del self._routers[router_id]

    def forget_router(self, router_id: RouterId) -> None:
        """It has gone, with all its requests."""
        self._routers.pop(router_id, None)

    def replay(self, request: ReplayRequest) -> TokenFrame | None:
        """Everything from `first_index` on; None when the attempt is not held."""
        router = self._routers.get(request.router_id)
        stream = None if router is None else router.streams.get((request.stream_id, request.attempt))
        return None if stream is None else self._frame(stream.pieces(max(0, request.first_index)))

    # ---- sending

    def next_at(self) -> float | None:
        """When `due` has something to say again; None: only after an event."""
        times = [at for router in self._routers.values() if (at := router.next_at()) is not None]
        return min(times, default=None)

    def due(self, now: float) -> list[RouterId]:
        """The routers that get a frame now."""
        return [
            router_id
            for router_id, router in self._routers.items()
            if (at := router.next_at()) is not None and at <= now
        ]

    def take(self, router_id: RouterId, now: float) -> TokenFrame | None:
        """The frame for a router that is due, taken as sent; None when nothing is left to say."""
        router = self._routers.get(router_id)
        if router is None or now < router.hold_until:
            return None
        self._again(router_id, router, now)
        if router.suspect_since is not None:
            if router.probed_at is not None and router.refused_at < router.probed_at:
                router.suspect_since = router.probed_at = None  # The last probe was heard.
            else:
                router.probed_at, router.hold_until = now, now + PROBE_S
        pieces: list[Piece] = []
        for stream in router.dirty:
            pieces += stream.pieces(stream.sent)
            stream.sent = len(stream.tokens)
        router.dirty.clear()
        if not pieces:
            return None
        frame = self._frame(pieces)
        router.sent(now, frame.entries)
        return frame

    def _again(self, router_id: RouterId, router: _Router, now: float) -> None:
        """Ends that were sent long enough ago, and those to give up."""
        while router.ended:
            stream = next(iter(router.ended))
            if stream.send_again_at > now:
                return
            if stream.give_up_at <= now:
                self.forget(router_id, stream.stream_id, stream.attempt)
                continue
            del router.ended[stream]
            stream.send_again_at = now + self._times.finish_again_s
            router.ended[stream] = None
            router.dirty[stream] = None

    def not_sent(self, router_id: RouterId, entries: Iterable[Entry], retry_at: float) -> None:
        """A taken frame could not be queued: its tokens are owed again, from `retry_at` on."""
        router = self._routers.get(router_id)
        if router is None:
            return
        router.hold_until = max(router.hold_until, retry_at)
        router.owe_again(entries)

    def on_refused(self, router_id: RouterId, now: float) -> bool:
        """The server's 503 for a frame: nobody listens. True when that has lasted too long: the router has gone.

        Not at the first one, because a router that reconnects is back within 0.3 s and wants its tokens.
        """
        router = self._routers.get(router_id)
        if router is None:
            return False
        if router.suspect_since is None:
            router.suspect_since = now
        router.refused_at = now
        router.hold_until = max(router.hold_until, now + PROBE_S)
        router.rewind(now - PROBE_S)
        return now >= self._frozen_until and now - router.suspect_since >= self._times.gone_after_s

    def on_connected(self, now: float) -> None:
        """Our connection is back: start a little before where it broke; verdicts on routers wait until they are back too."""
        self._frozen_until = now + self._times.grace_s
        for router in self._routers.values():
            router.hold_until = 0.0
            router.suspect_since = router.probed_at = None
            router.rewind(-math.inf)
            for stream in router.ended:
                stream.give_up_at = now + self._times.finish_give_up_s

    def _frame(self, pieces: list[Piece]) -> TokenFrame:
        details = {position: detail for position, (_, detail) in enumerate(pieces) if detail is not None}
        return TokenFrame(self._worker_id, self._epoch, [entry for entry, _ in pieces], details)
