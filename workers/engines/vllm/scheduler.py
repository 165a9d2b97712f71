"""What a step moves, decided next to vLLM's scheduler: plain bookkeeping without vLLM, clock or I/O.

A request carries its part of a hand-off in `kv_transfer_params` (`decode_params`, `prefill_params`). A block table has a row
for each KV group; logical block i of a prompt is entry i of the row, and NULL_BLOCK where the group does not keep it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ....transport.base import Chunk, GroupBlocks, HandoffKey
from .kv_groups import KvGroups

Params = Mapping[str, object]
NULL_BLOCK = 0
"""vLLM's first block belongs to nobody; it stands for blocks that lie before a group's window."""
BlockRows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Receive:
    """Decode: these blocks wait for KV, or none does and whoever brings it may go."""

    request_id: str
    token: bytes
    attempt: int
    groups: tuple[GroupBlocks, ...]
    first_token: int  # what lies before is in this engine's cache
    end_token: int
    deadline_s: float  # of the machine's monotonic clock
    is_waiting: bool = True  # the request runs when it is reported as received; else it runs already
    prefill_ranks: int = 1  # that bring it


@dataclass(frozen=True, slots=True)
class Open:
    """Prefill: the first step of a prompt whose KV goes away."""

    request_id: str
    key: HandoffKey
    addresses: tuple[str, ...]
    decode_epoch: int
    fingerprint: str
    tokens: int  # of the prompt
    deadline_s: float
    decode_step_tokens: int  # `KvGroups.step_tokens` of the decode engine; 0: as here
    decode_ranks: int = 1  # that `addresses` are of


@dataclass(frozen=True, slots=True)
class Push:
    """Prefill: tokens that this step completes in whole blocks."""

    key: HandoffKey
    chunk: Chunk


@dataclass(slots=True)
class StepPlan:
    """From the scheduler side to the worker side, each step."""

    receives: list[Receive] = field(default_factory=list)
    cancels: list[bytes] = field(default_factory=list)
    opens: list[Open] = field(default_factory=list)
    pushes: list[Push] = field(default_factory=list)
    aborts: list[tuple[HandoffKey, str]] = field(default_factory=list)
    preempted: list[HandoffKey] = field(default_factory=list)  # blocks of theirs are overwritten in this very step


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step, as vLLM's scheduler tells it."""

    request_id: str
    block_ids: BlockRows  # all blocks when `is_fresh`, else the new ones; may then be ()
    is_fresh: bool
    computed_tokens: int  # before this step
    scheduled_tokens: int


def decode_params(
    task: int, token: bytes | None, attempt: int, deadline_s: float, prefill_ranks: int = 1
) -> dict[str, object]:
    """`kv_transfer_params` of a decode request; without a token it only reports its end."""
    if token is None:
        return {"task": task}
    return {
        "task": task,
        "do_remote_prefill": True,
        "token": token.hex(),
        "attempt": attempt,
        "deadline_s": deadline_s,
        "prefill_ranks": prefill_ranks,
    }


def prefill_params(task: int, order: Open) -> dict[str, object]:
    """`kv_transfer_params` of a prefill request; `order.request_id` and `order.tokens` are vLLM's to fill in."""
    return {
        "task": task,
        "do_remote_decode": True,
        "token": order.key.token.hex(),
        "attempt": order.key.attempt,
        "delivery": order.key.delivery,
        "addresses": list(order.addresses),
        "decode_epoch": order.decode_epoch,
        "fingerprint": order.fingerprint,
        "deadline_s": order.deadline_s,
        "decode_step_tokens": order.decode_step_tokens,
        "decode_ranks": order.decode_ranks,
    }


@dataclass(slots=True)
class _Send:
    """A prompt on its way out."""

    order: Open
    block_ids: list[list[int]] = field(default_factory=list)  # of each group
    sent_tokens: int = 0
    is_open: bool = False
    is_over: bool = False  # the last chunk was planned, or there will be none


