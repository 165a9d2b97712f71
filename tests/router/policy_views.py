"""Views for tests of policies: an idle pool, changed as a test says."""

from __future__ import annotations

from msgspec.structs import replace

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.policies import PrefillView, RequestView, WorkerView


def worker(name: str, **changes: object) -> WorkerView:
    view = WorkerView(
        WorkerId(name), 16, slots=64, kv_blocks=4000, can_prefill_locally=True, hit_blocks=0, in_flight=0,
        in_flight_blocks=0, running=0, waiting=0, kv_blocks_free=4000, fingerprint="f",
    )  # fmt: skip
    return replace(view, **changes)


def prefill(name: str, **changes: object) -> PrefillView:
    return replace(PrefillView(WorkerId(name), "f", 16, 8, 0, 0, 0), **changes)


def request(**changes: object) -> RequestView:
    view = RequestView(RequestId("r"), "m", 1600, 100, 0, 16, session_id="s")
    return replace(view, **changes)
