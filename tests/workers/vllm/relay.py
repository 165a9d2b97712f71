"""A third process's place in a hand-off: takes a prompt's KV from the prefill engine, may spoil it, and brings it on.

It is a worker of one rank, whatever the engines are.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np
import numpy.typing as npt
from vllm_rig import DECODE_EPOCH, Answer, EnginePair

from hocket.bus.messages import SamplingParams
from hocket.transport.base import (
    Chunk,
    Expectation,
    GroupBlocks,
    HandoffKey,
    ReceiveEnd,
    SendEnd,
    SendOrder,
    SendReleased,
)
from hocket.transport.endpoint import HandoffEndpoint
from hocket.transport.links.tcp import TcpTransport
from hocket.transport.pool import HostKvPool
from hocket.transport.ranks import RankedEndpoint
from hocket.workers.engines.base import PrefillTask
from hocket.workers.engines.vllm.kv_groups import KvGroups

RELAY_EPOCH = 33
TIMEOUT_S = 30.0
Rows = list[npt.NDArray[np.uint8]]


async def hand_off_spoilt(
    pair: EnginePair, prompt: list[int], sampling: SamplingParams, spoil: Callable[[Rows], None]
) -> Answer:
    """`spoil` gets the rows of each layer: row i is the prompt's logical block i, with all heads one after the other."""
    layout = pair.decode_engine.layout
    layout = msgspec.structs.replace(layout, shape=msgspec.structs.replace(layout.shape, tp_size=1, tp_rank=0))
    block_tokens = pair.decode_info.block_tokens
    looks_back = KvGroups.of(layout)
    end_token = looks_back.wanted_tokens(len(prompt))
    blocks = -(-end_token // block_tokens)
    rows = [np.zeros((blocks, layout.block_bytes(layer)), np.uint8) for layer in range(len(layout.layers))]
    pool = HostKvPool(layout, rows)
    firsts = [looks_back.first_kept_token(group, end_token) // block_tokens for group in range(len(layout.groups))]
    groups = tuple(GroupBlocks(first, tuple(range(first, blocks))) for first in firsts)
    endpoint = RankedEndpoint([HandoffEndpoint(pool, [TcpTransport()], worker_name="relay", epoch=RELAY_EPOCH)])
    await endpoint.start()
    try:
        await _take(pair, endpoint, prompt, groups, end_token)
        spoil(rows)
        return await _bring(pair, endpoint, prompt, sampling, Chunk(0, end_token, groups))
    finally:
        await endpoint.aclose()


async def _take(
    pair: EnginePair, endpoint: RankedEndpoint, prompt: list[int], groups: tuple[GroupBlocks, ...], end_token: int
) -> None:
    token = os.urandom(16)
    received: asyncio.Future[ReceiveEnd] = asyncio.get_running_loop().create_future()
    expectation = Expectation(token, 1, groups, end_token, TIMEOUT_S)
    endpoint.expect(expectation, received.set_result, prefill_ranks=pair.prefill_info.tp_size)
    fingerprint = pair.decode_info.fingerprint
    key = HandoffKey(token, 1, 1)
    await pair.prefill_engine.prefill(
        PrefillTask("r", key, prompt, endpoint.addresses, RELAY_EPOCH, fingerprint, TIMEOUT_S)
    )
    assert (await received).is_landed


async def _bring(
    pair: EnginePair, endpoint: RankedEndpoint, prompt: list[int], sampling: SamplingParams, chunk: Chunk
) -> Answer:
    key = HandoffKey(os.urandom(16), 1, 1)
    addresses = pair.addresses("tcp")
    sent: asyncio.Future[SendEnd] = asyncio.get_running_loop().create_future()

    def on_event(event: SendReleased | SendEnd) -> None:
        if isinstance(event, SendEnd):
            sent.set_result(event)

    fingerprint = pair.decode_info.fingerprint
    order = SendOrder(key, addresses, DECODE_EPOCH, fingerprint, chunk.end_token, TIMEOUT_S)
    async with asyncio.TaskGroup() as group:
        from_relay = replace(pair, prefill_info=replace(pair.prefill_info, tp_size=1))
        decode = group.create_task(from_relay.decode(prompt, key.token, sampling))
        endpoint.open(order, on_event, decode_ranks=pair.decode_info.tp_size)
        endpoint.announce(key, chunk)
        for layer in range(len(pair.decode_engine.layout.layers)):
            endpoint.layer_ready(key, layer)
        assert (await sent).is_landed
    return decode.result()
