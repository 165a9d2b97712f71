"""A router process without HTTP: `router_child.py SHAPE_AS_JSON NATS_URL`; a request a line on stdin, an end a line on stdout."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import msgspec

from hocket.bus.ids import RequestId, RouterId
from hocket.bus.messages import SamplingParams
from hocket.bus.nats_bus import NatsBus
from hocket.lab.clients import MODEL, Request, ask, token_table
from hocket.lab.members import Shape
from hocket.router.api.stream import TokenPath
from hocket.router.metrics import RouterMetrics
from hocket.router.policies.base import load_policy
from hocket.router.router import Router


class Told:
    """Watches the clients, and prints what they see."""

    def ended(self, request: Request, how: str) -> None:
        print(json.dumps({"number": request.number, "how": how}), flush=True)

    def violate(self, what: str) -> None:
        print(json.dumps({"number": -1, "how": what}), flush=True)


async def main(shape: Shape, url: str) -> None:
    router_id = RouterId(f"router-{os.urandom(4).hex()}")
    bus = NatsBus(url, name=router_id)
    await bus.connect()
    config = shape.router_config(url)
    policy = load_policy(shape.policy)
    router = Router(config, bus, policy, router_id=router_id, served_name=MODEL, metrics=RouterMetrics())
    path = TokenPath(router, token_table())
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with asyncio.TaskGroup() as tasks:
        hears = asyncio.Event()
        running = tasks.create_task(router.run(path, path.on_frame, hears.set))
        await hears.wait()
        while len(router.membership.view.members()) < shape.prefill + shape.decode:
            await asyncio.sleep(0.01)
        print(json.dumps({"number": -2, "how": "ready"}), flush=True)
        asking = []
        while line := await reader.readline():
            asked = json.loads(line)
            request = Request(asked["number"], asked["prompt"], SamplingParams(max_tokens=asked["max_tokens"]), 0.0)
            request_id, deadline_s = RequestId(os.urandom(16).hex()), loop.time() + shape.request_timeout_s
            one = ask(router, path, request, Told(), request_id=request_id, deadline_s=deadline_s)
            asking.append(tasks.create_task(one))
        if asking:
            await asyncio.wait(asking)
        running.cancel()
    await bus.aclose()


if __name__ == "__main__":
    asyncio.run(main(msgspec.json.decode(sys.argv[1], type=Shape), sys.argv[2]))
