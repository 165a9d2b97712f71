"""What a policy is, what it sees, and how one is found by name.

A policy is asked once for each request (and again when a worker refuses it). It is synchronous, pure and total: equal
inputs give equal choices. Time and randomness are arguments, so that a recorded run can be replayed exactly.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast, runtime_checkable

import msgspec

from ...bus.ids import RequestId, WorkerId

Plan = Literal["remote", "local"]
"""`remote`: a prefill worker computes the prompt and streams its KV over; `local`: the decode worker computes it itself."""

IndexMode = Literal["exact", "catching_up", "approximate"]
"""How far a worker's `hit_blocks` can be trusted: fed by its events without a gap, behind them, or guessed from what was sent."""

ENTRY_POINTS = "hocket.policies"


class PrefillView(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What a policy knows of one live prefill worker that could serve the request."""

    worker_id: WorkerId
    fingerprint: str
    block_tokens: int
    slots: int
    hit_blocks: int  # leading blocks of this prompt that are in its prefix cache
    running: int  # as of its last heartbeat, all routers together
    waiting: int
    queued_tokens: int = 0  # prompt tokens of this router's jobs that are meant for it or claimed by it, and not done
    prefill_tokens_per_s: float = 0.0  # measured; 0.0: not known yet


class RequestView(msgspec.Struct, frozen=True):
    """What a policy knows of the request."""

    request_id: RequestId
    model: str
    prompt_tokens: int  # the ISL
    max_tokens: int  # the most it may generate
    prefill_workers: int  # alive and able to serve it
    local_prefill_tokens_max: int  # from the configuration
    tenant: str = ""
    session_id: str = ""  # of the conversation, where the client says so
    first_block: int = 0  # hash of the prompt's first whole block, its tenant in it; 0: the prompt is shorter
    priority: int = 0  # higher goes first
    deadline_s: float = float("inf")  # on the clock of `now`
    prefill: tuple[PrefillView, ...] = ()  # in the order of their ids
    queued_prefill_tokens: int = 0  # prompt tokens of this router's jobs that no prefill worker has claimed

    def default_plan(self, worker: WorkerView) -> Plan:
        """`local` when no prefill worker lives or at most `local_prefill_tokens_max` prompt tokens are not cached on `worker`."""
        uncached_tokens = self.prompt_tokens - worker.hit_blocks * worker.block_tokens
        is_local = not self.prefill_workers or uncached_tokens <= self.local_prefill_tokens_max
        return "local" if is_local and worker.can_prefill_locally else "remote"


class WorkerView(msgspec.Struct, frozen=True, eq=False, gc=False):
    """What a policy knows of one live decode worker that serves the model."""

    worker_id: WorkerId
    block_tokens: int
    slots: int
    kv_blocks: int
    can_prefill_locally: bool
    hit_blocks: int  # leading blocks of this prompt that are in its prefix cache
    in_flight: int  # requests that routers have placed on it: ours as of now, the others' as they last said
    in_flight_blocks: int  # KV blocks of those, prompt and the most they may generate
    running: int  # as of its last heartbeat, all routers together
    waiting: int
    kv_blocks_free: int
    fingerprint: str = ""
    index_mode: IndexMode = "exact"
    local_prefill_tokens: int = (
        0  # uncached prompt tokens of this router's requests that it still has to compute itself
    )
    prefill_tokens_per_s: float = 0.0  # measured; 0.0: not known yet
    link_bytes_per_s: float = 0.0  # measured between a prefill worker and this one; 0.0: not known

    @property
    def load(self) -> int:
        """Requests it holds: what it last said, or what we know it was given since."""
        held, in_flight = self.running + self.waiting, self.in_flight
        return held if held > in_flight else in_flight  # Half the time of `max`, asked a few times for each worker.


@dataclass(frozen=True, slots=True)
class Choice:
    """Where the request goes."""

    worker_id: WorkerId
    plan: Plan | None = None  # None: RequestView.default_plan of that worker
    why: str = ""  # one line for the trace: "prefix hit 12 of 16 blocks, 3 running"
    lane: WorkerId | None = None  # prefill worker that should have the job first; None: whichever is free
    costs: Mapping[WorkerId, Mapping[str, float]] = field(
        default_factory=dict
    )  # each candidate's terms, for the receipt
    ttft_s: float | None = None  # predicted, where the policy predicts
    itl_s: float | None = None  # predicted mean gap between its tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; times in seconds."""

    request_id: RequestId
    worker_id: WorkerId
    plan: Plan
    prefill_worker: WorkerId | None  # that computed the prompt, where known
    prompt_tokens: int
    hit_blocks: int  # predicted on `worker_id` when it was chosen
    cached_tokens: int | None  # that the decode engine reported; None: it did not
    ttft_s: float | None  # from the choice; None: no token came
    itl_s: float | None  # mean gap between tokens; None: less than two came
    output_tokens: int
    running: int  # requests on the worker when it was chosen
    predicted_ttft_s: float | None = None
    predicted_itl_s: float | None = None


class Policy(Protocol):
    """Sync, pure, total: equal inputs give equal choices."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        """Choose one of `workers` (never empty, always in the same order). `now` is monotonic seconds."""


@runtime_checkable
class ObservingPolicy(Policy, Protocol):
    """A policy that learns: it is told how each request ended that any policy placed."""

    def observe(self, outcome: Outcome, now: float) -> None:
        """Cheap: called on the token path, once for each request."""


class PolicyError(ValueError):
    """A policy that cannot be loaded; the text says which and why."""


def load_policy(name: str) -> Policy:
    """The policy called `name`: an installed one, `module:Class`, or `path/to/file.py:Class`. Raises PolicyError.

    Its options follow a question mark: `kv?temperature=0.5&hit_weight=2`. They are keyword arguments of the class, numbers,
    booleans or texts as it annotates them.
    """
    place, _, options = name.partition("?")
    target, colon, class_name = place.rpartition(":")
    try:
        if not colon:
            factory = _installed(place)
        elif target.endswith(".py"):
            factory = _class_in(_module_from_file(Path(target)), class_name)
        else:
            factory = _class_in(importlib.import_module(target), class_name)
        policy = factory(**_options(factory, options))
    except PolicyError:
        raise
    except Exception as error:  # A user's module may raise anything while it is imported or built.
        raise PolicyError(f"policy {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(getattr(policy, "pick", None)):
        raise PolicyError(f"policy {name!r} has no method pick(request, workers, now, rng)")
    return policy


def _installed(name: str) -> Callable[..., Policy]:
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name not in found:
        raise PolicyError(
            f"no policy {name!r}; installed: {', '.join(sorted(found))}; or give module:Class or file.py:Class"
        )
    return cast(Callable[..., Policy], found[name].load())  # An entry point's value has no type; pick is checked above.


def _module_from_file(path: Path) -> object:
    if not path.is_file():
        raise PolicyError(f"no policy file {path}")
    spec = importlib.util.spec_from_file_location(f"hocket_policy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise PolicyError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses in the file look their module up.
    spec.loader.exec_module(module)
    return module


def _class_in(module: object, class_name: str) -> Callable[..., Policy]:
    found = getattr(module, class_name, None)
    if not callable(found):
        raise PolicyError(f"no class {class_name!r} in {getattr(module, '__name__', module)}")
    return cast(Callable[..., Policy], found)  # Any callable may be a factory; its result is checked above.


def _options(factory: Callable[..., Policy], text: str) -> dict[str, object]:
    """What stands behind the question mark, each value as the factory's parameter wants it."""
    known = inspect.signature(factory, eval_str=True).parameters if text else {}
    options: dict[str, object] = {}
    for part in filter(None, text.split("&")):
        key, _, value = part.partition("=")
        if key not in known:
            raise PolicyError(f"no option {key!r}; options: {', '.join(sorted(known)) or 'none'}")
        wanted = known[key].annotation
        try:
            options[key] = msgspec.convert(value, str if wanted is inspect.Parameter.empty else wanted, strict=False)
        except msgspec.ValidationError as error:
            raise PolicyError(f"option {key}={value}: {error}") from error
    return options
