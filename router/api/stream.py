"""The token path: a bus frame's entries into their streams, and once a turn each stream's text to its writer.

No task, queue or timer per token. The frame handler runs inside the bus's read loop; the
flush runs once per turn of the loop and gives each stream's writer everything of that turn at once, so that chunks grow
by themselves when the process is behind and nothing is held back when it is not.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Protocol

from ...bus.base import Delivery
from ...bus.messages import (
    FINISH_CANCELLED,
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_NONE,
    Entry,
    EntryDetail,
    TokenFrame,
    TokenLogprob,
    decode_frame,
)
from ..generation import Failure, StreamEvents
from ..text.detokenize import Detokenizer, TokenTable, escape
from ..text.stops import StopScanner

log = logging.getLogger(__name__)


class TextWriter(Protocol):
    """Where one stream's text goes. Called from the flush: never blocks, never raises for a client that has gone."""

    def write(self, parts: list[bytes], logprobs: Sequence[ShownToken]) -> None:
        """Pieces of JSON-escaped text, and the log probabilities of the tokens in them when they were asked for."""

    def end(self, parts: list[bytes], logprobs: Sequence[ShownToken], finish_reason: str, output_tokens: int) -> None:
        """The last text, and why it is the last."""

    def fail(self, failure: Failure) -> None:
        """There will be no more; said once, and never after `end`."""


class ShownToken:
    """One token with its log probabilities."""

    __slots__ = ("logprob", "token_id")

    def __init__(self, token_id: int, logprob: TokenLogprob) -> None:
        self.token_id = token_id
        self.logprob = logprob


class Stream:
    """One generation's way to its writer. Made by the API, kept by the TokenPath until its one end."""

    __slots__ = (
        "_detokenizer",
        "_min_tokens",
        "_scanner",
        "attempt",
        "end_reason",
        "failure",
        "gap_turn",
        "is_dirty",
        "is_shown",
        "next_index",
        "parts",
        "shown",
        "writer",
    )

    def __init__(
        self, detokenizer: Detokenizer, writer: TextWriter, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._scanner = StopScanner(stops) if stops else None
        self._min_tokens = min_tokens
        self.writer = writer
        self.attempt = 0
        self.next_index = 0  # of the next token, which is also how many were accepted
        self.parts: list[bytes] = []
        self.shown: list[ShownToken] = []
        self.end_reason: str | None = None
        self.failure: Failure | None = None
        self.is_dirty = False
        self.is_shown = False  # its first text has been written
        self.gap_turn = -1  # the turn of the loop in which its last gap was reported

    @property
    def takes_table_text(self) -> bool:
        """The next token's text is the table's, whatever came before."""
        return self._scanner is None and self._detokenizer.is_whole

    def add(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], *, hidden_last: bool) -> bool:
        """Take tokens over; True when a stop string was found. A hidden last token counts but has no text."""
        shown_ids = token_ids[:-1] if hidden_last else token_ids
        for position, token_id in enumerate(shown_ids):
            self.next_index += 1
            text = self._detokenizer.text(token_id)
            is_stopped = False
            if self._scanner is not None:
                text, is_stopped = self._scanner.feed(text, may_stop=self.next_index > self._min_tokens)
            if text:
                self.parts.append(escape(text))
            if position < len(logprobs):
                self.shown.append(ShownToken(token_id, logprobs[position]))
            if is_stopped:
                return True
        self.next_index += hidden_last
        return False

    def finish(self, reason: str) -> None:
        """Nothing follows: show what was kept back."""
        if reason != "stop_string":
            tail = self._detokenizer.flush()
            if self._scanner is not None:
                text, is_stopped = self._scanner.feed(tail)
                tail = text if is_stopped else text + self._scanner.flush()
            if tail:
                self.parts.append(escape(tail))
        self.end_reason = "length" if reason == "length" else "stop"

    def flush(self) -> None:
        """Hand over to the writer what came since the last time."""
        parts, shown = self.parts, self.shown
        if parts:
            self.parts = []
        if shown:
            self.shown = []
        if self.end_reason is not None:
            self.writer.end(parts, shown, self.end_reason, self.next_index)
            return
        if parts:
            self.writer.write(parts, shown)
        elif shown:
            self.shown = shown  # Half a character: they go with its other half.
        if self.failure is not None:
            self.writer.fail(self.failure)


def _failure(finish: int, detail: EntryDetail | None) -> Failure:
    if finish == FINISH_CANCELLED:
        code, message = "cancelled", "the worker ended the request"
    else:
        code, message = "engine_error", "the engine failed"
    if detail is not None:
        code, message = detail.error_code or code, detail.error or message
    return Failure(code, message, is_retryable=True, status=500)


