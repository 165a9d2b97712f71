"""A simulator with its real hand-off endpoint in a process of its own: engine_child.py FD CONFIG_JSON EPOCH.

Told what to do, and says what happens, over the socket FD; ends when that is closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent))

from faults_messages import Cancel, Command, Decode, Ended, Event, Look, Prefill, Progress, Ready, State

from hocket.bus.messages import SamplingParams
from hocket.transport.base import HandoffKey
from hocket.workers.config import WorkerConfig
from hocket.workers.engines.base import DecodeTask, EngineError, PrefillTask, StepOutput
from hocket.workers.engines.sim.engine import SimEngine

WATCH_S = 0.001


class Child:
    """The engine, its tasks, and the socket."""

    def __init__(self, engine: SimEngine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.engine = engine
        self.reader, self.writer = reader, writer
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def say(self, event: Event) -> None:
        self.writer.write(msgspec.json.encode(event) + b"\n")

    async def run(self) -> None:
        info = await self.engine.start()
        self.say(Ready(info.handoff_addresses, info.fingerprint, info.kv_blocks))
        watch = asyncio.create_task(self.watch())
        while line := await self.reader.readline():
            self.do(msgspec.json.decode(line, type=Command))
        watch.cancel()
        for task in self.tasks.values():
            task.cancel()
        await asyncio.wait([watch, *self.tasks.values()])
        await self.engine.aclose()

    def do(self, command: Command) -> None:
        match command:
            case Decode():
                self.tasks[command.number] = asyncio.create_task(self.decode(command))
            case Prefill():
                self.tasks[command.number] = asyncio.create_task(self.prefill(command))
            case Cancel():
                self.tasks[command.number].cancel()
            case Look():
                self.look()

    async def decode(self, command: Decode) -> None:
        made: list[StepOutput] = []
        sampling = SamplingParams(max_tokens=command.max_tokens, temperature=0.0)
        token, timeout_s = command.token, command.handoff_timeout_s
        task = DecodeTask(str(command.number), 1, command.token_ids, sampling, token, timeout_s)
        error = ""
        try:
            await self.engine.decode(task, made.append)
        except EngineError as caught:
            error = str(caught)
        except asyncio.CancelledError:
            error = "cancelled"
        computed = made[0].computed_tokens or 0 if made else 0
        self.say(Ended(command.number, [token for step in made for token in step.token_ids], computed, error))

    async def prefill(self, command: Prefill) -> None:
        key = HandoffKey(command.token, 1, command.delivery)
        task = PrefillTask(
            str(command.number), key, command.token_ids, command.addresses, command.epoch, command.fingerprint, 20.0
        )
        error, computed = "", 0
        try:
            computed = (await self.engine.prefill(task)).computed_tokens
        except EngineError as caught:
            error = str(caught)
        except asyncio.CancelledError:
            error = "cancelled"
        self.say(Ended(command.number, [], computed, error))

    async def watch(self) -> None:
        """Tell of every hand-off how far it has come."""
        told: dict[bytes, int] = {}
        receptions = self.engine._ranks[0]._receiver._receptions
        while True:
            for token, reception in receptions.items():
                if reception.grant and told.get(token) != reception.kv_bytes:
                    told[token] = reception.kv_bytes
                    self.say(Progress(token, reception.kv_bytes))
            for token in [token for token in told if token not in receptions]:
                self.say(Progress(token, told.pop(token), is_over=True))
            await asyncio.sleep(WATCH_S)

    def look(self) -> None:
        load, stats = self.engine.load(), self.engine.endpoint.stats
        fds = len(os.listdir("/proc/self/fd"))
        held = (load.running, load.waiting, load.kv_blocks_free, stats.receiving, stats.sending)
        self.say(State(*held, len(stats.links), fds, stats.received, stats.sent))


async def main(fd: int, config: WorkerConfig, epoch: int) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=fd), limit=1 << 24)
    engine = SimEngine(config, worker_id=config.role, epoch=epoch)
    await Child(engine, reader, writer).run()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=WorkerConfig), int(sys.argv[3])))
