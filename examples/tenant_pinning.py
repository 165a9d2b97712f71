"""A routing policy of one's own: some tenants have workers of their own, everybody else shares the rest.

hocket serve --policy examples/tenant_pinning.py:TenantPinning
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hocket.router.policies import Choice, RequestView, WorkerView

WORKERS_OF = {"acme": ("decode-0", "decode-1"), "initech": ("decode-2",)}
"""Tenant -> the beginnings of its workers' ids."""
PINNED = tuple(prefix for prefixes in WORKERS_OF.values() for prefix in prefixes)


class TenantPinning:
    """The tenant's own workers, or those that nobody owns; of these the one with the fewest requests."""

    def pick(self, request: RequestView, workers: Sequence[WorkerView], now: float, rng: random.Random) -> Choice:
        prefixes = WORKERS_OF.get(request.tenant)
        mine = [worker for worker in workers if worker.worker_id.startswith(prefixes or PINNED) == bool(prefixes)]
        worker = min(mine or workers, key=lambda worker: worker.load)  # None of them lives: any is better than none.
        return Choice(worker.worker_id, why=f"{request.tenant or 'shared'}: {worker.load} running")
