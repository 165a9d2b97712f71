"""The prefill worker and its queue: a long job stays its own, a lost ack is repeated, a dead engine gives jobs back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from scripted_router import ScriptedRouter
from workers_rig import PairMaker, SimPair, prompt_of, right_answer, sim_config

from hocket.bus import subjects
from hocket.bus.jobs import JobLimits
from hocket.bus.memory_bus import MemoryBroker, MemoryBus
from hocket.bus.messages import PrefillClaimed, PrefillDone, SamplingParams, WorkerCard
from hocket.workers.engines.base import EngineDead
from hocket.workers.prefill import PrefillWorker
from hocket.workers.worker import Identity, card_of

GREEDY = SamplingParams(max_tokens=5, temperature=0.0)
TOKEN = b"q" * 16


@asynccontextmanager
async def prefill_worker(pair: SimPair, broker: MemoryBroker) -> AsyncIterator[tuple[ScriptedRouter, WorkerCard]]:
    """One prefill worker on the pair's engine, and a router; the card is as the decode side's would be."""
    config = sim_config("prefill")
    card = card_of(config, Identity.new(config), pair.info)
    async with asyncio.timeout(20):
        bus, router_bus = MemoryBus(broker), MemoryBus(broker)
        for each in (bus, router_bus):
            await each.connect()
        router = ScriptedRouter(router_bus)
        await router.start()
        worker = PrefillWorker(bus, "main", card, pair.prefill, handoff_timeout_s=5.0, in_progress_s=0.05)
        running = asyncio.create_task(worker.run())
        await worker.listening.wait()
        try:
            yield router, card
        finally:
            running.cancel()
            await asyncio.wait([running])
            for each in (bus, router_bus):
                await each.aclose()
            if not running.cancelled():
                running.result()


async def publish(router: ScriptedRouter, card: WorkerCard, pair: SimPair, prompt: list[int]) -> int:
    job = router.job(card, prompt, GREEDY, token=TOKEN)
    return await router.publish(router.prefill_job(card, job, decode_epoch=pair.epoch))


async def test_a_job_longer_than_ack_wait_is_not_given_to_another(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=2.0)
    prompt = prompt_of(300, 1)
    async with prefill_worker(pair, MemoryBroker(jobs=JobLimits(ack_wait_s=0.2))) as (router, card):
        await publish(router, card, pair, prompt)
        assert await pair.answer(prompt, GREEDY, token=TOKEN) == right_answer(prompt, GREEDY)
        await router.wait_for(PrefillDone)
        assert len([event for event in router.events if isinstance(event, PrefillClaimed)]) == 1


async def test_a_job_whose_ack_was_lost_is_acked_again_and_not_computed_again(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=1.0)
    prompt = prompt_of(200, 1)
    broker = MemoryBroker(jobs=JobLimits(ack_wait_s=0.2))
    async with prefill_worker(pair, broker) as (router, card):
        sequence = await publish(router, card, pair, prompt)
        answer = asyncio.create_task(pair.answer(prompt, GREEDY, token=TOKEN))
        await router.wait_for(PrefillClaimed)
        broker.stop()
        assert await answer == right_answer(prompt, GREEDY)
        broker.start()
        await asyncio.sleep(0.5)  # More than ack_wait, less than what it takes to deliver it four times in vain.
        assert not await router.bus.jobs.delete(sequence)
        assert len([event for event in router.events if isinstance(event, PrefillClaimed)]) == 1


async def test_a_dead_engine_gives_its_jobs_back_and_ends_the_worker(sim_pair: PairMaker):
    pair = await sim_pair(sim_prefill_ms_per_token=5.0)

    async def serve_until_the_engine_dies() -> None:
        async with prefill_worker(pair, MemoryBroker()) as (router, card):
            await publish(router, card, pair, prompt_of(200, 1))
            await router.wait_for(PrefillClaimed)
            await pair.prefill.aclose()
            other = await router.bus.jobs.puller(subjects.prefill_jobs("main"))
            assert (await other.pull()).delivery == 2
            await other.aclose()

    with pytest.raises(EngineDead):
        await serve_until_the_engine_dies()
