"""Prefill and decode workers on one bus: every answer is right and nothing is left, whatever happens on the way."""

from __future__ import annotations

import asyncio

from workers_rig import Cluster, prompt_of, right_answer

from hocket.bus.messages import FINISH_LENGTH, PrefillClaimed, PrefillDone, SamplingParams

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


async def test_a_prompt_computed_elsewhere_is_answered_exactly(cluster: Cluster):
    decode = await cluster.pair()
    prompt = prompt_of(100, 1)
    job, stream = await cluster.router.begin(decode, prompt, GREEDY)
    async with asyncio.timeout(5):
        await stream.ended.wait()
    assert stream.token_ids == right_answer(prompt, GREEDY)
    assert stream.finish == FINISH_LENGTH
    assert stream.details[0].computed_tokens == 1
    claimed = await cluster.router.wait_for(PrefillClaimed)
    done = await cluster.router.wait_for(PrefillDone)
    assert (claimed.request_id, claimed.delivery) == (job.request_id, 1)
    assert (done.computed_tokens, done.cached_tokens, done.kv_bytes) == (100, 0, 13 * 3 * 64)
