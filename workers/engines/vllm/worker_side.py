"""The connector beside the KV tensors: turns vLLM's worker hooks into calls of the hand-off endpoint, and its ends into ids.

All hooks come on the worker's main thread, in the order in which `WorkerSide` lists them, and none of them waits, except for
`preempted`. The endpoint lives on a thread of its own; what it reports is kept under a lock until the next hook takes it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec

from ....transport.base import Expectation, HandoffKey, ReceiveEnd, SendEnd, SendOrder, SendReleased
from ....transport.endpoint import HandoffEndpoint
from ....transport.errors import TransportError
from ....transport.movers import DevicePool
from ....transport.ranks import RankedEndpoint
from ....transport.registry import open_transports, schemes_for
from ....transport.thread import EndpointThread
from . import versions
from .kv_groups import KvGroups
from .kv_tensors import ModelFacts, pool_of
from .link_probes import ProbeAnswers
from .scheduler import Open, Push, Receive, StepPlan
from .side_channel import AbortSend, ConnectorEnd, Note, ProbeAsked, RankFailed, Ready, ReceiveEnded, SendEnded

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
P = ParamSpec("P")
PREEMPTION_TIMEOUT_S = 10.0  # Twice what the endpoint takes to drop a link that does not answer.
TIMEOUT_MIN_S = 0.05
EARLY_MAX = 256


@dataclass(frozen=True, slots=True)
class HandoffSettings:
    """How this worker takes part in hand-offs; from `kv_connector_extra_config`."""

    is_decode: bool
    transports: str
    bind: str
    worker_id: str
    epoch: int
    staging_bytes: int  # GPU memory for KV on its way, and as much pinned memory where a link needs that
    verifies_blocks: bool  # reads KV back from GPU memory before it counts as landed
    reports_failed_loads: bool  # else the front end ends a request whose KV is lost, and only then it is reported


@dataclass(slots=True)
class StepResults:
    """What is over since the last step, all of one moment."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)  # of `received`: nothing of their load can be used
    bad_blocks: set[int] = field(default_factory=set)


