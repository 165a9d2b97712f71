"""The worker's side of the token path: one frame for each router and engine step, and its repair (`token_state.py`).

Steps that follow each other faster than `FRAME_GAP_S` share a frame: a wake-up costs every process on the way ten times
what a token in a frame does. First tokens and ends never wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from . import subjects
from .base import Bus, Delivery, Subscription
from .ids import RouterId, WorkerId
from .messages import FINISH_NONE, EntryDetail, FinishAck, ReplayRequest, TokenFrame, encode
from .token_state import OutboxState, OutboxTimes

log = logging.getLogger(__name__)

FRAME_BYTES_MAX = 64 << 10  # a larger one is split, so that no router waits long for the others' tokens
FRAME_GAP_S = (
    0.004  # far below any engine's step on a GPU under load; 64 tokens more in a frame cost less than one frame
)
FULL_RETRY_S = 0.02  # the outbound buffer is full: what comes until then goes into one frame


class TokenOutbox:
    """Call `open` at admission, `add` for each step's output, `acknowledge` and `replay` for what the routers send.

    `on_router_gone(router_id)` is called once nobody has listened on the router's subject for `times.gone_after_s`; all its
    streams are forgotten by then. `clock` is the loop's own unless a test brings another.
    """

    def __init__(
        self,
        bus: Bus,
        worker_id: WorkerId,
        epoch: int,
        *,
        on_router_gone: Callable[[RouterId], None],
        times: OutboxTimes | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._bus = bus
        self._state = OutboxState(worker_id, epoch, times or OutboxTimes())
        self._on_router_gone = on_router_gone
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._inbox = bus.new_inbox()
        self._subscription: Subscription | None = None
        self._flush_handle: asyncio.Handle | None = None
        self._is_flush_urgent = False
        self._flushed_at = -FRAME_GAP_S
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # on our clock; uvloop gives a plain Handle, without a time, for a delay of nothing
        self._quiet = asyncio.Event()
        self._is_closed = False
        bus.on_connection(self._on_connection)

    async def start(self) -> None:
        """Listen for the server's word that a router is not there."""
        self._subscription = await self._bus.subscribe(subjects.all_under(self._inbox), self._on_refused)

    @property
    def streams(self) -> int:
        """Attempts held, the unacknowledged ends included."""
        return self._state.streams

    def open(self, router_id: RouterId, stream_id: int, attempt: int) -> None:
        """An attempt was admitted: from now on replays of it are answered."""
        self._state.open(router_id, stream_id, attempt)

    def add(
        self,
        router_id: RouterId,
        stream_id: int,
        attempt: int,
        token_ids: Sequence[int],
        *,
        finish: int = FINISH_NONE,
        detail: EntryDetail | None = None,
    ) -> bool:
        """The next tokens of an open attempt, or its end; False when it is not open (forgotten, ended, its router gone)."""
        is_held = self._state.add((router_id, stream_id, attempt), token_ids, finish, detail, self._clock())
        if is_held:
            self._flush_soon(is_urgent=finish != FINISH_NONE or detail is not None)
        return is_held

    def acknowledge(self, ack: FinishAck) -> None:
        """The router has these ends: forget them."""
        self._state.acknowledge(ack)
        self._arm()

    def replay(self, request: ReplayRequest) -> TokenFrame | None:
        """The answer to a router that misses tokens; None when the attempt is not held."""
        return self._state.replay(request)

    def forget(self, router_id: RouterId, stream_id: int, attempt: int) -> None:
        """A cancelled attempt: nothing more of it is sent."""
        self._state.forget(router_id, stream_id, attempt)
        self._arm()

    async def wait_acknowledged(self) -> None:
        """Returns when every end added so far is acknowledged, given up, or its router gone. Bounded by 30 s a router."""
        while self._state.unacknowledged:
            self._quiet.clear()
            await self._quiet.wait()

    async def aclose(self) -> None:
        """Send what is queued and stop; ends that nobody acknowledged are given up."""
        if not self._is_closed:
            self._flush()
        self._is_closed = True
        for handle in (self._flush_handle, self._timer):
            if handle is not None:
                handle.cancel()
        self._quiet.set()
        if self._subscription is not None:
            await self._subscription.unsubscribe()

    # ---- sending

    def _flush_soon(self, *, is_urgent: bool) -> None:
        if self._flush_handle is not None:
            if self._is_flush_urgent or not is_urgent:
                return
            self._flush_handle.cancel()
        wait_s = 0.0 if is_urgent else self._flushed_at + FRAME_GAP_S - self._clock()
        self._is_flush_urgent = wait_s <= 0.0
        if self._is_flush_urgent:
            self._flush_handle = self._loop.call_soon(self._flush)
        else:
            self._flush_handle = self._loop.call_later(wait_s, self._flush)

    def _flush(self) -> None:
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        self._flushed_at = self._clock()
        if self._is_closed:
            return
        if self._bus.is_connected:
            now = self._clock()
            for router_id in self._state.due(now):
                frame = self._state.take(router_id, now)
                if frame is not None:
                    self._publish(router_id, frame, now)
        self._arm()

    def _publish(self, router_id: RouterId, frame: TokenFrame, now: float) -> None:
        payload = encode(frame)
        if len(payload) > FRAME_BYTES_MAX and len(frame.entries) > 1:
            for half in _halves(frame):
                self._publish(router_id, half, now)
            return
        reply = subjects.under(self._inbox, router_id)
        if not self._bus.publish_nowait(subjects.tokens(router_id), payload, reply=reply):
            self._state.not_sent(router_id, frame.entries, now + FULL_RETRY_S)

    def _arm(self) -> None:
        """Wake when something is to be sent again. While disconnected only the reconnection wakes us."""
        if not self._state.unacknowledged:
            self._quiet.set()
        at = self._state.next_at()
        if self._timer is not None:
            if at is not None and self._timer_at <= at:
                return  # Early is harmless: it arms again.
            self._timer.cancel()
            self._timer = None
        if at is not None and self._bus.is_connected and not self._is_closed:
            self._timer_at = at
            self._timer = self._loop.call_later(max(0.0, at - self._clock()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._flush()

    def _on_connection(self, is_connected: bool) -> None:
        if is_connected and not self._is_closed:
            self._state.on_connected(self._clock())
            self._flush()

    def _on_refused(self, delivery: Delivery) -> None:
        if not delivery.is_no_responders or self._is_closed:
            return
        router_id = RouterId(subjects.last_token(delivery.subject))
        if self._state.on_refused(router_id, self._clock()):
            self._state.forget_router(router_id)
            log.warning("router %s has gone", router_id)
            self._on_router_gone(router_id)
        self._arm()


def _halves(frame: TokenFrame) -> tuple[TokenFrame, TokenFrame]:
    middle = len(frame.entries) // 2
    first = {position: detail for position, detail in frame.details.items() if position < middle}
    second = {position - middle: detail for position, detail in frame.details.items() if position >= middle}
    return (
        TokenFrame(frame.worker_id, frame.epoch, frame.entries[:middle], first),
        TokenFrame(frame.worker_id, frame.epoch, frame.entries[middle:], second),
    )
