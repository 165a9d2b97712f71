"""The two processes of `kv_handoff.py`, seen from the one that tells them what to do and lives on when they do not."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
from handoff_cases import Case
from handoff_methods import Facts
from handoff_roles import Answer, Command, Setup, Step

START_TIMEOUT_S = 60.0
STEP_TIMEOUT_S = 60.0  # the first one with a GPU compiles kernels
LINE_BYTES_MAX = 1 << 20


class MethodFailed(Exception):
    """One of the two processes failed, hung or ended in a step."""


class Transfer(NamedTuple):
    """One transfer."""

    seconds: float
    cpu_s: float  # of both processes
    link: str = ""


class _End:
    """One process."""

    def __init__(self, setup: Setup, script: str, folder: Path, environment: dict[str, str]) -> None:
        self._setup, self._script, self._environment = setup, script, environment
        self._log = folder / f"{setup.side}.log"
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as stderr:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, self._script, "--role", msgspec.json.encode(self._setup).decode()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=self._environment,
                start_new_session=True,
                limit=LINE_BYTES_MAX,
            )
        await self.answer(START_TIMEOUT_S)

    def tell(self, command: Command) -> None:
        assert self._process
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")

    async def answer(self, timeout_s: float = STEP_TIMEOUT_S) -> Answer:
        assert self._process
        assert self._process.stdout
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise MethodFailed(f"{self._setup.side} said nothing for {timeout_s:.0f} s") from None
        if not line:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._process.wait()
            last = (self.log_tail(1) or ["no word"])[0].strip()
            code = "" if self._process.returncode is None else f" with {self._process.returncode}"
            raise MethodFailed(f"{self._setup.side} ended{code}: {last[:150]}")
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise MethodFailed(f"{self._setup.side}: {answer.error}")
        return answer

    def log_tail(self, lines: int) -> list[str]:
        """The end of what it wrote to stderr."""
        return self._log.read_text(errors="replace").rstrip().splitlines()[-lines:] if self._log.exists() else []

    async def stop(self, *, grace_s: float) -> None:
        """Also of one that never started."""
        if self._process is None:
            return
        assert self._process.stdin
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()


class Pair:
    """Both, for any number of cases, one after the other."""

    def __init__(self, setup: Setup, script: str, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kv-handoff-")
        folder = Path(self._folder.name)
        sides = [msgspec.structs.replace(setup, side=side) for side in ("prefill", "decode")]
        self.prefill, self.decode = (_End(side, script, folder, environment) for side in sides)

    async def start(self) -> None:
        """Raises MethodFailed."""
        await self.prefill.start()
        await self.decode.start()

    async def stop(self, *, grace_s: float = 10.0) -> None:
        for end in (self.prefill, self.decode):
            await end.stop(grace_s=grace_s)
        self._folder.cleanup()

    def log_tails(self) -> str:
        """The end of both logs, to be shown after a failure."""
        return "\n".join(f"  {line}" for end in (self.prefill, self.decode) for line in end.log_tail(12))

    async def both(
        self, step: Step, *, case: Case | None = None, method: str = "", seconds: float = 0.0
    ) -> list[Answer]:
        """The decode side is told first. Raises MethodFailed."""
        ends = (self.decode, self.prefill)
        for end in ends:
            end.tell(Command(step, method, case, seconds=seconds))
        return [await end.answer(STEP_TIMEOUT_S + seconds) for end in ends]

    async def open(self, method: str, *, is_alone: bool) -> None:
        """Connect the two; `is_alone`: decode needs no other side."""
        self.decode.tell(Command("open", method))
        theirs = (await self.decode.answer()).mine
        if is_alone:
            return
        self.prefill.tell(Command("open", method, theirs=theirs))
        mine = (await self.prefill.answer()).mine
        self.decode.tell(Command("accept", method, theirs=mine))
        await self.decode.answer()

    async def once(self, method: str, *, ahead: bool, is_alone: bool) -> Transfer:
        """Raises MethodFailed."""
        self.decode.tell(Command("prepare", method))
        theirs: Facts = (await self.decode.answer()).mine
        if is_alone:
            self.decode.tell(Command("go", method))
            answer = await self.decode.answer()
            return Transfer(answer.at, answer.cpu_s)
        self.prefill.tell(Command("prepare", method, theirs=theirs, ahead=ahead))
        await self.prefill.answer()
        landed, sent = await self.both("go", method=method)
        return Transfer(landed.at - sent.at, landed.cpu_s + sent.cpu_s, landed.link)

    async def wrong_blocks(self) -> int:
        self.decode.tell(Command("check"))
        return (await self.decode.answer()).wrong_blocks

    async def spoil(self) -> None:
        self.decode.tell(Command("spoil"))
        await self.decode.answer()
