"""`hocket top`: a pool's routers and workers, live in the terminal. It listens and asks, and changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, Delivery
from ..bus.messages import Goodbye, Heartbeat, decode
from ..router.control_messages import AskLoad, AskPolicies, PolicyStatus, RouterLoad
from .ask_routers import ask_all, pool_bus
from .config import PoolConfig, server_here
from .operate import OperateError
from .top_view import PoolState, PoolView, top_lines

LISTEN_S = 1.2
"""Two heartbeats: a worker that says nothing meanwhile is not there."""
_HOME, _CLEAR_BELOW = "\x1b[H", "\x1b[J"
_ALTERNATE_ON, _ALTERNATE_OFF = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_LINE_END = "\x1b[K\n"  # what stood there before is rubbed out


async def show_top(config: PoolConfig, *, is_once: bool, as_json: bool, every_s: float) -> int:
    """Print the pool, once or until interrupted. Raises OperateError when nothing answers."""
    nats = config.nats or server_here(config.pool)
    try:
        async with pool_bus(nats) as bus:
            watch = Watch(bus, config.pool)
            await watch.start()
            await watch.look()
            await asyncio.sleep(LISTEN_S)
            await watch.look()
            view = watch.view()
            if not view.routers and not view.workers:
                raise OperateError(
                    f"no router answered and no worker was heard of pool {config.pool!r} within {LISTEN_S} s; "
                    "`hocket serve` starts a pool, --pool and --nats name another one"
                )
            if is_once:
                print(json.dumps(msgspec.to_builtins(view), indent=2) if as_json else "\n".join(top_lines(view)))
            else:
                await _keep_showing(watch, as_json=as_json, every_s=every_s)
    except BusError as error:
        raise OperateError(str(error)) from error
    return 0


class Watch:
    """Keeps a `PoolState` in step with the bus."""

    def __init__(self, bus: Bus, pool: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._bus = bus
        self._pool = pool
        self._clock = clock
        self._state = PoolState(pool)

    async def start(self) -> None:
        """Begin to hear the workers."""
        await self._bus.subscribe(subjects.load_all(self._pool), self._on_load)

    def view(self) -> PoolView:
        """What is known now."""
        return self._state.view(self._clock())

    async def look(self) -> None:
        """Ask the routers, and the registry for the cards of those that are new. Raises BusError."""
        loads = await ask_all(self._bus, self._pool, AskLoad(), RouterLoad)
        policies = await ask_all(self._bus, self._pool, AskPolicies(), PolicyStatus, count=len(loads)) if loads else []
        self._state.routers_told(loads, policies, self._clock())
        for worker in self._state.without_card():
            if (card := await self._bus.registry.get(worker)) is not None:
                self._state.card(card)

    def _on_load(self, delivery: Delivery) -> None:
        message = decode(delivery.payload)
        if isinstance(message, Heartbeat | Goodbye):
            self._state.heard(message, self._clock())


async def _keep_showing(watch: Watch, *, as_json: bool, every_s: float) -> None:
    """Until cancelled; a terminal shows one screen that changes, a pipe gets one after the other."""
    is_screen = sys.stdout.isatty() and not as_json
    with _screen() if is_screen else contextlib.nullcontext():
        while True:
            try:
                await watch.look()
                trouble = []
            except BusError as error:  # It comes back, or the one who looks has seen enough.
                trouble = [f"! {error}"]
            view = watch.view()
            if is_screen:
                _paint([*top_lines(view), *trouble])
            else:
                print(json.dumps(msgspec.to_builtins(view)) if as_json else "\n".join(top_lines(view)), flush=True)
            await asyncio.sleep(every_s)


def _paint(lines: list[str]) -> None:
    """As much as the terminal has room for."""
    size = shutil.get_terminal_size()
    shown = [line[: size.columns] for line in lines[: size.lines - 1]]
    sys.stdout.write(_HOME + "".join(line + _LINE_END for line in shown) + _CLEAR_BELOW)
    sys.stdout.flush()


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """The terminal's other screen, without a cursor; what stood on the first one comes back."""
    sys.stdout.write(_ALTERNATE_ON)
    try:
        yield
    finally:
        sys.stdout.write(_ALTERNATE_OFF)
        sys.stdout.flush()
