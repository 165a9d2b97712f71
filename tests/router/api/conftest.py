"""A router's API on loopback: the real server and token path, a tiny real tokenizer, and a scripted core in place of the bus."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from hocket.bus.base import Delivery
from hocket.bus.ids import RequestId, RouterId, WorkerId
from hocket.bus.messages import FINISH_LENGTH, FINISH_NONE, FINISH_STOP, Entry, EntryDetail, TokenFrame, encode
from hocket.router.api.app import build_app
from hocket.router.api.server import ApiServer
from hocket.router.api.stream import TokenPath
from hocket.router.config import RouterConfig
from hocket.router.control_messages import AttemptReceipt, Receipt
from hocket.router.generation import Failure, Generation, RouterError, Started
from hocket.router.text.model_text import ModelText

WORKER = WorkerId("decode-1-abc")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, user assistant system hello world\n" * 3,
    "naïve café 世界 🎉 👩‍👩‍👧‍👦",
]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a byte-level BPE of about 400 tokens and a context of 256."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256, "eos_token_id": eos}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}))
    return folder


@pytest.fixture(scope="session")
def text(model_folder: Path) -> Iterator[ModelText]:
    model = ModelText.load(model_folder)
    yield model
    model.close()


@dataclass
class Step:
    """One entry of a frame."""

    ids: list[int]
    finish: int = FINISH_NONE
    detail: EntryDetail | None = None


Script = Callable[[Generation, int], Sequence[Step]]


@dataclass
class ScriptedCore:
    """A small RouterCore: admits everything, and plays each generation's script through the token path, a step a turn.

    It stands for the bus and the workers. With `script=None` the test sends the frames itself (`send`).
    """

    script: Script | None = None
    pace_s: float = 0.0
    error: RouterError | None = None
    error_from: int = 0  # the first stream that gets the error
    not_ready: str | None = None
    admitted: asyncio.Event = field(default_factory=asyncio.Event)  # start() returns when it is set
    generations: dict[int, Generation] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    ended: dict[int, tuple[int, int]] = field(default_factory=dict)  # (FINISH_*, output tokens)
    stopped: dict[int, int] = field(default_factory=dict)
    first: list[int] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    late: list[tuple[int, int]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    path: TokenPath = field(init=False)
    _players: dict[int, asyncio.Task[None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.admitted.set()

    # ---- RouterCore

    async def start(self, generation: Generation, stream_id: int) -> Started:
        self.generations[stream_id] = generation
        self._note()
        await self.admitted.wait()
        if self.error is not None and stream_id >= self.error_from:
            raise self.error
        if self.script is not None:
            steps = self.script(generation, stream_id)
            self._players[stream_id] = asyncio.create_task(self._play(stream_id, steps))
        return Started(stream_id, "remote", WORKER, "scripted")

    async def _play(self, stream_id: int, steps: Sequence[Step]) -> None:
        index = 0
        for step in steps:
            await asyncio.sleep(self.pace_s)
            self.send(stream_id, step.ids, index=index, finish=step.finish, detail=step.detail)
            index += len(step.ids)

    def cancel(self, stream_id: int) -> None:
        if player := self._players.pop(stream_id, None):
            player.cancel()
        self.cancelled.append(stream_id)
        self._note()

    def receipt(self, request_id: RequestId) -> Receipt | None:
        for generation in self.generations.values():
            if generation.request_id == request_id and generation.explains:
                attempts = [AttemptReceipt(0.0, WORKER, "remote", "kv")]
                return Receipt(request_id, RouterId("r1"), "tiny", generation.prompt_tokens, 8, 1e9, attempts)
        return None

    def models(self) -> list[str]:
        return ["tiny"]

    def not_ready_reason(self) -> str | None:
        return self.not_ready

    def prompt_tokens_max(self) -> int | None:
        return 200

    # ---- StreamEvents

    def on_first_token(self, stream_id: int, detail: EntryDetail | None) -> None:
        self.first.append(stream_id)

    def on_gap(self, stream_id: int, next_index: int) -> None:
        self.gaps.append((stream_id, next_index))

    def on_end(self, stream_id: int, finish: int, output_tokens: int, detail: EntryDetail | None) -> None:
        self.ended[stream_id] = finish, output_tokens
        self._note()

    def on_stop_string(self, stream_id: int, output_tokens: int) -> None:
        self.stopped[stream_id] = output_tokens
        if player := self._players.pop(stream_id, None):
            player.cancel()
        self._note()

    def on_late_end(self, worker: WorkerId, stream_id: int, attempt: int) -> None:
        self.late.append((stream_id, attempt))

    # ---- for tests

    def send(
        self,
        stream_id: int,
        ids: list[int],
        *,
        index: int = 0,
        attempt: int = 0,
        finish: int = FINISH_NONE,
        detail: EntryDetail | None = None,
    ) -> None:
        """One frame with one entry, as bytes, as from the bus."""
        self.send_entries([(stream_id, attempt, index, ids, finish)], {} if detail is None else {0: detail})

    def send_entries(self, entries: list[Entry], details: dict[int, EntryDetail] | None = None) -> None:
        self.path.on_frame(Delivery("tok", "", encode(TokenFrame(WORKER, 1, entries, details or {}))))

    def fail(self, stream_id: int, code: str = "decode_worker_lost", status: int = 503) -> None:
        self.path.fail(stream_id, Failure(code, "the worker has gone", is_retryable=True, status=status))

    async def wait(self, condition: Callable[[], bool]) -> None:
        """Until the core has heard enough."""
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def _note(self) -> None:
        self.changed.set()

    async def aclose(self) -> None:
        for player in self._players.values():
            player.cancel()
        if self._players:
            await asyncio.wait(self._players.values())


@dataclass
class Api:
    """A served API and how to talk to it."""

    core: ScriptedCore
    path: TokenPath
    server: ApiServer
    http: httpx.AsyncClient
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def port(self) -> int:
        return self.server.port

    @functools.cached_property
    def openai(self) -> AsyncOpenAI:
        """Made when a test asks for it: it takes a while."""
        return AsyncOpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0)

    async def chat(self, **fields: object) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, **fields: object) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": "hello", **fields})

    async def connect(self, sock: socket.socket | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain connection, closed with the API."""
        if sock is None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        else:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 10)
        self.writers.append(writer)
        return reader, writer

    async def raw(
        self, body: bytes, sock: socket.socket | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A plain connection with one chat request sent."""
        reader, writer = await self.connect(sock)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        return reader, writer


class ApiFactory:
    """Serves APIs for one test."""

    def __init__(self, text: ModelText, stack: contextlib.AsyncExitStack) -> None:
        self._text = text
        self._stack = stack

    async def __call__(self, script: Script | None = None, *, pace_s: float = 0.0, **config: object) -> Api:
        core = ScriptedCore(script, pace_s)
        path = core.path = TokenPath(core, self._text.table)
        settings = RouterConfig(**config)  # type: ignore[arg-type]  # The test's own keywords.
        app = build_app(core, path, self._text, settings, registry=CollectorRegistry())
        server = ApiServer(app, host="127.0.0.1", port=0, grace_s=1.0)
        server.listen()
        serving = asyncio.create_task(server.run())
        http = httpx.AsyncClient(base_url=server.url, timeout=10)

        api = Api(core, path, server, http)

        async def stop() -> None:
            for writer in api.writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            if "openai" in vars(api):
                await api.openai.close()
            await http.aclose()
            await core.aclose()
            server.stop()
            await serving

        self._stack.push_async_callback(stop)
        return api


@pytest.fixture
async def serve(text: ModelText) -> AsyncIterator[ApiFactory]:
    """`await serve(script)` gives a served Api."""
    async with contextlib.AsyncExitStack() as stack:
        yield ApiFactory(text, stack)


class Says:
    """Scripts that answer with a text, one token a step."""

    def __init__(self, text: ModelText) -> None:
        self._text = text
        self.eos = next(iter(text.eos_ids))

    async def ids(self, answer: str) -> list[int]:
        [ids] = await self._text.encode([answer], add_special_tokens=False)
        return ids

    async def __call__(self, *answers: str, step_tokens: int = 1) -> Script:
        """The n-th generation of the test gets the n-th answer, the last one for all that follow."""
        encoded = [await self.ids(answer) for answer in answers]
        count = iter(range(1 << 30))

        def script(generation: Generation, stream_id: int) -> list[Step]:
            ids = encoded[min(next(count), len(encoded) - 1)]
            return steps(ids, generation.sampling.max_tokens, self.eos, step_tokens)

        return script


def steps(ids: list[int], max_tokens: int, eos: int, step_tokens: int) -> list[Step]:
    """What a worker sends for an answer of these tokens."""
    is_cut = len(ids) >= max_tokens
    sent = ids[:max_tokens] if is_cut else [*ids, eos]
    made = [Step(sent[at : at + step_tokens]) for at in range(0, len(sent), step_tokens)]
    made[-1].finish = FINISH_LENGTH if is_cut else FINISH_STOP
    if not is_cut:
        made[-1].detail = EntryDetail(stop_token=eos)
    return made


@pytest.fixture
def says(text: ModelText) -> Says:
    return Says(text)


@pytest.fixture
def step() -> type[Step]:
    return Step
