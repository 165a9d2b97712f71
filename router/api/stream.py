"""The token path: a bus frame's entries into their streams, and once a turn each stream's text to its writer.

No task, queue or timer per token (figures: docs/benchmarks.md). The frame handler runs inside the bus's read loop; the
flush runs once per turn of the loop and gives each stream's writer everything of that turn at once, so that chunks grow
by themselves when the process is behind and nothing is held back when it is not.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
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

    def fail(self, failure: Failure, output_tokens: int) -> None:
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
        "is_dirty",
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


class TokenPath:
    """Every open stream of this router, and the handler of its token frames. Implements `generation.TokenStreams`."""

    def __init__(self, events: StreamEvents, table: TokenTable | None) -> None:
        self._events = events
        self._escaped: list[bytes | None] = table.escaped if table is not None else []
        self._streams: dict[int, Stream] = {}
        self._numbers = itertools.count(1)
        self._dirty: list[Stream] = []
        self._call_soon: Callable[..., object] | None = None

    def open(self, stream: Stream) -> int:
        """Give the stream its number: the router's own, small, never used twice."""
        stream_id = next(self._numbers)
        self._streams[stream_id] = stream
        return stream_id

    def close(self, stream_id: int) -> bool:
        """Forget the stream without another word to its writer; False when it had ended."""
        return self._streams.pop(stream_id, None) is not None

    def __len__(self) -> int:
        return len(self._streams)

    # ---- generation.TokenStreams

    def rebind(self, stream_id: int, attempt: int) -> None:
        """Only tokens of `attempt` count from now on."""
        if stream := self._streams.get(stream_id):
            stream.attempt = attempt

    def has_started(self, stream_id: int) -> bool:
        """Whether a token was accepted."""
        stream = self._streams.get(stream_id)
        return stream is not None and stream.next_index > 0

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
                log.exception("an entry of a token frame was lost")

    def _on_entry(self, frame: TokenFrame, entry: Entry, detail: EntryDetail | None) -> None:
        stream_id, attempt, first_index, token_ids, finish = entry
        stream = self._streams.get(stream_id)
        if stream is None or attempt != stream.attempt:
            if finish:
                self._events.on_late_end(frame.worker_id, stream_id, attempt)
            return
        skipped = stream.next_index - first_index
        if skipped < 0:
            self._events.on_gap(stream_id, stream.next_index)
            return
        if skipped:
            if not finish and skipped >= len(token_ids):
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
            code = detail.error_code if detail is not None and detail.error_code else "engine_error"
            message = detail.error if detail is not None and detail.error else "the engine failed"
            stream.failure = Failure(code, message, is_retryable=True, status=500)
        else:
            stream.finish("length" if finish == FINISH_LENGTH else "stop")
        del self._streams[stream_id]
        self._events.on_end(stream_id, finish, stream.next_index, detail)

    # ---- writing

    def _mark(self, stream: Stream) -> None:
        if stream.is_dirty:
            return
        stream.is_dirty = True
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self.flush)
        self._dirty.append(stream)

    def flush(self) -> None:
        """Write everything that came in this turn of the loop."""
        dirty, self._dirty = self._dirty, []
        for stream in dirty:
            stream.is_dirty = False
            parts, shown = stream.parts, stream.shown
            if parts:
                stream.parts = []
            if shown:
                stream.shown = []
            try:
                if stream.failure is not None:
                    if parts or shown:
                        stream.writer.write(parts, shown)
                    stream.writer.fail(stream.failure, stream.next_index)
                elif stream.end_reason is not None:
                    stream.writer.end(parts, shown, stream.end_reason, stream.next_index)
                elif parts or shown:
                    stream.writer.write(parts, shown)
            except Exception:  # One client's trouble must not cost the others their tokens.
                log.exception("a stream could not be written")