class SchedulerCore:
    """One instance beside the scheduler; its calls come in the order of vLLM's connector hooks."""

    def __init__(self, groups: KvGroups) -> None:
        self._groups = groups
        self._plan = StepPlan()
        self._expected: dict[str, bytes] = {}  # decode requests that once waited for KV, or had it all -> token
        self._waiting: set[str] = set()  # those that wait now
        self._sends: dict[str, _Send] = {}
        self._task_of: dict[str, int] = {}  # requests that ended but still hold their blocks

    def external_tokens(self, request_id: str, params: Params, prompt_tokens: int, computed_tokens: int) -> int:
        """How many prompt tokens come from elsewhere; 0: none. Called often, changes nothing."""
        if not params.get("do_remote_prefill") or request_id in self._expected:
            return 0  # The second time the load has failed or the request was preempted: compute it here.
        return max(0, self._groups.wanted_tokens(prompt_tokens) - computed_tokens)

    def allocated(
        self,
        request_id: str,
        params: Params,
        *,
        prompt_tokens: int,
        external_tokens: int,
        block_ids: Sequence[Sequence[int]],
    ) -> None:
        """Blocks are reserved. For a load `block_ids` are all of the prompt's; the call comes again when it is scheduled."""
        if params.get("do_remote_decode"):
            self._sends.setdefault(request_id, _Send(self._order(request_id, params, prompt_tokens)))
        elif params.get("do_remote_prefill") and request_id not in self._expected:
            self._expect(request_id, params, prompt_tokens, external_tokens, block_ids)

    def _expect(
        self,
        request_id: str,
        params: Params,
        prompt_tokens: int,
        external_tokens: int,
        block_ids: Sequence[Sequence[int]],
    ) -> None:
        end_token = self._groups.wanted_tokens(prompt_tokens)
        if external_tokens == 0:
            # Everything is here, or nothing can be used: the prefill side is let go by a hand-off of nothing.
            end_token -= end_token % self._groups.step_tokens
        first_token = end_token - external_tokens
        wanted = tuple(self._blocks_between(group, row, first_token, end_token) for group, row in enumerate(block_ids))
        token, attempt, deadline_s = _token(params), _int(params, "attempt"), _float(params, "deadline_s")
        is_waiting, ranks = external_tokens > 0, _int(params, "prefill_ranks")
        self._plan.receives.append(
            Receive(request_id, token, attempt, wanted, first_token, end_token, deadline_s, is_waiting, ranks)
        )
        self._expected[request_id] = token
        if is_waiting:
            self._waiting.add(request_id)

    def _blocks_between(self, group: int, row: Sequence[int], first_token: int, end_token: int) -> GroupBlocks:
        """The blocks of this row for those tokens; what lies before the group's window is left out."""
        block_tokens = self._groups.block_tokens[group]
        end_block = -(-end_token // block_tokens)
        first_block = min(first_token // block_tokens, end_block)
        while first_block < end_block and row[first_block] == NULL_BLOCK:
            first_block += 1
        block_ids = tuple(row[first_block:end_block])
        assert NULL_BLOCK not in block_ids, f"group {group} misses blocks within its window: {block_ids}"
        assert len(block_ids) == end_block - first_block, f"group {group} has {len(row)} blocks for {end_token} tokens"
        return GroupBlocks(first_block, block_ids)

    def step(self, scheduled: Iterable[Scheduled], preempted: Iterable[str] = ()) -> StepPlan:
        """What the worker side does in this step."""
        plan, self._plan = self._plan, StepPlan()
        for request_id in preempted:
            send = self._sends.get(request_id)
            if send and send.is_open:
                # Its blocks now belong to someone else; a hand-off of several tries is the router's business.
                plan.preempted.append(send.order.key)
                send.is_over = True
        for part in scheduled:
            send = self._sends.get(part.request_id)
            if send and not send.is_over:
                self._push(plan, send, part)
        return plan

    def _push(self, plan: StepPlan, send: _Send, part: Scheduled) -> None:
        if part.is_fresh:
            send.block_ids = [list(row) for row in part.block_ids]
        else:
            for row, new_blocks in zip(send.block_ids, part.block_ids, strict=False):  # () when nothing is new
                row += new_blocks
        if not send.is_open:
            plan.opens.append(send.order)
            send.is_open = True
        elif self._took_wanted_blocks(send.order, part.computed_tokens):
            plan.preempted.append(send.order.key)
            send.is_over = True
            return
        end_token = min(part.computed_tokens + part.scheduled_tokens, send.order.tokens)
        send.is_over = end_token == send.order.tokens
        if not send.is_over:
            # A block that is only partly filled waits for its last chunk, so each block is sent once.
            end_token -= end_token % self._groups.step_tokens
        if end_token > send.sent_tokens:
            rows = tuple(
                self._blocks_between(group, row, send.sent_tokens, end_token)
                for group, row in enumerate(send.block_ids)
            )
            plan.pushes.append(Push(send.order.key, Chunk(send.sent_tokens, end_token, rows)))
            send.sent_tokens = end_token

    def _took_wanted_blocks(self, order: Open, computed_tokens: int) -> bool:
        """vLLM took blocks back, before this step, that decode wants and that may not have been sent yet.

        It does not when both sides have blocks of one size: decode's first wanted token is then not before the prompt's
        own window, and a step before the prompt's end looks further back.
        """
        for group, block_tokens in enumerate(self._groups.block_tokens):
            kept_token = self._groups.first_kept_token(group, computed_tokens) // block_tokens * block_tokens
            step_tokens = order.decode_step_tokens or block_tokens
            if kept_token > self._groups.first_kept_token(group, order.tokens) // step_tokens * step_tokens:
                return True
        return False

    def finished(self, request_id: str, params: Params) -> tuple[bool, int | None]:
        """The request has ended, in whatever way: (its blocks stay until the worker side is done, task that is over now)."""
        task = _int(params, "task") if "task" in params else None
        token = self._expected.pop(request_id, None)
        send = self._sends.pop(request_id, None)
        is_held = False
        if request_id in self._waiting and token is not None:
            # vLLM itself keeps the blocks of a request that waits for KV until it is reported as received.
            self._plan.cancels.append(token)
            self._waiting.discard(request_id)
            is_held = True
        elif send and send.is_open:
            if not send.is_over:
                self._plan.aborts.append((send.order.key, "aborted"))
            is_held = True
        if is_held and task is not None:
            self._task_of[request_id] = task
        return bool(send and send.is_open), None if is_held else task

    def moved(self, request_ids: Iterable[str]) -> list[int]:
        """The worker side is done with these requests' blocks; returns the tasks that are over now."""
        tasks = []
        for request_id in request_ids:
            self._waiting.discard(request_id)
            task = self._task_of.pop(request_id, None)
            if task is not None:
                tasks.append(task)
        return tasks

    @property
    def is_idle(self) -> bool:
        """Nothing of any request is kept."""
        return not (self._expected or self._waiting or self._sends or self._task_of)

    def _order(self, request_id: str, params: Params, prompt_tokens: int) -> Open:
        addresses = params["addresses"]
        assert isinstance(addresses, list | tuple)
        return Open(
            request_id,
            HandoffKey(_token(params), _int(params, "attempt"), _int(params, "delivery")),
            tuple(str(address) for address in addresses),
            _int(params, "decode_epoch"),
            str(params["fingerprint"]),
            prompt_tokens,
            _float(params, "deadline_s"),
            _int(params, "decode_step_tokens"),
            _int(params, "decode_ranks"),
        )


def _token(params: Params) -> bytes:
    return bytes.fromhex(str(params["token"]))


def _int(params: Params, name: str) -> int:
    value = params[name]
    assert isinstance(value, int)
    return value


def _float(params: Params, name: str) -> float:
    value = params[name]
    assert isinstance(value, int | float)
    return float(value)
