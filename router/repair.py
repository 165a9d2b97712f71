"""Keeps token streams whole: asks workers for what was lost, and tells them what has arrived."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery, NoResponders
from ..bus.ids import RequestId, RouterId, WorkerId
from ..bus.messages import FinishAck, ReplayRequest, decode_frame, encode
from .metrics import RouterMetrics

REPLAY_TIMEOUT_S = 1.0
REPLAYS_MAX = 3


class TokenRepair:
    """One router's repairs; every wait runs in `tasks`."""

    def __init__(
        self,
        bus: Bus,
        pool: str,
        router_id: RouterId,
        tasks: asyncio.TaskGroup,
        *,
        on_frame: Callable[[Delivery], None],
        metrics: RouterMetrics,
    ) -> None:
        self._bus = bus
        self._pool = pool
        self._router_id = router_id
        self._tasks = tasks
        self._on_frame = on_frame
        self._metrics = metrics
        self._replaying: set[int] = set()
        self._ended: dict[WorkerId, list[tuple[int, int]]] = {}

    def acknowledge(self, worker: WorkerId, stream_id: int, attempt: int) -> None:
        """The end of the stream has arrived; acks of one turn of the loop go out in one message for each worker."""
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._flush)
        self._ended.setdefault(worker, []).append((stream_id, attempt))

    def replay(
        self,
        worker: WorkerId,
        request_id: RequestId,
        stream_id: int,
        attempt: int,
        first_index: int,
        *,
        on_lost: Callable[[], None],
    ) -> None:
        """Ask for tokens from `first_index` on, unless that is under way; `on_lost` when they cannot be had."""
        if stream_id in self._replaying:
            return
        self._replaying.add(stream_id)
        self._metrics.replays.inc()
        question = ReplayRequest(self._router_id, request_id, stream_id, attempt, first_index)
        self._tasks.create_task(self._replay(worker, question, on_lost), name="replay")

    async def _replay(self, worker: WorkerId, question: ReplayRequest, on_lost: Callable[[], None]) -> None:
        subject = subjects.control(self._pool, worker)
        try:
            for _ in range(REPLAYS_MAX):
                try:
                    payload = await self._bus.request(subject, encode(question), timeout_s=REPLAY_TIMEOUT_S)
                    decode_frame(payload)
                except NoResponders:
                    await asyncio.sleep(REPLAY_TIMEOUT_S)  # After a restart of the server it may not be back yet.
                    continue
                except BusError:
                    continue
                except msgspec.MsgspecError:
                    break  # It answered Unknown: it does not hold the request any more.
                self._on_frame(Delivery(subject, "", payload))
                return
            on_lost()
        finally:
            self._replaying.discard(question.stream_id)

    def _flush(self) -> None:
        ended, self._ended = self._ended, {}
        for worker, finished in ended.items():
            ack = FinishAck(self._router_id, finished)
            self._bus.publish_nowait(subjects.control(self._pool, worker), encode(ack))
