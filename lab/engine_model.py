"""An engine as vLLM schedules it, without tokens and without waiting: who gets blocks, what a step computes, when it is over.

The same rules as vLLM's V1 scheduler: one token budget a step, running requests first, prompts in chunks, waiting requests
first come first served as far as slots and blocks go, the youngest running request preempted (and computed again) when
blocks run out, full blocks in a prefix cache that evicts the least recently used. Blocks are those of the simulated engine
(`workers.engines.sim.blocks`). While nothing but decoding happens, many steps are taken as one *run*, whose duration the
timing model knows in closed form; a request that arrives cuts the run at its next step. `steps_max=1` walks step by step.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..bus.messages import KvEvent
from ..workers.engines.sim.blocks import BlockPool
from .timing import Quadratic, StepLoad, Timing

Kind = Literal["local", "prefill", "remote"]
"""Prompt and answer here; the prompt alone; the answer alone, after KV that comes over a link."""

GAP_BUCKETS_PER_E = 100
"""Gaps between tokens are counted in buckets of 1 %: `bucket = round(100 ln(seconds))`."""


@dataclass(slots=True, eq=False)
class Work:
    """One request on one engine. The chain covers the whole blocks of prompt and answer."""

    key: int  # the caller's
    kind: Kind
    prompt_tokens: int
    output_tokens: int
    chain: Sequence[int]
    computed: int = 0  # leading tokens that have their KV
    made: int = 0
    cached_tokens: int = 0  # when it was admitted first
    preemptions: int = 0
    first_s: float | None = None
    blocks: list[int] = field(default_factory=list)
    stored: int = 0  # leading blocks that were offered to the prefix cache
    has_landed: bool = False  # remote: its KV is there
    last_token_s: float | None = None  # while it is out of the batch between two tokens

    @property
    def target(self) -> int:
        """Tokens that must have their KV before the next one can be made."""
        return self.prompt_tokens + self.made


class Listener(Protocol):
    """What the engine tells, at the end of the step in which it happened."""

    def on_allocated(self, work: Work, now: float) -> None:
        """Remote work has its blocks: KV may come."""

    def on_chunk(self, work: Work, tokens: int, start_s: float, end_s: float) -> None:
        """A prefill work's next prompt tokens were computed in a step that lasted from start to end."""

    def on_first(self, work: Work, now: float) -> None:
        """The first token was made."""

    def on_done(self, work: Work, now: float) -> None:
        """The last token was made, or (prefill) the prompt is complete: its blocks are held until `release`."""


@dataclass(slots=True)
class _Run:
    """What is being computed: one step with prompt parts, or `steps` steps that only decode."""

    start_s: float
    steps: int
    end_s: float
    decoding: list[Work]
    parts: list[tuple[Work, int]]
    formula: Quadratic | None


