"""What the simulated engine does next: who gets blocks, what a step computes, who makes a token. Like vLLM's, in small.

No time, no loop, no link: `engine.SimEngine` brings those.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from ....bus.messages import FINISH_STOP, TokenLogprob
from ..base import StepOutput
from .blocks import BlockPool
from .kv import SimKv, choose, finish_of, logprob_of, next_states
from .work import DecodeWork, PrefillWork, Work

AnyWork = PrefillWork | DecodeWork


class Scheduler:
    """Every request's place: waiting, or active with a slot and blocks; `on_room` is called when a slot or blocks came free."""

    def __init__(
        self, kv: SimKv, vocabulary: range, *, slots: int, chunk_tokens: int, on_room: Callable[[], None]
    ) -> None:
        self.blocks = BlockPool(kv.blocks)
        self.waiting: deque[AnyWork] = deque()
        self.active: dict[AnyWork, None] = {}
        self.computing: dict[AnyWork, None] = {}  # their prompts, first come first served
        self.running: dict[DecodeWork, None] = {}  # make a token each step, oldest first
        self._kv = kv
        self._vocabulary = vocabulary
        self._slots = slots
        self._chunk_tokens = chunk_tokens
        self._on_room = on_room

    def admit(self) -> AnyWork | None:
        """Give the first who waits a slot and all blocks of its prompt; None when there is nobody or no room.

        Nobody is admitted before a step has tokens left for him, as in vLLM: until then he would hold blocks that the prefix
        cache can use, and miss the hits on prompts that are computed before his.
        """
        if not self.waiting or len(self.active) >= self._slots or self._budget <= 0:
            return None
        work = self.waiting[0]
        # A decode engine computes at least the last prompt token itself, like vLLM.
        reusable = (len(work.tokens) - isinstance(work, DecodeWork)) // work.block_tokens
        work.extend_hashes(reusable)
        hits = self.blocks.hit(work.hashes[:reusable])
        blocks = self.blocks.allocate(hits, work.blocks_needed - len(hits))
        if blocks is None:
            return None
        self.waiting.popleft()
        work.blocks = blocks
        work.cached_blocks = work.stored_blocks = len(hits)
        work.skip_to(len(hits) * work.block_tokens)
        self.active[work] = None
        return work

    @property
    def _budget(self) -> int:
        """Tokens that the next step can still compute."""
        uncomputed = sum(len(work.tokens) - work.computed for work in self.computing)
        return self._chunk_tokens - len(self.running) - uncomputed

    def plan(self) -> list[tuple[AnyWork, int]]:
        """Whose prompt is computed in this step, and up to which position: whole blocks within the token budget."""
        budget = self._chunk_tokens
        parts: list[tuple[AnyWork, int]] = []
        for work in self.computing:
            end = min(len(work.tokens), work.computed + budget)
            if end < len(work.tokens):
                end -= end % work.block_tokens
                if end <= work.computed:
                    if parts:
                        break
                    end = min(len(work.tokens), work.computed + work.block_tokens)
            parts.append((work, end))
            budget -= end - work.computed
            if budget <= 0:
                break
        return parts

    def end(self, work: AnyWork) -> None:
        """Give the slot back."""
        del self.active[work]
        self.computing.pop(work, None)
        if isinstance(work, DecodeWork):
            self.running.pop(work, None)
        self._on_room()

    def free(self, work: Work) -> None:
        blocks, work.blocks = work.blocks, []
        self.blocks.release(blocks)
        self._on_room()

    def store(self, work: Work) -> None:
        """Offer newly complete blocks to the prefix cache."""
        first, end = work.stored_blocks, work.whole_blocks
        if end > first:
            work.extend_hashes(end)
            self.blocks.store(work.blocks[first:end], work.hashes[first:end], work.hashes[first - 1] if first else None)
            work.stored_blocks = end

    def start_decoding(self, work: DecodeWork) -> None:
        work.answer = self._kv.read(work.blocks, work.computed)
        self.running[work] = None

    def make_tokens(self, works: list[DecodeWork]) -> None:
        """One decode step of all of them at once."""
        pending = [work for work in works if work.has_pending_token]
        self._extend([work for work in pending if self._make_room(work)])
        for work in works:
            if work in self.running and not work.has_pending_token and not work.done.done():
                self._make_token(work)

    def _make_room(self, work: DecodeWork) -> bool:
        """A block for the next position; the youngest requests are preempted for it, in the end this one itself."""
        while work.blocks and work.computed // work.block_tokens == len(work.blocks):
            fresh = self.blocks.allocate([], 1)
            if fresh is not None:
                work.blocks += fresh
            else:
                self._preempt(next(reversed(self.running)))
        return bool(work.blocks)

    def _preempt(self, work: DecodeWork) -> None:
        self.end(work)
        self.free(work)
        work.rewind()
        self.waiting.appendleft(work)

    def _extend(self, works: list[DecodeWork]) -> None:
        """Compute the KV of each one's newest token and read it."""
        works = [work for work in works if work.blocks]
        if not works:
            return
        offsets = [work.computed % work.block_tokens for work in works]
        blocks = [work.blocks[work.computed // work.block_tokens] for work in works]
        states = [next_states(work.state, work.tokens[-1:])[0] for work in works]
        answers = self._kv.append(blocks, offsets, states, [work.answer for work in works])
        for work, state, answer, offset in zip(works, states, answers.tolist(), offsets, strict=True):
            work.state = state
            work.answer = answer
            work.computed += 1
            if offset == work.block_tokens - 1:
                self.store(work)

    def _make_token(self, work: DecodeWork) -> None:
        sampling = work.task.sampling
        is_first, work.made = work.made == 0, work.made + 1
        if work.made == work.tokens_max:
            work.answer = self._kv.read(work.blocks, work.computed)  # A write that came late shows at the latest here.
        token_id = choose(work.answer, sampling, self._vocabulary)
        finish = finish_of(token_id, work.made, work.tokens_max, sampling)
        work.tokens.append(token_id)
        logprobs: tuple[TokenLogprob, ...] = ()
        if sampling.logprobs is not None:
            logprobs = (logprob_of(work.answer, token_id, sampling.logprobs, self._vocabulary),)
        stop_token = token_id if finish == FINISH_STOP else None
        if is_first:
            output = StepOutput([token_id], finish, logprobs, stop_token, work.computed_here, work.cached_tokens)
        else:
            output = StepOutput([token_id], finish, logprobs, stop_token)
        if finish:
            work.is_over = True
            self.end(work)
            self.free(work)
            work.done.set_result(None)
        work.on_step(output)
