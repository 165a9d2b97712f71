"""`KvPushConnector`: what vLLM loads by `kv_connector_module_path`. Glue only.

Decisions are in `scheduler`, work is in `worker_side`.

vLLM makes it twice: beside the scheduler (EngineCore process) and beside the KV tensors (worker process). The front end imports
this module, too, and asks the class methods; it never makes one.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from ....transport.errors import TransportError
from ..base import EngineError
from ..step_log import StepLog, step_of
from . import versions
from .kv_tensors import KvGroupFacts, ModelFacts, UnfitKv, group_facts, kv_groups
from .scheduler import BlockRows, Scheduled, SchedulerCore, StepPlan
from .side_channel import ConnectorEnd, Note, TaskEnded, Unfit
from .versions import RequestLike, Unchecked
from .worker_side import HandoffSettings, StepResults, WorkerSide

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no stubs here.
    """A `StepPlan` on its way from the scheduler side to the worker side."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan


class KvPushConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]  # vLLM has no stubs here.
    """Decode: KV comes into the blocks that its scheduler reserved. Prefill: each layer of each chunk leaves as it is made."""

    _cache_hit_source = versions.peer_hit_source()

    def __init__(self, vllm_config: Unchecked, role: KVConnectorRole, kv_cache_config: Unchecked) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._config = vllm_config
        self._groups_config = kv_cache_config
        transfer = vllm_config.kv_transfer_config
        self._extra: dict[str, Any] = transfer.kv_connector_extra_config  # Any: plain data of `engine_args.py`.
        is_scheduler = role == KVConnectorRole.SCHEDULER
        # Ctrl-C reaches the whole foreground group; the front end decides when the engine ends. vLLM's handler is set by now.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._scheduler: SchedulerCore | None = None
        self._step_log: StepLog | None = None
        self._worker: WorkerSide | None = None
        if is_scheduler:
            self._channel = ConnectorEnd(self._extra["side_channel"], "scheduler", _ignore)
        else:
            settings = HandoffSettings(
                is_decode=transfer.kv_role == "kv_consumer",
                transports=self._extra["transports"],
                bind=self._extra["bind"],
                worker_id=self._extra["worker_id"],
                epoch=self._extra["epoch"],
                staging_bytes=self._extra["staging_bytes"],
                verifies_blocks=self._extra["verifies_blocks"],
                reports_failed_loads=self._extra["reports_failed_loads"],
            )
            self._worker = WorkerSide(settings, self._extra["side_channel"])
            self._channel = self._worker.channel
        self._bad_blocks: set[int] = set()
        self._groups = self._check()
        if is_scheduler:
            self._scheduler = SchedulerCore(kv_groups(self._groups))
            self._step_log = self._open_step_log(self._extra["step_log"])

    def _check(self) -> tuple[KvGroupFacts, ...]:
        """What can be known before there is a KV cache. Raises UnfitKv, after telling the front end."""
        if self._config.speculative_config is not None:
            self._refuse("speculative decoding keeps KV of its own, which cannot be handed off yet")
        groups = versions.kv_groups(self._groups_config)
        if len(versions.transfer_group_ids(self._groups_config)) != len(groups):
            self._refuse(
                "some of the model's KV groups are not meant to leave the engine, which cannot be handed off yet"
            )
        try:
            return group_facts(groups)
        except UnfitKv as error:
            self._refuse(str(error))

    def _open_step_log(self, path: str) -> StepLog | None:
        try:
            return StepLog.at(path) if path else None
        except EngineError as error:
            self._refuse(str(error))

    def _refuse(self, why: str) -> NoReturn:
        self._channel.send(Unfit(why))
        raise UnfitKv(why)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Unchecked) -> str:
        return "HND"  # A (layer, block) is one contiguous run; alias of LBHNC since 0.32.

    # Scheduler side.

    def get_num_new_matched_tokens(self, request: RequestLike, num_computed_tokens: int) -> tuple[int, bool]:
        assert self._scheduler
        tokens = self._scheduler.external_tokens(
            request.request_id, _params(request), request.num_prompt_tokens, num_computed_tokens
        )
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: RequestLike, blocks: Unchecked, num_external_tokens: int) -> None:
        assert self._scheduler
        self._scheduler.allocated(
            request.request_id,
            _params(request),
            prompt_tokens=request.num_prompt_tokens,
            external_tokens=num_external_tokens,
            block_ids=blocks.get_block_ids(),
        )

    def get_loaded_kv_cache_group_ids(self, request: RequestLike) -> tuple[int, ...]:
        return versions.transfer_group_ids(self._groups_config)

    def build_connector_meta(self, scheduler_output: Unchecked) -> StepMetadata:
        assert self._scheduler
        scheduled = _scheduled(scheduler_output)
        if self._step_log:
            self._step_log.begin(step_of((part.computed_tokens, part.scheduled_tokens) for part in scheduled))
        return StepMetadata(self._scheduler.step(scheduled, scheduler_output.preempted_req_ids or ()))

    def take_events(self) -> Iterable[Unchecked]:
        """We have none; the scheduler asks when a step's output is there."""
        if self._step_log:
            self._step_log.end()
        return ()

    def update_connector_output(self, connector_output: Unchecked) -> None:
        assert self._scheduler
        for request_id in connector_output.finished_recving or ():
            log.debug("made a request runnable", extra={"request_id": request_id})
        for ids in (connector_output.finished_sending, connector_output.finished_recving):
            for task in self._scheduler.moved(ids or ()):
                self._channel.send(TaskEnded(task))

    def request_finished(self, request: RequestLike, block_ids: list[int]) -> tuple[bool, None]:
        assert self._scheduler
        is_held, task = self._scheduler.finished(request.request_id, _params(request))
        if task is not None:
            self._channel.send(TaskEnded(task))
        return is_held, None

    def request_finished_all_groups(self, request: RequestLike, block_ids: tuple[list[int], ...]) -> tuple[bool, None]:
        return self.request_finished(request, block_ids[0])

    # Worker side.

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        assert self._worker
        config = self._config
        kv_caches = versions.in_forward_order(config, kv_caches)
        number_bytes = min(0 if isinstance(kv, Sequence) else kv.element_size() for kv in kv_caches.values())
        facts = ModelFacts(
            model=self._extra["model"],
            revision=self._extra["revision"],
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            groups=self._groups,
            engine=versions.installed()[1],
            backends=versions.backend_names(config, kv_caches),
            kv_heads=config.model_config.get_total_num_kv_heads(),
            tp_size=config.parallel_config.tensor_parallel_size,
            tp_rank=config.parallel_config.rank % config.parallel_config.tensor_parallel_size,
            packed_order=versions.packed_order(config, kv_caches, number_bytes),
        )
        try:
            self._worker.register(kv_caches, facts)
        except (UnfitKv, TransportError, ValueError) as error:
            self._refuse(str(error))

    def handle_preemptions(self, kv_connector_metadata: StepMetadata) -> None:
        assert self._worker
        if kv_connector_metadata.plan.preempted:
            self._worker.preempted(kv_connector_metadata.plan)

    def bind_connector_metadata(self, connector_metadata: StepMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self._worker
        self._worker.begin(connector_metadata.plan)

    def start_load_kv(self, forward_context: Unchecked, **kwargs: Unchecked) -> None:
        """Nothing: see `versions`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no request runs before all of its KV is here."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Unchecked, **kwargs: Unchecked
    ) -> None:
        assert self._worker
        self._worker.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        assert self._worker
        self._worker.all_saved()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        results = self._step_results(finished_req_ids)
        return results.sent or None, results.received or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Unchecked:
        results = self._step_results(finished_req_ids)
        return versions.transfer_results(results.sent, results.received, results.failed)

    def _step_results(self, finished_req_ids: set[str]) -> StepResults:
        assert self._worker
        results = self._worker.results(finished_req_ids)
        # Handed out by the next call, in the same step: a request must not be released before its errors are known.
        self._bad_blocks = results.bad_blocks
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        bad_blocks, self._bad_blocks = self._bad_blocks, set()
        return bad_blocks

    def shutdown(self) -> None:
        if self._worker:
            self._worker.stop()
        else:
            self._channel.close()
            if self._step_log:
                self._step_log.close()


def _params(request: RequestLike) -> Mapping[str, object]:
    return request.kv_transfer_params or {}


def _scheduled(output: Unchecked) -> list[Scheduled]:
    """The step's requests; a request that was preempted and comes back has all of its blocks new."""
    tokens = output.num_scheduled_tokens
    parts = [
        Scheduled(new.req_id, _rows(new.block_ids), True, new.num_computed_tokens, tokens[new.req_id])
        for new in output.scheduled_new_reqs
    ]
    cached = output.scheduled_cached_reqs
    rows = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
    for request_id, block_ids, computed_tokens in rows:
        is_fresh = request_id in cached.resumed_req_ids
        parts.append(Scheduled(request_id, _rows(block_ids), is_fresh, computed_tokens, tokens[request_id]))
    return parts


def _rows(block_ids: Sequence[Sequence[int]] | None) -> BlockRows:
    return tuple(tuple(row) for row in block_ids or ())


def _ignore(note: Note) -> None:
    """The scheduler side only reports."""
