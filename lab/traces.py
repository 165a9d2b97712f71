"""Recorded workloads: who asked what when, as chains of block hashes instead of text. A trace is a path, never shipped.

Formats: Mooncake's JSONL (its `hash_ids` stand for whole prefixes of `block` tokens), the Azure LLM inference CSV (lengths
and times), vidur's CSV (lengths), aiperf's agentic JSONL (sessions whose turns add to each other and follow the answer).
"""

from __future__ import annotations

import bisect
import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

HASH_BLOCK_TOKENS = 512
"""Tokens that one of Mooncake's or aiperf's `hash_ids` stands for."""

ENDLESS = 1 << 62
"""`Span.block_tokens` of a text that one id stands for as a whole."""

_MASK = (1 << 64) - 1


class TraceError(ValueError):
    """A trace that cannot be read; the text names the file, the line and what is wrong."""


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens from `start_token` on, until the next span; each id stands for everything up to its end."""

    start_token: int
    block_tokens: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: a prompt of `spans`, then an answer. `after`: index of the turn whose answer has to come first."""

    arrival_s: float  # from the trace's start; with `after`, the earliest
    prompt_tokens: int
    output_tokens: int
    spans: tuple[Span, ...]
    answer_id: int
    session: str = ""
    after: int | None = None
    think_s: float = 0.0  # between the answer of `after` and this turn

    def chain(self, block_tokens: int) -> list[int]:
        """Hashes of the whole blocks of prompt and answer; equal exactly when everything up to the block's end is equal."""
        ends = np.arange(1, (self.prompt_tokens + self.output_tokens) // block_tokens + 1) * block_tokens - 1
        answer = Span(self.prompt_tokens, ENDLESS, (self.answer_id,))
        hashes: list[int] = []
        spans = (*self.spans, answer)
        starts = [span.start_token for span in spans[1:]]
        for span, part in zip(spans, np.split(ends, np.searchsorted(ends, starts)), strict=True):
            if len(part):
                offsets = part - span.start_token
                ids = np.array(span.ids, np.uint64)[offsets // span.block_tokens]
                hashes += _mix(ids, (offsets % span.block_tokens).astype(np.uint64)).tolist()
        return hashes


def _mix(ids: npt.NDArray[np.uint64], offsets: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer over both; wraps around by intent."""
    with np.errstate(over="ignore"):
        z = ids * np.uint64(0x9E3779B97F4A7C15) + (offsets + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def own_id(*parts: int) -> int:
    """An id that no trace uses for anything else: the top bit is set."""
    value = 0
    for part in parts:
        value = (value * 0x9E3779B97F4A7C15 + part + 1) & _MASK
    return value | 1 << 63


@dataclass(frozen=True, slots=True)
class Trace:
    """Turns in the order of their arrival; `after` points backwards."""

    name: str
    turns: tuple[Turn, ...]

    def first(self, turns: int) -> Trace:
        """Only the first so many; a turn never loses the one it follows."""
        return replace(self, turns=self.turns[:turns])

    def faster(self, speedup: float) -> Trace:
        """The same requests at `speedup` times the rate."""
        scaled = [replace(t, arrival_s=t.arrival_s / speedup, think_s=t.think_s / speedup) for t in self.turns]
        return replace(self, turns=tuple(scaled))

    def copies(self, count: int) -> Trace:
        """So many side by side, each with prefixes of its own: more load, as much time between two uses of a prefix."""
        turns: list[Turn] = []
        for copy in range(count):
            base = len(turns)
            for turn in self.turns:
                spans = tuple(replace(s, ids=tuple(own_id(copy, i) for i in s.ids)) for s in turn.spans)
                after = None if turn.after is None else turn.after + base
                session = f"{turn.session}/{copy}" if turn.session else ""
                answer = own_id(copy, turn.answer_id)
                turns.append(replace(turn, spans=spans, after=after, session=session, answer_id=answer))
        if not any(turn.after is not None for turn in turns):
            turns.sort(key=lambda turn: turn.arrival_s)
        return replace(self, turns=tuple(turns))

    def resized(self, scale: float) -> Trace:
        """Prompts and answers `scale` times as long, with the same shared prefixes."""
        return replace(self, turns=tuple(_resize(turn, scale) for turn in self.turns))

    def shifted(self) -> Trace:
        """With the first arrival at 0."""
        start = min((turn.arrival_s for turn in self.turns), default=0.0)
        return replace(self, turns=tuple(replace(t, arrival_s=t.arrival_s - start) for t in self.turns))

    def closed(self) -> Trace:
        """A turn whose prompt begins with an earlier turn's whole prompt waits for that turn's answer."""
        latest: dict[int, int] = {}  # last id that stands for a whole block -> the turn that ended with it
        turns = []
        for index, turn in enumerate(self.turns):
            ids = turn.spans[0].ids[: turn.prompt_tokens // turn.spans[0].block_tokens]
            if turn.after is None and len(turn.spans) == 1 and len(ids) > 1:
                parents = (latest[block] for block in reversed(ids[1:]) if block in latest)
                turn = replace(turn, after=next(parents, None))
                latest[ids[-1]] = index
            turns.append(turn)
        return replace(self, turns=tuple(turns))

    def ideal_hit_tokens(self, block_tokens: int) -> int:
        """Prompt tokens that one endless cache of whole blocks would have had, in the order of arrival."""
        seen: set[int] = set()
        tokens = 0
        for turn in self.turns:
            chain = turn.chain(block_tokens)
            reusable = (turn.prompt_tokens - 1) // block_tokens
            tokens += block_tokens * next((i for i in range(reusable) if chain[i] not in seen), reusable)
            seen.update(chain)
        return tokens


def _resize(turn: Turn, scale: float) -> Turn:
    def resized(tokens: int) -> int:
        whole, rest = divmod(tokens, HASH_BLOCK_TOKENS)
        return max(1, whole * max(1, round(HASH_BLOCK_TOKENS * scale)) + round(rest * scale))

    spans = tuple(
        Span(resized(s.start_token) if s.start_token else 0, min(ENDLESS, max(1, round(s.block_tokens * scale))), s.ids)
        for s in turn.spans
    )
    return replace(
        turn,
        spans=spans,
        prompt_tokens=resized(turn.prompt_tokens),
        output_tokens=max(1, round(turn.output_tokens * scale)),
    )


# ---- readers


def read_trace(path: Path, *, as_stamped: bool = False) -> Trace:
    """The format is told from the first line. `as_stamped`: leave equal time stamps equal. Raises TraceError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    head = text.lstrip()[:4096].partition("\n")[0]
    if head.startswith("{"):
        turns = _read_sessions(path, text) if '"session_id"' in head else _read_mooncake(path, text)
    elif head.startswith("TIMESTAMP,"):
        turns = _read_azure(path, text)
    elif head.startswith("num_prefill_tokens,"):
        turns = _read_vidur(path, text)
    else:
        raise TraceError(f"{path}:1: no known trace begins with {head[:60]!r}")
    if not turns:
        raise TraceError(f"{path}: no request in it")
    trace = Trace(path.stem, tuple(turns)).shifted()
    return trace if as_stamped else _spread(trace)


def _lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {error}") from error
        if not isinstance(record, dict):
            raise TraceError(f"{path}:{number}: not an object: {line[:60]}")
        yield number, record


def _count(path: Path, number: int, record: dict[str, object], field: str) -> int:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TraceError(f"{path}:{number}: {field} must be a whole number from 0, not {value!r}")
    return value


def _ms(path: Path, number: int, record: dict[str, object], field: str) -> float:
    value = record.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise TraceError(f"{path}:{number}: {field} must be milliseconds from 0, not {value!r}")
    return value / 1e3


def _ids(path: Path, number: int, record: dict[str, object], tokens: int) -> tuple[int, ...]:
    ids = record.get("hash_ids")
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < 1 << 63 for i in ids):
        raise TraceError(f"{path}:{number}: hash_ids must be a list of whole numbers from 0")
    if len(ids) * HASH_BLOCK_TOKENS < tokens:
        raise TraceError(f"{path}:{number}: {len(ids)} hash_ids of {HASH_BLOCK_TOKENS} tokens for {tokens} tokens")
    return tuple(ids)


def _read_mooncake(path: Path, text: str) -> list[Turn]:
    turns = []
    for number, record in _lines(path, text):
        tokens = max(1, _count(path, number, record, "input_length"))
        ids = _ids(path, number, record, tokens)
        output = max(1, _count(path, number, record, "output_length"))
        arrival_s = _ms(path, number, record, "timestamp")
        spans = (Span(0, HASH_BLOCK_TOKENS, ids),)
        turns.append(Turn(arrival_s, tokens, output, spans, own_id(1, number)))
    return sorted(turns, key=lambda turn: turn.arrival_s)


def _read_sessions(path: Path, text: str) -> list[Turn]:
    """aiperf: a session's first turn has a time stamp, each later one adds to the conversation `delay` ms after the answer."""
    turns: list[Turn] = []
    last: dict[str, int] = {}
    for number, record in _lines(path, text):
        session = record.get("session_id")
        if not isinstance(session, str):
            raise TraceError(f"{path}:{number}: session_id must be a string, not {session!r}")
        tokens = max(1, _count(path, number, record, "input_length"))
        span = Span(0, HASH_BLOCK_TOKENS, _ids(path, number, record, tokens))
        output = max(1, _count(path, number, record, "output_length"))
        answer = own_id(2, number)
        if session not in last:
            turn = Turn(_ms(path, number, record, "timestamp"), tokens, output, (span,), answer, session)
        else:
            turn = next_turn(
                turns,
                last[session],
                span,
                tokens,
                output=output,
                answer=answer,
                think_s=_ms(path, number, record, "delay"),
            )
        last[session] = len(turns)
        turns.append(turn)
    return turns


def next_turn(
    turns: Sequence[Turn], before: int, span: Span, tokens: int, *, output: int, answer: int, think_s: float
) -> Turn:
    """The conversation so far, its answer, and what is new."""
    previous = turns[before]
    said = Span(previous.prompt_tokens, ENDLESS, (previous.answer_id,))
    start = previous.prompt_tokens + previous.output_tokens
    spans = (*previous.spans, said, replace(span, start_token=start))
    return Turn(previous.arrival_s, start + tokens, output, spans, answer, previous.session, before, think_s)


def _rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.DictReader(io.StringIO(text))
    if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
        raise TraceError(f"{path}:1: no column {missing[0]}")
    for row in reader:
        yield reader.line_num, [row[column] or "" for column in columns]


def _lengths(path: Path, number: int, prompt: str, output: str) -> tuple[int, int]:
    try:
        lengths = int(prompt), int(output)
    except ValueError as error:
        raise TraceError(f"{path}:{number}: {prompt!r} and {output!r} must be token counts") from error
    if min(lengths) < 0:
        raise TraceError(f"{path}:{number}: {prompt!r} and {output!r} must not be negative")
    return max(1, lengths[0]), max(1, lengths[1])


def unshared(arrival_s: float, lengths: tuple[int, int], number: int) -> Turn:
    """A request that has no prefix in common with any other."""
    return Turn(arrival_s, *lengths, (Span(0, ENDLESS, (own_id(3, number),)),), own_id(1, number))


def _read_azure(path: Path, text: str) -> list[Turn]:
    turns = []
    for number, (stamp, prompt, output) in _rows(path, text, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        try:
            arrival_s = datetime.fromisoformat(
                stamp[:26]
            ).timestamp()  # It has 7 digits after the point, Python reads 6.
        except ValueError as error:
            raise TraceError(f"{path}:{number}: {stamp!r} is no time stamp") from error
        turns.append(unshared(arrival_s, _lengths(path, number, prompt, output), number))
    return sorted(turns, key=lambda turn: turn.arrival_s)


VIDUR_REQUESTS_PER_S = 1.0


def _read_vidur(path: Path, text: str) -> list[Turn]:
    """It has no times: one request a second, evenly; scale the rate with `faster`."""
    rows = _rows(path, text, ("num_prefill_tokens", "num_decode_tokens"))
    return [
        unshared(index / VIDUR_REQUESTS_PER_S, _lengths(path, number, prompt, output), number)
        for index, (number, (prompt, output)) in enumerate(rows)
    ]


def _spread(trace: Trace) -> Trace:
    """Mooncake's stamps are ticks of 3 s that up to 28 requests share: spread those evenly over the tick.

    Left as they are, a replay measures the queue that the stamps make and not the one the users made.
    """
    stamps = sorted({turn.arrival_s for turn in trace.turns if turn.after is None})
    shared = Counter(turn.arrival_s for turn in trace.turns if turn.after is None)
    if len(stamps) < 2 or sum(shared.values()) < 1.5 * len(stamps):
        return trace
    tick_s = Counter(round(b - a, 6) for a, b in zip(stamps, stamps[1:], strict=False)).most_common(1)[0][0]
    taken: Counter[float] = Counter()
    turns = []
    for turn in trace.turns:
        if turn.after is None and (together := shared[turn.arrival_s]) > 1:
            place = taken[turn.arrival_s]
            taken[turn.arrival_s] += 1
            here = bisect.bisect_right(stamps, turn.arrival_s)
            room_s = min(tick_s, stamps[here] - turn.arrival_s) if here < len(stamps) else tick_s
            turn = replace(turn, arrival_s=turn.arrival_s + room_s * place / together)
        turns.append(turn)
    return replace(
        trace, turns=tuple(sorted(turns, key=lambda t: t.arrival_s) if not any(t.session for t in turns) else turns)
    )
