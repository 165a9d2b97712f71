"""UCX over a network so slow that one message of KV takes longer than the silence that means death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio
from faults_messages import Decode, Ended
from faults_network import Network, unavailable
from faults_rig import BLOCK_TOKENS, COMPUTE_S, FAULT_S, LEASES_S, VOCABULARY, Engine, Pair, prompt_of

from hocket.bus.messages import SamplingParams
from hocket.workers.engines.sim.kv import CELL_BYTES, expected_tokens

WHY_NOT = unavailable()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
MESSAGE_BYTES = 16 << 20  # the one block of one layer that a prompt has
MESSAGE_S = 6.0
PLANES = MESSAGE_BYTES // (BLOCK_TOKENS * CELL_BYTES)
ANSWER_TOKENS = 2


@pytest_asyncio.fixture(loop_scope="module")
async def slow() -> AsyncIterator[tuple[Pair, Network]]:
    pytest.importorskip("ucxx")
    network = Network(50)
    changes = {"sim_layers": 1, "sim_heads": PLANES, "kv_blocks": 4}
    prefill = Engine("prefill", "ucx", wrap=network.wrap(0), changes=changes)
    decode = Engine("decode", "ucx", bind=network.hosts[1], wrap=network.wrap(1), changes=changes)
    pair = Pair(prefill, decode)
    try:
        await network.build()
        async with asyncio.TaskGroup() as tasks:
            for engine in pair.engines:
                tasks.create_task(engine.start({"UCX_TLS": "tcp,self"}))
        network.slow(int(8 * MESSAGE_BYTES / MESSAGE_S))
        yield pair, network
        pair.resume()
        for engine in pair.engines:
            await engine.aclose()
    finally:
        network.remove()


async def begin(pair: Pair, network: Network, number: int) -> tuple[asyncio.Future[Ended], asyncio.Future[Ended]]:
    """A prompt's answer and its hand-off, of whose one message a quarter is under way."""
    token, prompt = number.to_bytes(16, "big"), prompt_of(number, BLOCK_TOKENS)
    answer = pair.decode.begin(Decode(number, prompt, ANSWER_TOKENS, token, handoff_timeout_s=60.0))
    handed = pair.hand_over(token, prompt)
    async with asyncio.timeout(MESSAGE_S):
        await network.has_sent(MESSAGE_BYTES // 4)
    assert not answer.done()
    return answer, handed


async def check(answer: asyncio.Future[Ended], number: int, within_s: float) -> Ended:
    async with asyncio.timeout(within_s):
        ended = await answer
    sampling = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0)
    prompt = prompt_of(number, BLOCK_TOKENS)
    right = expected_tokens(prompt, sampling, planes=PLANES, vocabulary=VOCABULARY)
    assert (ended.error, ended.token_ids) == ("", right)
    return ended


async def test_a_message_may_take_longer_than_the_silence_that_means_death(slow: tuple[Pair, Network]) -> None:
    answer, handed = await begin(*slow, 1)
    ended = await check(answer, 1, MESSAGE_S + FAULT_S)
    assert ended.computed_tokens == 1, "it was given up"
    assert (await handed).error == ""


@pytest.mark.parametrize(
    "die",
    [
        lambda pair, network: pair.prefill.kill(),
        lambda pair, network: pair.prefill.pause(),
        lambda pair, network: network.silence("forward", "backward"),
        lambda pair, network: network.silence("forward"),
    ],
    ids=["killed", "stopped", "silent", "unheard"],
)
async def test_a_peer_that_dies_within_a_message_is_noticed(
    slow: tuple[Pair, Network], die: Callable[[Pair, Network], None]
) -> None:
    answer, _ = await begin(*slow, 1)
    die(*slow)
    ended = await check(answer, 1, FAULT_S + COMPUTE_S)
    assert ended.computed_tokens == BLOCK_TOKENS


async def test_kv_that_does_not_arrive_while_its_sender_is_heard_is_given_up(slow: tuple[Pair, Network]) -> None:
    """Every try ends when its message could have come at the slowest rate that is waited for."""
    answer, handed = await begin(*slow, 1)
    slow[1].lose_large()
    ended = await check(answer, 1, 3 * (FAULT_S + MESSAGE_BYTES / (1 << 20)) + COMPUTE_S)
    assert ended.computed_tokens == BLOCK_TOKENS
    async with asyncio.timeout(LEASES_S):
        assert (await handed).error.startswith("hand-off failed")
