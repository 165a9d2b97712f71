"""What a step moves, decided next to vLLM's scheduler: plain bookkeeping without vLLM, clock or I/O.

A request carries its part of a hand-off in `kv_transfer_params` (`decode_params`, `prefill_params`). Blocks are those of
the one KV group; logical block i of a prompt is entry i of the request's block table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ....transport.base import Chunk, HandoffKey

Params = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Receive:
    """Decode: these blocks wait for KV."""

    request_id: str
    token: bytes
    attempt: int
    first_block: int
    block_ids: tuple[int, ...]
    deadline_s: float  # of the machine's monotonic clock


@dataclass(frozen=True, slots=True)
class Open:
    """Prefill: the first step of a prompt whose KV goes away."""

    request_id: str
    key: HandoffKey
    addresses: tuple[str, ...]
    decode_epoch: int
    fingerprint: str
    blocks: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Push:
    """Prefill: blocks that this step completes."""

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
    preempted: list[HandoffKey] = field(default_factory=list)  # their blocks are overwritten in this very step


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part of a step, as vLLM's scheduler tells it."""

    request_id: str
    block_ids: tuple[int, ...]  # all blocks when `is_fresh`, else the new ones
    is_fresh: bool
    computed_tokens: int  # before this step
    scheduled_tokens: int


def decode_params(task: int, token: bytes | None, attempt: int, deadline_s: float) -> dict[str, object]:
    """`kv_transfer_params` of a decode request; without a token it only reports its end."""
    params: dict[str, object] = {"task": task}
    if token is not None:
        params |= {"do_remote_prefill": True, "token": token.hex(), "attempt": attempt, "deadline_s": deadline_s}
    return params


def prefill_params(task: int, order: Open) -> dict[str, object]:
    """`kv_transfer_params` of a prefill request; `order.request_id` and `order.blocks` are vLLM's to fill in."""
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
    }


@dataclass(slots=True)
class _Send:
    """A prompt on its way out."""

    order: Open
    prompt_tokens: int
    block_ids: list[int] = field(default_factory=list)
    sent_blocks: int = 0
    is_open: bool = False
    is_over: bool = False  # the last chunk was planned, or there will be none


class SchedulerCore:
    """One instance beside the scheduler; its calls come in the order of vLLM's connector hooks."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._plan = StepPlan()
        self._expected: dict[str, bytes] = {}  # decode requests that once waited for KV -> token
        self._waiting: set[str] = set()  # those that wait now
        self._sends: dict[str, _Send] = {}
        self._task_of: dict[str, int] = {}  # requests that ended but still hold their blocks

    def external_tokens(self, request_id: str, params: Params, prompt_tokens: int, computed_tokens: int) -> int:
        """How many prompt tokens come from elsewhere; 0: none. Called often, changes nothing."""
        if not params.get("do_remote_prefill") or request_id in self._expected:
            return 0  # The second time the load has failed or the request was preempted: compute it here.
        return prompt_tokens - computed_tokens

    def allocated(
        self, request_id: str, params: Params, *, prompt_tokens: int, external_tokens: int, block_ids: Sequence[int]
    ) -> None:
        """Blocks are reserved. For a load `block_ids` are all of the prompt's; the call comes again when it is scheduled."""
        if params.get("do_remote_decode"):
            self._sends.setdefault(request_id, _Send(self._order(request_id, params, prompt_tokens), prompt_tokens))
        elif params.get("do_remote_prefill") and external_tokens > 0:
            first_block = (prompt_tokens - external_tokens) // self._block_tokens
            wanted = tuple(block_ids[first_block : self._blocks(prompt_tokens)])
            token, attempt, deadline_s = _token(params), _int(params, "attempt"), _float(params, "deadline_s")
            self._plan.receives.append(Receive(request_id, token, attempt, first_block, wanted, deadline_s))
            self._expected[request_id] = token
            self._waiting.add(request_id)

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
            send.block_ids = list(part.block_ids)
        else:
            send.block_ids += part.block_ids
        if not send.is_open:
            plan.opens.append(send.order)
            send.is_open = True
        end_token = min(part.computed_tokens + part.scheduled_tokens, send.prompt_tokens)
        is_last = end_token == send.prompt_tokens
        # A block that is only partly filled waits for its last chunk, so each block is sent once.
        end_block = send.order.blocks if is_last else end_token // self._block_tokens
        if end_block > send.sent_blocks:
            chunk = Chunk(send.sent_blocks, tuple(send.block_ids[send.sent_blocks : end_block]), is_last)
            plan.pushes.append(Push(send.order.key, chunk))
            send.sent_blocks = end_block
        send.is_over = is_last

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

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _order(self, request_id: str, params: Params, prompt_tokens: int) -> Open:
        addresses = params["addresses"]
        assert isinstance(addresses, list | tuple)
        return Open(
            request_id,
            HandoffKey(_token(params), _int(params, "attempt"), _int(params, "delivery")),
            tuple(str(address) for address in addresses),
            _int(params, "decode_epoch"),
            str(params["fingerprint"]),
            self._blocks(prompt_tokens),
            _float(params, "deadline_s"),
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
