"""Several router processes behind one port: the kernel gives each connection to one of them (SO_REUSEPORT).

They share nothing but the bus. One that dies takes its own connections along and is started again; it listens only when it
knows the workers, so that no connection comes to it before.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import msgspec

from ..router.config import RouterConfig
from .config import routers_folder
from .runner import ChildPlan, Console, ReadyLines, Runner
from .supervision import Limits

COMMAND = (sys.executable, "-m", "hocket.cluster.cli")
ROUTER_STOP_S = 1.5
"""Over its grace, so that a router that is a little late still ends by itself."""
START_TIMEOUT_S = 60.0


class PortTaken(Exception):
    """Another process listens there, or the address is not ours."""


@contextmanager
def reserved_port(host: str, port: int, processes: int) -> Iterator[int]:
    """The port that so many routers will share, kept from others while the block runs. Raises PortTaken.

    One router takes its port itself. A socket that is bound and does not listen gets no connections.
    """
    if processes == 1:
        yield port
        return
    with keep_port(host, port) as kept:
        yield kept.getsockname()[1]


def keep_port(host: str, port: int) -> socket.socket:
    """A socket that keeps the port from others until it is closed. Raises PortTaken."""
    try:
        return _keep(host, port)
    except OSError as error:
        raise PortTaken(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another: --port") from error


def _keep(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as alone:
        alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        alone.bind(address)  # Fails also where somebody shares the port, which is not ours then.
        address = alone.getsockname()
    kept = socket.socket(family, kind, protocol)
    try:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        kept.bind(address)
    except OSError:
        kept.close()
        raise
    return kept


def router_plans(config: RouterConfig, processes: int, log_level: str) -> list[ChildPlan]:
    """So many routers, alike but for their names."""
    command = [*COMMAND, "router", "--config", "-"]
    plans = []
    for index in range(processes):
        name = "router" if processes == 1 else f"router-{index}"
        one = config
        if processes > 1:
            router_id = config.router_id.removeprefix("router").strip("-")
            router_id = "-".join(filter(None, (router_id, str(index))))
            one = msgspec.structs.replace(config, router_id=router_id, reuse_port=True)
        settings: Mapping[str, object] = msgspec.to_builtins(one) | {"log_level": log_level}
        plans.append(ChildPlan(name, 0, command, settings))
    return plans


def run_routers(config: RouterConfig, processes: int, log_level: str) -> int:
    """Run them until Ctrl-C or SIGTERM; the exit code. Raises PortTaken."""
    console = Console(log_level)
    with reserved_port(config.host, config.port, processes) as port:
        config = msgspec.structs.replace(config, port=port)
        limits = Limits(start_timeout_s=START_TIMEOUT_S, stop_s=(config.grace_s + ROUTER_STOP_S,))
        logs = routers_folder(config.pool, port)
        console.say(f"starting {processes} routers on port {port}; logs in {logs}")
        runner = Runner(router_plans(config, processes, log_level), limits, logs=logs, console=console)

        async def announce(ready: ReadyLines) -> str:
            url = next(iter(ready.values()))["url"]
            print(json.dumps({"ready": "router", "url": url, "processes": str(processes)}), flush=True)
            return ""

        return asyncio.run(runner.run(announce))
