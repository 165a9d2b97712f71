"""The door of the router: what `admission.py` decides, with the pool as it is and the other routers as they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .admission import Admission, AdmissionLimits
from .generation import Generation, refused
from .metrics import RouterMetrics
from .sharing import LoadSharing
from .view import ClusterView


class Gate:
    """`enter` once and `leave` once for each stream."""

    def __init__(
        self,
        limits: AdmissionLimits,
        view: ClusterView,
        sharing: LoadSharing,
        metrics: RouterMetrics,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._admission = Admission(limits)
        self._view = view
        self._metrics = metrics
        self._clock = clock
        sharing.tenants = self._admission.tenants
        sharing.on_others = self._on_others

    def set_limits(self, limits: AdmissionLimits) -> None:
        """They count from the next request on."""
        self._admission.limits = limits

    def share_of(self, tenant: str) -> float:
        """Its weight against other tenants."""
        return self._admission.limits.of(tenant).weight

    def enter(self, generation: Generation, stream_id: int) -> None:
        """Raises RouterError when the limits leave no room, before any work is queued."""
        tokens = generation.prompt_tokens + generation.sampling.max_tokens
        block_tokens = self._view.block_tokens(generation.model)
        need = generation.prompt_tokens, -(-tokens // block_tokens) if block_tokens else 0
        refusal = self._admission.offer(stream_id, generation.tenant, need, generation.deadline_s, self._clock())
        if refusal is not None:
            self._metrics.admission_refusals.labels(refusal.reason).inc()
            raise refused(refusal)

    def waits(self, stream_id: int, tokens: int) -> None:
        """So many tokens of its prompt are still to be computed."""
        self._admission.waits(stream_id, tokens, self._clock())

    def leave(self, stream_id: int) -> None:
        """It has ended."""
        self._admission.release(stream_id, self._clock())

    def look(self) -> None:
        """How fast the pool computes prompts, from time to time."""
        speeds = [member.heartbeat.prefill_tokens_per_s for member in self._view.members("prefill")]
        known = [speed for speed in speeds if speed > 0]  # The others have computed nothing yet: as fast as these.
        self._admission.prefill_tokens_per_s = sum(known) * len(speeds) / len(known) if known else 0.0

    def _on_others(self, tenants: Mapping[str, tuple[int, int]]) -> None:
        self._admission.others = tenants
