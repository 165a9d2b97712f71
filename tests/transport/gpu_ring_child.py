"""The other process of `test_gpu_ring`: lends one message of known bytes on a socket, and waits until it is told to go.

gpu_ring_child.py DEVICE FD
"""

from __future__ import annotations

import socket
import struct
import sys

import torch
from gpu_ring_rig import EXTENTS, NBYTES, make_pool


def main(device: str, fd: int) -> None:
    _, pool = make_pool(device, seed=1)
    slot = pool.reserve(NBYTES, on_device=True)
    assert slot is not None
    ticket = pool.gather(EXTENTS, slot)
    while (digest := ticket.poll()) is None:
        pass
    if device == "cuda":
        torch.cuda.synchronize()
    ring = pool.ring()
    with socket.socket(fileno=fd) as channel:
        lease = ring.lease(slot.buffer, ticket)
        socket.send_fds(channel, [struct.pack("<5Q", *lease, digest) + ring.words], ring.fds)
        channel.recv(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
