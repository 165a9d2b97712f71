"""What every engine owes its worker (`engines/base.py`). An engine joins with a fixture that makes a prefill and a decode one."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from workers_rig import PairMaker, prompt_of

from hocket.bus.block_hash import block_hashes_of
from hocket.bus.messages import (
    FINISH_LENGTH,
    FINISH_NONE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    SamplingParams,
)
from hocket.transport.base import HandoffKey
from hocket.workers.engines.base import (
    BadTask,
    DecodeTask,
    Engine,
    EngineDead,
    EngineInfo,
    EngineLoad,
    HandoffFailed,
    PrefillTask,
    StepOutput,
)

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@dataclass
class Engines:
    """Two started engines, and what `start` said of the decode one, whose epoch is 7."""

    prefill: Engine
    decode: Engine
    info: EngineInfo


@pytest.fixture(params=["sim"])
async def engines(request: pytest.FixtureRequest, sim_pair: PairMaker) -> Engines:
    pair = await sim_pair(sim_itl_ms=1.0, sim_prefill_ms_per_token=0.05)
    return Engines(pair.prefill, pair.decode, pair.info)


async def decode(
    engine: Engine, prompt: list[int], sampling: SamplingParams = GREEDY, *, token: bytes | None = None
) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    task = DecodeTask(
        request_id=f"request-{token.hex() if token else 'local'}",
        attempt=1,
        token_ids=prompt,
        sampling=sampling,
        handoff_token=token,
        handoff_timeout_s=5.0,
    )
    await engine.decode(task, outputs.append)
    return outputs


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def prefill_task(engines: Engines, prompt: list[int], token: bytes, **changes: object) -> PrefillTask:
    settings: dict[str, object] = {
        "request_id": f"request-{token.hex()}",
        "key": HandoffKey(token, 1, 1),
        "token_ids": prompt,
        "decode_addresses": engines.info.handoff_addresses,
        "decode_epoch": 7,
        "fingerprint": engines.info.fingerprint,
        "timeout_s": 5.0,
    }
    return PrefillTask(**(settings | changes))  # type: ignore[arg-type]  # each test gives what the field wants


async def idle(engine: Engine, info: EngineInfo) -> None:
    async with asyncio.timeout(5):
        while engine.load() != EngineLoad(0, 0, info.kv_blocks):
            await asyncio.sleep(0.01)


async def test_steps_bring_every_token_once_and_only_the_last_has_an_end(engines: Engines):
    outputs = await decode(engines.decode, prompt_of(40, 1))
    assert len(tokens_of(outputs)) == 12
    assert [output.finish for output in outputs] == [FINISH_NONE] * (len(outputs) - 1) + [FINISH_LENGTH]
    assert outputs[0].computed_tokens == 40
    assert all(output.computed_tokens is None for output in outputs[1:])


async def test_the_answer_after_a_hand_off_is_the_one_computed_alone(engines: Engines):
    prompt = prompt_of(100, 2)
    async with asyncio.TaskGroup() as tasks:
        answer = tasks.create_task(decode(engines.decode, prompt, token=b"a" * 16))
        outcome = tasks.create_task(engines.prefill.prefill(prefill_task(engines, prompt, b"a" * 16)))
    assert outcome.result().computed_tokens + outcome.result().cached_tokens == 100
    assert outcome.result().kv_bytes > 0
    assert answer.result()[0].computed_tokens == 1
    assert tokens_of(answer.result()) == tokens_of(await decode(engines.decode, prompt))
    await idle(engines.decode, engines.info)


async def test_a_hand_off_that_never_comes_is_no_error_of_decode(engines: Engines):
    prompt = prompt_of(50, 3)
    task = DecodeTask("late", 1, prompt, GREEDY, b"b" * 16, 0.2)
    outputs: list[StepOutput] = []
    await engines.decode.decode(task, outputs.append)
    assert tokens_of(outputs) == tokens_of(await decode(engines.decode, prompt))


async def test_a_cancelled_decode_gives_everything_back(engines: Engines):
    started = asyncio.Event()
    task = DecodeTask("gone", 1, prompt_of(60, 4), SamplingParams(max_tokens=100, ignore_eos=True), None, 5.0)
    running = asyncio.create_task(engines.decode.decode(task, lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 5)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    await idle(engines.decode, engines.info)


async def test_a_cancelled_prefill_gives_everything_back(engines: Engines):
    running = asyncio.create_task(engines.prefill.prefill(prefill_task(engines, prompt_of(60, 4), b"c" * 16)))
    async with asyncio.timeout(5):
        while not engines.prefill.load().running:
            await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    await idle(engines.prefill, engines.info)


async def test_a_hand_off_that_is_refused_says_why(engines: Engines):
    task = prefill_task(engines, prompt_of(20, 5), b"d" * 16, decode_epoch=8)
    with pytest.raises(HandoffFailed) as failure:
        await engines.prefill.prefill(task)
    assert failure.value.reason == "refused:wrong_epoch"
    await idle(engines.prefill, engines.info)


async def test_prompts_that_no_such_engine_can_take_are_bad_tasks(engines: Engines):
    too_long = prompt_of(engines.info.max_model_len + 1, 6)
    with pytest.raises(BadTask):
        await decode(engines.decode, too_long)
    with pytest.raises(BadTask):
        await decode(engines.decode, [])
    with pytest.raises(BadTask):
        await engines.prefill.prefill(prefill_task(engines, too_long, b"e" * 16))


async def test_kv_events_name_the_blocks_of_the_prompt_in_hockets_own_hashes(engines: Engines):
    events: list[KvEvent] = []
    engines.decode.on_kv_events(events.extend)
    prompt = prompt_of(engines.info.block_tokens * 3 + 1, 7)
    await decode(engines.decode, prompt)
    held: dict[int, None] = {}
    for event in events:
        match event:
            case BlockStored():
                assert event.parent is None or event.parent in held
                held.update(dict.fromkeys(event.hashes))
            case BlockRemoved():
                for block_hash in event.hashes:
                    del held[block_hash]
            case AllBlocksCleared():
                held.clear()
    assert list(held)[:3] == block_hashes_of(prompt, engines.info.block_tokens)
    again = await decode(engines.decode, prompt)
    assert again[0].cached_tokens == 3 * engines.info.block_tokens


async def test_a_closed_engine_fails_what_runs_and_what_comes(engines: Engines):
    started = asyncio.Event()
    task = DecodeTask("cut", 1, prompt_of(10, 8), SamplingParams(max_tokens=100, ignore_eos=True), None, 5.0)
    running = asyncio.create_task(engines.decode.decode(task, lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 5)
    async with asyncio.timeout(5):
        await engines.decode.aclose()
    with pytest.raises(EngineDead):
        await running
    with pytest.raises(EngineDead):
        await decode(engines.decode, prompt_of(10, 8))