class WorkerSide:
    """One instance in each vLLM worker process, which is one tensor-parallel rank."""

    def __init__(self, settings: HandoffSettings, channel: str) -> None:
        self._settings = settings
        self._thread: EndpointThread | None = None
        self._ranked: RankedEndpoint | None = None
        self._rank = 0
        self._probes: ProbeAnswers | None = None
        self._channel = ConnectorEnd(channel, "worker", self._on_note)
        self._layer_index: dict[str, int] = {}
        self._groups: KvGroups | None = None  # after `register`
        self._device_pool: DevicePool | None = None
        self._pushed_keys: list[HandoffKey] = []  # of this step
        self._layers_done: list[int] = []  # in this step; several KV groups: not in the layout's order
        self._senders: set[str] = set()  # opened and not yet reported
        self._finished: set[str] = set()  # senders whose request has ended
        self._lock = threading.Lock()
        self._released: set[str] = set()
        self._release_of: dict[HandoffKey, threading.Event] = {}
        self._results = StepResults()
        self._receiving: dict[bytes, bool] = {}  # token -> was cancelled
        self._unreported: dict[bytes, str] = {}  # failed loads that wait for their request's end: token -> request
        self._failed_early: dict[HandoffKey | bytes, str] = {}  # in another rank, before this one began -> why

    @property
    def channel(self) -> ConnectorEnd:
        return self._channel

    def register(self, tensors: Mapping[str, torch.Tensor], facts: ModelFacts) -> None:
        """The KV cache exists: start the endpoint over it. Raises UnfitKv, TransportError, ValueError."""
        pool = pool_of(
            tensors,
            facts,
            staging_bytes=self._settings.staging_bytes,
            verifies_blocks=self._settings.verifies_blocks,
        )
        self._device_pool = pool if isinstance(pool, DevicePool) else None
        self._layer_index = {layer.name: index for index, layer in enumerate(pool.layout.layers)}
        self._groups = KvGroups.of(pool.layout)
        settings = self._settings

        def make() -> HandoffEndpoint:
            return HandoffEndpoint(
                pool,
                open_transports(schemes_for(settings.transports, pool)),
                worker_name=settings.worker_id,
                epoch=settings.epoch,
                bind_host=settings.bind,
                listens=settings.is_decode,
            )

        thread = EndpointThread(make)
        addresses = thread.start()
        self._thread, self._ranked, self._rank = thread, RankedEndpoint([thread.endpoint]), pool.layout.shape.tp_rank
        self._probes = ProbeAnswers(self._ranked, self._channel.send)
        self._channel.send(Ready(addresses, pool.layout, pool.blocks))

    # The hooks of a step, in their order.

    def preempted(self, plan: StepPlan) -> None:
        """Returns when nothing reads the blocks of these hand-offs. Raises TimeoutError rather than send foreign KV."""
        deadline_s = time.monotonic() + PREEMPTION_TIMEOUT_S
        with self._lock:
            waits = [(key, event) for key in plan.preempted if (event := self._release_of.get(key))]
        for key, _ in waits:
            self._call(self._endpoint.abort, key, "preempted")
        for key, event in waits:
            if not event.wait(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError(f"hand-off {key.token.hex()} still reads preempted blocks")

    def begin(self, plan: StepPlan) -> None:
        """Before the forward pass."""
        self.preempted(plan)  # vLLM 0.26 calls that hook only when it preempted a request itself.
        for receive in plan.receives:
            self._expect(receive)
        for token in plan.cancels:
            self._cancel(token)
        for order in plan.opens:
            self._open(order)
        for key, reason in plan.aborts:
            self._call(self._endpoint.abort, key, reason)
        for push in plan.pushes:
            self._call(_announce, self._endpoint, push)
        self._pushed_keys = [push.key for push in plan.pushes]
        self._layers_done = []

    def layer_saved(self, name: str) -> None:
        """The attention of this layer has run: its KV of this step is in memory."""
        index = self._layer_index.get(name)
        if self._pushed_keys and index is not None:
            self._layer_done(index)

    def all_saved(self) -> None:
        """The forward pass is over; the layers whose hook did not run (full CUDA graphs) are done as well."""
        if not self._pushed_keys:
            return
        for index in range(len(self._layer_index)):
            self._layer_done(index)
        self._pushed_keys = []

    def results(self, finished_ids: set[str]) -> StepResults:
        """A request is reported as sent once it has ended and nothing reads its blocks; as received once none is written."""
        self._finished |= finished_ids & self._senders
        with self._lock:
            results, self._results = self._results, StepResults()
            results.sent = self._released & self._finished
            self._released -= results.sent
        self._finished -= results.sent
        self._senders -= results.sent
        return results

    def stop(self) -> None:
        """Drop every hand-off."""
        if self._thread:
            self._thread.stop()
        self._channel.close()

    # From the hooks to the endpoint's thread.

    @property
    def _kv_groups(self) -> KvGroups:
        assert self._groups is not None, "hooks come after register"
        return self._groups

    @property
    def _endpoint(self) -> RankedEndpoint:
        assert self._ranked is not None, "hooks come after register"
        return self._ranked

    def _call(self, fn: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        assert self._thread is not None, "hooks come after register"
        self._thread.call(fn, *args, **kwargs)

    def _layer_done(self, index: int) -> None:
        if index in self._layers_done:
            return
        self._layers_done.append(index)
        if self._device_pool is not None:
            # The layer's kernels are enqueued, not done: what is gathered here, on their stream, comes after them.
            self._endpoint.gather_ahead(self._pushed_keys, tuple(self._layers_done), versions.current_stream())
            self._device_pool.fence()
        self._call(_tell_ready, self._endpoint, self._pushed_keys, index)

    def _expect(self, receive: Receive) -> None:
        timeout_s = max(TIMEOUT_MIN_S, receive.deadline_s - time.monotonic())
        expectation = Expectation(receive.token, receive.attempt, receive.groups, receive.end_token, timeout_s)

        def expect() -> None:
            try:
                self._endpoint.expect(
                    expectation,
                    lambda end: self._on_receive_end(receive, end),
                    prefill_ranks=receive.prefill_ranks,
                )
            except (ValueError, IndexError, TransportError) as error:
                log.warning("cannot expect a hand-off: %s", error)
                self._on_receive_end(receive, ReceiveEnd(receive.token, False, receive.first_token, 0, "refused"))

        with self._lock:
            self._receiving[receive.token] = False
            self._call(expect)
            if self._failed_early.pop(receive.token, None) is not None:
                self._call(self._endpoint.cancel, receive.token)

    def _cancel(self, token: bytes) -> None:
        with self._lock:
            request_id = self._unreported.pop(token, None)
            if request_id is not None:
                self._results.received.add(request_id)
                return
            if token in self._receiving:
                self._receiving[token] = True
        self._call(self._endpoint.cancel, token)

    def _open(self, order: Open) -> None:
        timeout_s = max(TIMEOUT_MIN_S, order.deadline_s - time.monotonic())
        send = SendOrder(order.key, order.addresses, order.decode_epoch, order.fingerprint, order.tokens, timeout_s)
        self._senders.add(order.request_id)

        def open_order() -> None:
            try:
                self._endpoint.open(
                    send, lambda event: self._on_send_event(order, event), decode_ranks=order.decode_ranks
                )
            except (ValueError, TransportError) as error:
                log.warning("cannot open a hand-off: %s", error)
                self._on_send_event(order, SendReleased(order.key))
                self._on_send_event(order, SendEnd(order.key, False, 0, f"refused:{error}"))

        with self._lock:
            self._release_of[order.key] = threading.Event()
            self._call(open_order)
            if (reason := self._failed_early.pop(order.key, None)) is not None:
                self._call(self._endpoint.abort, order.key, reason)

    # On the endpoint's thread.

    def _on_receive_end(self, receive: Receive, end: ReceiveEnd) -> None:
        valid_token = self._valid_token(receive, end)
        if receive.is_waiting:
            # The front end first: it must know before the request's first token can reach it.
            self._channel.send(
                ReceiveEnded(end.token, end.is_landed, receive.first_token, valid_token, end.kv_bytes, end.reason)
            )
        groups = self._kv_groups
        with self._lock:
            is_cancelled = self._receiving.pop(receive.token, False)
            if not receive.is_waiting:
                return
            is_lost = not end.is_landed and not groups.is_plain
            if is_lost and not is_cancelled and not self._settings.reports_failed_loads:
                self._unreported[receive.token] = receive.request_id
                return
            self._results.received.add(receive.request_id)
            if is_lost:
                self._results.failed.add(receive.request_id)
            elif not end.is_landed:
                first_block, block_ids = receive.groups[0]
                self._results.bad_blocks.update(block_ids[valid_token // groups.block_tokens[0] - first_block :])

    def _valid_token(self, receive: Receive, end: ReceiveEnd) -> int:
        """From where on the prompt is computed here."""
        if end.is_landed:
            return receive.end_token
        if not self._kv_groups.is_plain:
            return (
                receive.first_token
            )  # The blocks were reserved for the token after the load: no shorter one can use them.
        block_tokens = self._kv_groups.block_tokens[0]
        return max(receive.first_token, end.good_token // block_tokens * block_tokens)

    def _on_send_event(self, order: Open, event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            self._channel.send(SendEnded(event.key, event.is_landed, event.kv_bytes, event.reason))
            return
        with self._lock:
            self._released.add(order.request_id)
            if released := self._release_of.pop(order.key, None):
                released.set()

    # On the side channel's thread.

    def _on_note(self, note: Note) -> None:
        if self._thread is None:
            return
        match note:
            case AbortSend():
                self._call(self._endpoint.abort, note.key, note.reason)
            case RankFailed():
                self._give_up(note)
            case ProbeAsked() if self._probes and note.rank == self._rank:
                self._call(self._probes.start, note)

    def _give_up(self, failed: RankFailed) -> None:
        """Ranks take the same steps, but not at the same time: this one may be about to begin."""
        with self._lock:
            if failed.name not in self._receiving and failed.name not in self._release_of:
                self._failed_early[failed.name] = failed.reason  # Or it is over.
                if len(self._failed_early) > EARLY_MAX:
                    del self._failed_early[next(iter(self._failed_early))]
            if isinstance(failed.name, HandoffKey):
                self._call(self._endpoint.abort, failed.name, failed.reason)
            else:
                self._call(self._endpoint.cancel, failed.name)


def _tell_ready(endpoint: RankedEndpoint, keys: list[HandoffKey], layer: int) -> None:
    for key in keys:
        endpoint.layer_ready(key, layer)


def _announce(endpoint: RankedEndpoint, push: Push) -> None:
    try:
        endpoint.announce(push.key, push.chunk)
    except (ValueError, IndexError):
        log.exception("gave a hand-off up")
        endpoint.abort(push.key, "bad_chunk")
