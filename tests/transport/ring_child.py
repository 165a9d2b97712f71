"""The other process of `test_ring_processes`: ring_child.py ADDRESS MESSAGES. Lends its messages, the last one without end."""

from __future__ import annotations

import asyncio
import sys

from ring_rig import NBYTES, extents_of, lending_side

from hocket.transport.links.ring_link import RingLink


async def main(address: str, messages: int) -> None:
    pool, transport = await lending_side(messages, seed=1)
    link = await transport.connect(address, timeout_s=5.0)
    assert isinstance(link, RingLink)
    link.start(lambda _: None, lambda _: None)
    for tag in range(messages):
        slot = pool.reserve(NBYTES, on_device=True)
        assert slot is not None
        ticket = pool.arm(extents_of(tag), slot, is_gather=True)
        link.lend(tag, slot, ticket, lambda _: None)
        link.go([tag])
        if tag < messages - 1:
            pool.launch(ticket)
    link.send_control(b"all are lent")
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
