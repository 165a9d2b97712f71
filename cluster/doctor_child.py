"""One of the two processes that `hocket doctor --local` starts for each transport.

`doctor_child listen SCHEME` takes KV until its stdin ends; `doctor_child probe ADDRESS...` measures the link to it. Each
prints its `doctor.ChildReport` as one line of JSON.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import msgspec
import numpy as np

from ..transport.endpoint import HandoffEndpoint
from ..transport.errors import TransportError
from ..transport.layout import KvLayer, KvLayout, KvShape
from ..transport.pool import HostKvPool
from ..transport.ranks import RankProbe
from ..transport.registry import open_transports
from ..workers.checkup import rank_link
from .doctor import ChildReport

EPOCH = 1


def _endpoint(schemes: str, *, listens: bool) -> HandoffEndpoint:
    """Over a pool of one small block, which no probe touches."""
    layout = KvLayout("doctor", "", "uint8", "uint8", (KvLayer("scratch", 1, 2),), KvShape((1,)))
    pool = HostKvPool(layout, [np.zeros((1, 2), np.uint8)])
    return HandoffEndpoint(pool, open_transports(schemes), worker_name="doctor", epoch=EPOCH, listens=listens)


def _say(report: ChildReport) -> None:
    print(msgspec.json.encode(report).decode(), flush=True)


async def listen(scheme: str) -> None:
    """Until stdin ends."""
    endpoint = _endpoint(scheme, listens=True)
    await endpoint.start()
    try:
        _say(ChildReport(endpoint.addresses))
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(sys.stdin, ended.set)
        await ended.wait()
    finally:
        await endpoint.aclose()


async def probe(addresses: Sequence[str]) -> None:
    """Measure and say so."""
    scheme = addresses[0].partition("://")[0]
    endpoint = _endpoint(scheme, listens=False)
    await endpoint.start()
    try:
        report = await endpoint.probe(addresses, decode_epoch=EPOCH)
        _say(ChildReport(link=rank_link(RankProbe(0, 0, report))))
    finally:
        await endpoint.aclose()


def main() -> int:
    """Usage: python -m hocket.cluster.doctor_child listen SCHEME | probe ADDRESS..."""
    work = listen(sys.argv[2]) if sys.argv[1] == "listen" else probe(sys.argv[2:])
    try:
        asyncio.run(work)
    except TransportError as error:
        _say(ChildReport(failure=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