class TokenPath:
    """Every open stream of this router, and the handler of its token frames. Implements `generation.TokenStreams`."""

    def __init__(self, events: StreamEvents, table: TokenTable | None) -> None:
        self._events = events
        self._escaped: list[bytes | None] = table.escaped if table is not None else []
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)
        self._dirty: list[Stream] = []
        self._fresh: list[Stream] = []  # dirty for the first time: they are written first
        self._is_flush_due = False
        self._turn = 0
        self.late_entries = 0  # of streams that had ended, or of old attempts
        self.repeated_entries = 0
        self.gap_entries = 0  # dropped because tokens before them were missing

    def open(self, stream: Stream) -> int:
        """Give the stream its number: the router's own, small, never used twice."""
        stream_id = next(self._numbers)
        self._streams[stream_id] = stream
        return stream_id

    def close(self, stream_id: int) -> bool:
        """Forget the stream without another word to its writer; False when it had ended."""
        stream = self._streams.pop(stream_id, None)
        if stream is None:
            return False
        stream.parts, stream.shown = [], []  # What came in this turn.
        return True

    def __len__(self) -> int:
        return len(self._streams)

    # ---- generation.TokenStreams

    def rebind(self, stream_id: int, attempt: int) -> None:
        """Only tokens of `attempt` count from now on."""
        if stream := self._streams.get(stream_id):
            stream.attempt = attempt

    def next_index(self, stream_id: int) -> int | None:
        """The next token that the stream waits for; None when it is not open."""
        stream = self._streams.get(stream_id)
        return None if stream is None else stream.next_index

    def fail(self, stream_id: int, failure: Failure) -> None:
        """End the stream with one error event."""
        if stream := self._streams.pop(stream_id, None):
            stream.failure = failure
            self._mark(stream)

    # ---- frames

    def on_frame(self, delivery: Delivery) -> None:
        """Take in what one engine step made. Raises msgspec.MsgspecError for bytes that are no frame."""
        if delivery.is_no_responders:
            return
        frame = decode_frame(delivery.payload)
        details = frame.details
        for position, entry in enumerate(frame.entries):
            try:
                self._on_entry(frame, entry, details.get(position) if details else None)
            except Exception:  # One stream's bug must not cost the other streams of the frame.
                self._on_bug(entry[0])

    def _on_entry(self, frame: TokenFrame, entry: Entry, detail: EntryDetail | None) -> None:
        stream_id, attempt, first_index, token_ids, finish = entry
        stream = self._streams.get(stream_id)
        if stream is None or attempt != stream.attempt:
            self.late_entries += 1
            # An end of an attempt that is yet to be bound comes again; acknowledged, it would not.
            if finish and (stream is None or attempt < stream.attempt):
                self._events.on_late_end(frame.worker_id, stream_id, attempt)
            return
        skipped = stream.next_index - first_index
        if skipped < 0:
            self._on_gap(stream_id, stream)
            return
        if skipped:
            if skipped > len(token_ids) or (skipped == len(token_ids) and not finish):
                self.repeated_entries += 1
                return
            token_ids = token_ids[skipped:]
        if not finish and detail is None and len(token_ids) == 1 and stream.takes_table_text:
            token_id = token_ids[0]
            part = self._escaped[token_id] if 0 <= token_id < len(self._escaped) else None
            if part is not None:
                stream.next_index += 1
                if part:
                    stream.parts.append(part)
                self._mark(stream)
                if stream.next_index == 1:
                    self._events.on_first_token(stream_id, None)
                return
        self._on_slow(stream_id, stream, token_ids, finish, detail, skipped=skipped)

    def _on_slow(
        self,
        stream_id: int,
        stream: Stream,
        token_ids: Sequence[int],
        finish: int,
        detail: EntryDetail | None,
        *,
        skipped: int,
    ) -> None:
        """An entry with an end, log probabilities, stop strings or half a character."""
        logprobs = detail.logprobs[skipped:] if detail is not None else ()
        had_token = stream.next_index > 0
        hidden_last = bool(token_ids) and detail is not None and detail.stop_token == token_ids[-1]
        is_stopped = stream.add(token_ids, logprobs, hidden_last=hidden_last)
        if not had_token and stream.next_index:
            self._events.on_first_token(stream_id, detail)
        self._mark(stream)
        if is_stopped:
            stream.finish("stop_string")
            del self._streams[stream_id]
            if finish:
                self._events.on_end(stream_id, finish, stream.next_index, detail)
            else:
                self._events.on_stop_string(stream_id, stream.next_index)
            return
        if finish == FINISH_NONE:
            return
        if finish in (FINISH_ERROR, FINISH_CANCELLED):
            stream.failure = _failure(finish, detail)
        else:
            stream.finish("length" if finish == FINISH_LENGTH else "stop")
        del self._streams[stream_id]
        self._events.on_end(stream_id, finish, stream.next_index, detail)

    def _on_gap(self, stream_id: int, stream: Stream) -> None:
        self.gap_entries += 1
        if stream.gap_turn != self._turn:
            stream.gap_turn = self._turn
            self._plan_flush()  # It begins the next turn, in which the gap may be reported again.
            self._events.on_gap(stream_id, stream.next_index)

    def _on_bug(self, stream_id: int) -> None:
        """End the stream whose entry could not be taken in: with a token missing it can only hang."""
        log.exception("an entry of a token frame could not be taken in")
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.failure = Failure("internal_error", "internal error", is_retryable=False, status=500)
            self._mark(stream)
            self._events.on_stop_string(stream_id, stream.next_index)  # For the core it is the same: we want no more.

    # ---- writing

    def _mark(self, stream: Stream) -> None:
        if stream.is_dirty:
            return
        stream.is_dirty = True
        (self._dirty if stream.is_shown else self._fresh).append(stream)
        self._plan_flush()

    def _plan_flush(self) -> None:
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Write everything that came in this turn of the loop, first tokens first."""
        self._is_flush_due = False
        self._turn += 1
        batches = (self._fresh, self._dirty)
        self._fresh, self._dirty = [], []
        for batch in batches:
            for stream in batch:
                stream.is_dirty = False
                stream.is_shown = True
                try:
                    stream.flush()
                except Exception:  # One client's trouble must not cost the others their tokens.
                    log.exception("a stream could not be written")
