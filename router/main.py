"""The router process: bus, core, token path and API put together, from the first connection to the last stream."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from prometheus_client import CollectorRegistry

from ..bus.base import BusError
from ..bus.ids import RouterId
from ..bus.nats_bus import NatsBus
from ..bus.subjects import token
from .api.app import build_app
from .api.server import ApiServer, ServerError
from .api.stream import TokenPath
from .config import RouterConfig
from .metrics import RouterMetrics
from .policies.base import Policy, PolicyError, load_policy
from .router import Router
from .text.model_text import ModelText, ModelTextError

log = logging.getLogger(__name__)

DRAIN_TICK_S = 0.05


class _Stopped(Exception):
    """Ends the task group: told to stop, or (with a text) unable to go on."""


async def run_router(
    config: RouterConfig, *, stop: asyncio.Event | None = None, on_ready: Callable[[str], None] | None = None
) -> int:
    """Serve until told to stop; the process's exit code: 0 stopped, 1 failed.

    SIGTERM and SIGINT stop it: no new requests, `grace_s` for those in flight, then they end with an error. `on_ready` gets
    the API's URL; without it one line of JSON on stdout says so.
    """
    try:
        policy = load_policy(config.policy)
        text = ModelText.load(Path(config.model))
    except (PolicyError, ModelTextError) as error:
        log.error("%s", error)
        return 1
    router_id = RouterId(token("-".join(filter(None, ["router", config.router_id, secrets.token_hex(4)]))))
    bus = NatsBus(config.nats, name=router_id)
    process = _Process(config, router_id, bus, text, policy)
    try:
        await bus.connect()
        with _on_signals(process.on_signal):
            return await process.run(stop or asyncio.Event(), on_ready or _print_ready)
    except (BusError, ServerError) as error:
        log.error("%s", error)
        return 1
    finally:
        text.close()
        await bus.aclose()


class _Process:
    def __init__(
        self, config: RouterConfig, router_id: RouterId, bus: NatsBus, text: ModelText, policy: Policy
    ) -> None:
        self._config = config
        self._bus = bus
        registry = CollectorRegistry()
        self._router = Router(
            config,
            bus,
            policy,
            router_id=router_id,
            served_name=config.served_name or PurePath(config.model).name,
            metrics=RouterMetrics(registry),
        )
        self._path = TokenPath(self._router, text.table)
        self._app = build_app(self._router, self._path, text, config, registry=registry)
        self._asked = asyncio.Event()
        self._hurried = asyncio.Event()

    def on_signal(self) -> None:
        """Once: stop. Twice: now."""
        if self._asked.is_set():
            self._hurried.set()
        self._asked.set()

    async def run(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> int:
        config = self._config
        server = ApiServer(
            self._app, host=config.host, port=config.port, grace_s=1.0, reuse_port=config.reuse_port
        )  # fmt: skip
        exit_code = 1
        gc.freeze()  # What lives as long as the process is not looked at again: a full collection took 58 ms over it.
        try:
            async with asyncio.TaskGroup() as tasks:
                hears = asyncio.Event()
                tasks.create_task(self._router.run(self._path, self._path.on_frame, hears.set), name="router")
                tasks.create_task(self._watch_bus(), name="watch-bus")
                tasks.create_task(self._watch_stop(stop), name="watch-stop")
                await hears.wait()
                if config.reuse_port:  # The others serve; a connection that came here now would be refused.
                    await self._router.membership.wait_warm()
                server.listen()
                serving = tasks.create_task(server.run(), name="api")
                on_ready(server.url)
                await self._asked.wait()
                await self._drain()
                server.stop()
                await serving
                raise _Stopped
        except* _Stopped:
            exit_code = 0
        except* (BusError, ServerError) as errors:
            log.error("%s", errors.exceptions[0])
        return exit_code

    async def _drain(self) -> None:
        self._router.stop_taking()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.grace_s):
                while self._router.in_flight and not self._hurried.is_set():  # noqa: ASYNC110  # Bounded, and only at the end.
                    await asyncio.sleep(DRAIN_TICK_S)
        self._router.fail_all("shutting_down", "the router was stopped before the answer was complete")
        self._path.flush()

    async def _watch_stop(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self._asked.set()

    async def _watch_bus(self) -> None:
        raise await self._bus.fatal()


def _print_ready(url: str) -> None:
    print(json.dumps({"ready": "router", "url": url}), flush=True)


@contextlib.contextmanager
def _on_signals(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
