"""Workloads that are made and not recorded: `synthetic:KIND,name=value,...` wherever a trace's path may stand."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from .traces import ENDLESS, Span, Trace, TraceError, Turn, next_turn, own_id

PREFIX = "synthetic:"
Kind = Literal["poisson", "bursts", "multiturn", "shared"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths are log-normal around their mean; 0 for a spread makes them all equal."""

    requests: int = 1000
    rate: float = 4.0  # requests/s (multiturn: conversations/s), mean
    prompt: int = 3000  # tokens (multiturn: that each turn adds)
    output: int = 150  # tokens
    spread: float = 0.0  # of the lengths: standard deviation of their logarithm
    burst: float = 4.0  # bursts: the rate inside one, as a multiple of the mean
    period: float = 60.0  # bursts: seconds from one to the next
    turns: int = 5  # multiturn: of a conversation
    think: float = 10.0  # multiturn: seconds between an answer and the next turn, mean
    prefixes: int = 20  # shared: different system prompts, the k-th as popular as 1/k
    prefix: int = 2000  # shared: tokens of each
    seed: int = 0


def synthetic(text: str) -> Trace:
    """The trace that `text` describes, always the same for the same text. Raises TraceError."""
    kind, *settings = text.removeprefix(PREFIX).split(",")
    known = {field.name: int if isinstance(field.default, int) else float for field in fields(Shape)}
    values: dict[str, float] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            values[name] = known[name](value)
            if not 0 <= values[name] < math.inf:
                raise ValueError
        except (KeyError, ValueError) as error:
            raise TraceError(f"{text}: {setting!r} is none of {', '.join(known)} with a number from 0") from error
    shape = Shape(**values)  # type: ignore[arg-type]  # Each was made by its field's own type.
    if kind not in get_args(Kind):
        raise TraceError(f"{text}: no kind {kind!r}; there are {', '.join(get_args(Kind))}")
    if min(shape.requests, shape.rate, shape.burst, shape.period, shape.turns, shape.prefixes) <= 0 or shape.burst < 1:
        raise TraceError(f"{text}: requests, rate, period, turns and prefixes must be above 0, burst at least 1")
    rng = random.Random(shape.seed)
    turns = _conversations(shape, rng) if kind == "multiturn" else _requests(kind, shape, rng)
    return Trace(text, tuple(turns))


def _length(mean: int, spread: float, rng: random.Random) -> int:
    if not spread:
        return max(1, mean)
    return max(1, round(rng.lognormvariate(math.log(max(mean, 1)) - spread * spread / 2, spread)))


def _arrivals(kind: str, shape: Shape, rng: random.Random) -> list[float]:
    """Poisson; in bursts the same number of requests comes in the first part of each period."""
    now, arrivals = 0.0, []
    for _ in range(shape.requests):
        now += rng.expovariate(shape.rate)
        arrivals.append(now)
    if kind == "bursts":
        arrivals = [t - t % shape.period + t % shape.period / shape.burst for t in arrivals]
    return arrivals


def _requests(kind: str, shape: Shape, rng: random.Random) -> list[Turn]:
    weights = [1 / (rank + 1) for rank in range(shape.prefixes)]
    turns = []
    for number, arrival_s in enumerate(_arrivals(kind, shape, rng)):
        prompt, output = _length(shape.prompt, shape.spread, rng), _length(shape.output, shape.spread, rng)
        spans: tuple[Span, ...] = (Span(0, ENDLESS, (own_id(3, number),)),)
        if kind == "shared" and shape.prefix:
            system = rng.choices(range(shape.prefixes), weights)[0]
            spans = (Span(0, ENDLESS, (own_id(4, system),)), replace(spans[0], start_token=shape.prefix))
            prompt += shape.prefix
        turns.append(Turn(arrival_s, prompt, output, spans, own_id(1, number)))
    return turns


def _conversations(shape: Shape, rng: random.Random) -> list[Turn]:
    turns: list[Turn] = []
    for conversation, arrival_s in enumerate(_arrivals("poisson", shape, rng)):
        for _ in range(shape.turns):
            if len(turns) == shape.requests:
                return turns
            number = len(turns)
            prompt, output = _length(shape.prompt, shape.spread, rng), _length(shape.output, shape.spread, rng)
            span = Span(0, ENDLESS, (own_id(3, number),))
            answer = own_id(1, number)
            if number and turns[-1].session == str(conversation):
                think_s = rng.expovariate(1 / shape.think) if shape.think else 0.0
                turn = next_turn(turns, number - 1, span, prompt, output=output, answer=answer, think_s=think_s)
            else:
                turn = Turn(arrival_s, prompt, output, (span,), answer, str(conversation))
            turns.append(turn)
    return turns
