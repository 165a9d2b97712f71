"""Which request kills the workers that take it, judged by who was on board when they died. Pure.

Many requests die with a worker, and one of them at most killed it. Of those on board only the most suspicious are blamed:
first, who has no token yet (an engine that computed a prompt and went on has shown that it can); of these, who lost the most
workers before. The others go on as if nothing had been. Who is blamed

- for the first time, is tried again like any other;
- for the second time, and was the only one there that had lost a worker before: is guilty, for nobody else was on both;
- for the second time together with others: each of them is tried once more, one after the other, and the next has its turn when
  the one before has made a token. Whose third worker dies then is guilty.

So a request costs two workers, three where the evidence was not clear. Who ends well is cleared at once, and what remains of a
suspicion is forgotten after `REMEMBER_S`. Until then the same content is refused when it was guilty, and as suspicious as
before when it was not, for clients try again. Each router judges by what it placed itself; a worker on which others had
requests, too, proves less.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import msgspec
import xxhash

from .generation import Failure, Generation, RouterError

LOSSES_MAX = 2
REMEMBER_S = 600.0
REMEMBERED_MAX = 4096


class Verdict(Enum):
    """What is to become of a request whose worker died."""

    AGAIN = "again"
    ALONE = "alone"  # when it is its turn: no other such request runs then
    GUILTY = "guilty"


@dataclass(frozen=True, slots=True)
class Aboard:
    """A request that was on a worker when it died."""

    stream_id: int
    generation: Generation
    has_token: bool


@dataclass(slots=True)
class _Record:
    losses: int
    is_guilty: bool
    until_s: float


class Quarantined(RouterError):
    """It killed the workers that took it."""

    status = 422  # Clients try a 5xx again by themselves, and that would cost more workers.
    code = "quarantined"

    def __init__(self) -> None:
        super().__init__(f"workers died of this request; it is refused for {REMEMBER_S / 60:.0f} minutes")


def quarantined() -> Failure:
    """How such a request ends."""
    error = Quarantined()
    return Failure(error.code, str(error), is_retryable=False, status=error.status)


def content_of(generation: Generation) -> bytes:
    """Equal for requests that an engine cannot tell from each other."""
    return xxhash.xxh3_128_digest(generation.packed_tokens + msgspec.json.encode(generation.sampling))


class Blame:
    """One router's judge. Almost always it knows nothing of anybody, and costs nothing."""

    def __init__(self) -> None:
        self._of: dict[int, bytes] = {}  # the content of streams in flight that are suspicious
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # oldest first
        self._turn: int | None = None
        self._waiting: dict[int, None] = {}

    def is_guilty(self, generation: Generation, now: float) -> bool:
        """Workers died of the same content not long ago."""
        record = self._find(generation, now)[1]
        return record is not None and record.is_guilty

    def enter(self, stream_id: int, generation: Generation, now: float) -> None:
        """A request comes, perhaps not for the first time."""
        content, record = self._find(generation, now)
        if record is not None:
            self._of[stream_id] = content

    def lost(self, aboard: Iterable[Aboard], now: float, *, is_shared: bool) -> dict[int, Verdict]:
        """A worker died with these requests on board, and (`is_shared`) maybe with those of other routers."""
        suspects = list(aboard)
        verdicts = {one.stream_id: Verdict.AGAIN for one in suspects}
        suspects = [one for one in suspects if not one.has_token] or suspects
        worst = max((self._losses(one.stream_id) for one in suspects), default=0)
        suspects = [one for one in suspects if self._losses(one.stream_id) == worst]
        is_single = len(suspects) == 1 and not is_shared
        for one in suspects:
            losses = worst + 1
            is_guilty = losses > LOSSES_MAX or (losses == LOSSES_MAX and is_single)
            self._note(one, _Record(losses, is_guilty, now + REMEMBER_S))
            if losses >= LOSSES_MAX:
                verdicts[one.stream_id] = Verdict.GUILTY if is_guilty else Verdict.ALONE
        return verdicts

    def must_wait(self, stream_id: int) -> bool:
        """Whether it is to go alone, and not its turn; then it is told by `moved_on` of another."""
        if self._losses(stream_id) < LOSSES_MAX or self._turn == stream_id:
            return False
        if self._turn is None:
            self._turn = stream_id
            return False
        self._waiting[stream_id] = None
        return True

    def moved_on(self, stream_id: int) -> int | None:
        """It has made a token, or ended; whose turn it is now, if that is new."""
        self._waiting.pop(stream_id, None)
        if self._turn != stream_id:
            return None
        self._turn = next(iter(self._waiting), None)
        if self._turn is not None:
            del self._waiting[self._turn]
        return self._turn

    def clear(self, stream_id: int) -> None:
        """It has ended well."""
        if content := self._of.pop(stream_id, None):
            self._records.pop(content, None)

    def leave(self, stream_id: int) -> int | None:
        """It has ended somehow; as `moved_on`."""
        self._of.pop(stream_id, None)
        return self.moved_on(stream_id)

    def _find(self, generation: Generation, now: float) -> tuple[bytes, _Record | None]:
        if not self._records:
            return b"", None
        content = content_of(generation)
        record = self._records.get(content)
        if record is not None and record.until_s <= now:
            del self._records[content]
            record = None
        return content, record

    def _losses(self, stream_id: int) -> int:
        record = self._records.get(self._of.get(stream_id, b""))
        return record.losses if record else 0

    def _note(self, one: Aboard, record: _Record) -> None:
        content = self._of[one.stream_id] = content_of(one.generation)
        self._records[content] = record
        self._records.move_to_end(content)
        if len(self._records) > REMEMBERED_MAX:
            self._records.popitem(last=False)
