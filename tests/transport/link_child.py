"""The other process of `test_link_processes`: link_child.py ADDRESS MESSAGES BUFFERS BUFFER_BYTES.

Connects, announces itself, sends its messages (tags 0, 1, ...; every byte is 7) and prints a line when the link is lost.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from transport_rig import make_transport

from hocket.transport import LinkLost


async def main(address: str, messages: int, buffers: int, buffer_bytes: int) -> None:
    transport = make_transport(address.partition("://")[0])
    await transport.start()
    link = await transport.connect(address, timeout_s=5.0)
    lost = asyncio.Event()
    link.start(lambda _: None, lambda _: lost.set())
    pool = np.full((2 * buffers, buffer_bytes), 7, np.uint8)
    link.send_control(b"ready")
    errors: list[BaseException | None] = []
    for tag in range(messages):
        link.post_send(tag, list(pool[::2]), errors.append)
    await lost.wait()
    ended = len(errors)
    try:
        link.send_control(b"anybody?")
    except LinkLost:
        print("lost", ended, flush=True)
    await transport.aclose()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], *(int(argument) for argument in sys.argv[2:5])))