class EngineModel:
    """Call `submit`, `landed`, `release` when they happen, and `finish_run` at `next_s`."""

    def __init__(
        self,
        timing: Timing,
        listener: Listener,
        *,
        kv_blocks: int,
        block_tokens: int,
        slots: int = 256,
        max_batched_tokens: int = 8192,
        steps_max: int = 1 << 30,
    ) -> None:
        self.pool = BlockPool(kv_blocks)
        self.kv_blocks = kv_blocks
        self.block_tokens = block_tokens
        self.waiting: deque[Work] = deque()
        self.expecting: dict[Work, None] = {}  # remote work that holds blocks and waits for its KV
        self.prefilling: list[Work] = []  # running, in the order of their admission
        self.decoding: list[Work] = []
        self.next_s: float | None = None  # end of the run, or when an idle engine begins one; None: idle
        self.busy_s = 0.0
        self.steps = 0
        self.preemptions = 0
        self.gaps: Counter[int] = Counter()  # bucket -> tokens that came so long after the one before
        self._timing = timing
        self._listener = listener
        self._slots = slots
        self._budget = max_batched_tokens
        self._steps_max = steps_max
        self._landed: list[Work] = []
        self._run: _Run | None = None
        self._is_closed = False  # to those who wait, for this step

    # ---- what happens

    def submit(self, work: Work, now: float) -> None:
        """A request arrives. Its prompt and answer must fit the cache."""
        assert -(-(work.prompt_tokens + work.output_tokens) // self.block_tokens) <= self.kv_blocks
        self.waiting.append(work)
        self._wake(now)

    def landed(self, work: Work, now: float) -> None:
        """The KV of remote work is complete: all of the prompt but the last token, which every decode engine computes itself."""
        del self.expecting[work]
        work.computed = work.prompt_tokens - 1
        work.has_landed = True
        self._store(work)
        self._landed.append(work)
        self._wake(now)

    def release(self, work: Work, now: float) -> None:
        """A prefill work's KV has been sent: nobody reads its blocks any more."""
        self._free(work)
        self._wake(now)

    def finish_run(self) -> None:
        """The run is over, if there was one: its effects happen, and the next one begins."""
        now = self.next_s
        assert now is not None
        if self._run is not None:
            self._settle(now)
        self._begin(now)

    def sync(self, now: float) -> None:
        """Let the steps that are over have their effects, so that what can be seen is what it is at `now`."""
        run = self._run
        if run is None or run.formula is None or run.steps == 1:
            return
        left = run.steps - run.formula.steps_done(now - run.start_s, run.steps)
        if 0 < left < run.steps:
            self._cut(run, run.steps - left)
            self._settle(run.end_s)
            self._decode_on(run.end_s, left)  # Nobody joins here who came during the step that is under way.

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self.prefilling) + len(self.decoding)

    def take_events(self) -> list[KvEvent]:
        """What changed in the prefix cache since the last call."""
        return self.pool.take_events()

    # ---- the run

    def _wake(self, now: float) -> None:
        run = self._run
        if run is None:
            self.next_s = now  # Whatever else comes at this instant is in the first step, too.
        elif run.formula is not None and run.steps > 1:
            steps = run.formula.steps_until(now - run.start_s, run.steps)
            if steps < run.steps:
                self._cut(run, steps)

    def _cut(self, run: _Run, steps: int) -> None:
        assert run.formula is not None
        run.steps = steps
        run.end_s = self.next_s = run.start_s + run.formula.run_s(steps)

    def _begin(self, now: float) -> None:
        parts = self._schedule(now)
        self._run = self.next_s = None
        if parts:
            duration_s = self._timing.step_s(self._load_of(parts))
            self._run = _Run(now, 1, now + duration_s, self.decoding[:], parts, None)
            self.next_s = self._run.end_s
        elif self.decoding:
            self._decode_on(now, self._steps_alone())

    def _decode_on(self, now: float, steps: int) -> None:
        formula = self._timing.decode_run(len(self.decoding), self._kv_tokens())
        self._run = _Run(now, steps, now + formula.run_s(steps), self.decoding[:], [], formula)
        self.next_s = self._run.end_s

    def _kv_tokens(self) -> int:
        return sum([work.prompt_tokens + work.made for work in self.decoding])

    def _load_of(self, parts: list[tuple[Work, int]]) -> StepLoad:
        pairs = sum(tokens * work.computed + tokens * (tokens + 1) // 2 for work, tokens in parts)
        return StepLoad(sum(tokens for _, tokens in parts), pairs, len(self.decoding), self._kv_tokens())

    def _steps_alone(self) -> int:
        """Steps until a request makes its first or last token or blocks run out, at least 1."""
        if self._is_closed or any(work.first_s is None for work in self.decoding):
            return 1
        steps = min(self._steps_max, min([work.output_tokens - work.made for work in self.decoding]))
        free = self.pool.free_blocks
        if len(self.decoding) * -(-steps // self.block_tokens) <= free:
            return steps
        low, high = 1, steps  # One step has its blocks: `_schedule` has made room for it.
        while low < high:
            middle = (low + high + 1) // 2
            if self._blocks_for(middle) <= free:
                low = middle
            else:
                high = middle - 1
        return low

    def _blocks_for(self, steps: int) -> int:
        size = self.block_tokens
        return sum([max(0, -(-(work.computed + steps) // size) - len(work.blocks)) for work in self.decoding])

    def _settle(self, now: float) -> None:
        run = self._run
        assert run is not None
        duration_s, steps = now - run.start_s, run.steps
        self.busy_s += duration_s
        self.steps += steps
        if run.formula is not None:
            self._allocate_run(run.decoding, steps)
        # A preemption happens between two runs, so whoever decoded at the start still does.
        is_over, firsts = False, 0
        for work in run.decoding:
            work.computed += steps
            work.made += steps
            if work.first_s is None:
                firsts += 1
                self._note_token(work, now)
            is_over = is_over or work.made >= work.output_tokens
        self._add_gaps(duration_s / steps, len(run.decoding) * steps - firsts)
        if is_over:
            self._end_decoding(now)
        for work, tokens in run.parts:
            self._end_part(work, tokens, run.start_s, now)

    def _allocate_run(self, decoding: list[Work], steps: int) -> None:
        """Blocks for the tokens of a run; `_steps_alone` has seen to it that there are enough."""
        size = self.block_tokens
        for work in decoding:
            need = -(-(work.computed + steps) // size) - len(work.blocks)
            if need > 0:
                fresh = self.pool.allocate((), need)
                assert fresh is not None
                work.blocks += fresh

    def _add_gaps(self, gap_s: float, tokens: int) -> None:
        if tokens:
            self.gaps[round(GAP_BUCKETS_PER_E * math.log(max(gap_s, 1e-9)))] += tokens

    def _note_token(self, work: Work, now: float) -> None:
        """The first token, or the first after a preemption."""
        if work.first_s is None:
            work.first_s = now
            self._listener.on_first(work, now)
        elif work.last_token_s is not None:
            self._add_gaps(now - work.last_token_s, 1)
        work.last_token_s = None

    def _end_decoding(self, now: float) -> None:
        over = [work for work in self.decoding if work.made >= work.output_tokens]
        self.decoding = [work for work in self.decoding if work.made < work.output_tokens]
        for work in over:
            self._free(work)
            self._listener.on_done(work, now)

    def _end_part(self, work: Work, tokens: int, start_s: float, now: float) -> None:
        work.computed += tokens
        self._store(work)
        if work.kind == "prefill":
            self._listener.on_chunk(work, tokens, start_s, now)
        if work.computed < work.target:
            return
        self.prefilling.remove(work)
        if work.kind == "prefill":
            self._listener.on_done(work, now)
            return
        work.made += 1
        self._note_token(work, now)
        if work.made >= work.output_tokens:
            self._free(work)
            self._listener.on_done(work, now)
        else:
            self.decoding.append(work)

    # ---- scheduling

    def _schedule(self, now: float) -> list[tuple[Work, int]]:
        """Who is in the next step: `self.decoding`, and the returned parts of prompts."""
        preempted = self.preemptions
        size = self.block_tokens
        for work in self.decoding[:]:
            if work.computed == len(work.blocks) * size and work.blocks:
                self._extend(work, work.computed + 1, now)
        budget = self._budget - len(self.decoding)
        parts: list[tuple[Work, int]] = []
        for work in self.prefilling[:]:
            tokens = min(work.target - work.computed, budget)
            if tokens > 0 and work.blocks and self._extend(work, work.computed + tokens, now):
                parts.append((work, tokens))
                budget -= tokens
        if self.preemptions > preempted:
            parts = [(work, tokens) for work, tokens in parts if work.blocks]
        # Nobody is admitted into a step that had to preempt, unless it would be empty; the next step may.
        self._is_closed = self.preemptions > preempted and bool(parts or self.decoding)
        if not self._is_closed:
            self._admit(parts, budget, now)
        return parts

    def _admit(self, parts: list[tuple[Work, int]], budget: int, now: float) -> None:
        while self._landed and self.running < self._slots and budget > 0:
            self.decoding.append(self._landed.pop(0))
            budget -= 1
        while self.waiting and budget > 0:
            work = self.waiting[0]
            is_remote = work.kind == "remote" and not work.has_landed
            if not is_remote and self.running >= self._slots:
                return
            hits = self.pool.hit(work.chain[: (work.target - 1) // self.block_tokens])
            computed = len(hits) * self.block_tokens
            tokens = work.target - computed if is_remote else min(work.target - computed, budget)
            blocks = self.pool.allocate(hits, -(-(computed + tokens) // self.block_tokens) - len(hits))
            if blocks is None:
                return
            self.waiting.popleft()
            work.blocks, work.stored, work.computed = blocks, len(hits), computed
            if work.preemptions == 0:
                work.cached_tokens = computed
            if is_remote:
                self.expecting[work] = None
                self._listener.on_allocated(work, now)
            else:
                self.prefilling.append(work)
                parts.append((work, tokens))
                budget -= tokens

    def _extend(self, work: Work, tokens: int, now: float) -> bool:
        """Blocks for so many leading tokens; the youngest are preempted for them, in the end the work itself: False."""
        need = -(-tokens // self.block_tokens) - len(work.blocks)
        while need > 0:
            fresh = self.pool.allocate((), need)
            if fresh is not None:
                work.blocks += fresh
                return True
            youngest = self.prefilling[-1] if self.prefilling else self.decoding[-1]
            self._preempt(youngest, now)
            if youngest is work:
                return False
        return True

    def _preempt(self, work: Work, now: float) -> None:
        (self.prefilling if work in self.prefilling else self.decoding).remove(work)
        self._free(work)
        if work.made and work.last_token_s is None:
            work.last_token_s = now
        work.computed = 0
        work.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(work)

    # ---- blocks

    def _store(self, work: Work) -> None:
        """Offer newly complete blocks to the prefix cache."""
        first, end = work.stored, min(work.computed // self.block_tokens, len(work.chain))
        if end > first:
            parent = work.chain[first - 1] if first else None
            self.pool.store(work.blocks[first:end], work.chain[first:end], parent)
            work.stored = end

    def _free(self, work: Work) -> None:
        """An answer's blocks enter the prefix cache here, when it lets go of them."""
        self._store(work)
        blocks, work.blocks = work.blocks, []
        self.pool.release(blocks)
