"""The load: raw sockets and one epoll loop, so that the client is not what is measured. `python load_client.py < LOAD.json`.

It runs as a process of its own and reads the CPU clocks of the others at the borders of its window, between two reads, so
the window and the tokens counted in it are the same. Two kinds of load: `streams` (all at once, until they end) and
`requests` (a closed loop of short ones on kept connections).

Tokens are counted by text: one event may carry several tokens, and half a character makes no event at all. Every stream
runs to its end, where the count is known, so the window's tokens are its share of all the text that the stream brought.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec
from measure import cpu_s, percentile

WORDS = (  # noqa: SIM905 - a list of literals would take 64 lines
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law"
).split()
"""64 words that are one token each after a space, in SmolLM2's vocabulary and in most others."""

_CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)*)"')
_FIRST_TEXT = re.compile(rb'"content": ?"[^"]')
_RESPONSE_END = b"\r\n0\r\n\r\n"
_DEADLINE_S = 120.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One window of load."""

    kind: str  # "streams" | "requests"
    port: int
    model: str
    connections: int
    prompt_words: int
    first_prompt: int  # prompts are numbered; no two windows use the same number
    max_tokens: int
    pids: dict[str, int]
    warm_s: float
    window_s: float
    stagger_s: float = 0.0  # between two starts
    tap_url: str = ""  # of the NATS server; "": no tap
    tap_subject: str = ""
    tap_s: float = 0.0
    answers_kept: int = 4


class Window(msgspec.Struct, kw_only=True):
    """What one window showed."""

    window_s: float = 0.0
    tokens: float = 0.0
    requests: int = 0
    events: int = 0
    cpu_s: dict[str, float] = {}
    ttft_ms: dict[str, float | None] = {}
    gap_ms: dict[str, float | None] = {}
    tap_to_read_ms: dict[str, float | None] = {}
    answers: dict[int, str] = {}  # prompt number -> text


def prompt(number: int, words: int) -> str:
    """Prompt `number` of `words` words. Two numbers differ within the first five words, so they share no KV block."""
    head = [WORDS[(number >> 6 * place) & 63] for place in range(min(words, 5))]
    return " ".join(head + [WORDS[(11 * place) & 63] for place in range(words - len(head))])


def messages(number: int, words: int) -> list[dict[str, str]]:
    """The chat around a prompt; with a system message of its own, or templates add a long one."""
    return [{"role": "system", "content": "Go"}, {"role": "user", "content": prompt(number, words)}]


def http_request(load: Load, number: int) -> bytes:
    """One POST on a kept connection."""
    body = json.dumps(
        {
            "model": load.model,
            "messages": messages(number, load.prompt_words),
            "max_tokens": load.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def text_of(parts: list[bytes]) -> str:
    """The text of one raw response."""
    return "".join(json.loads(b'"' + piece + b'"') for piece in _CONTENT.findall(_unchunked(b"".join(parts))))


def _unchunked(response: bytes) -> bytes:
    position = response.index(b"\r\n\r\n") + 4
    body = bytearray()
    while True:
        end = response.index(b"\r\n", position)
        chunk_bytes = int(response[position:end], 16)
        if not chunk_bytes:
            return bytes(body)
        body += response[end + 2 : end + 2 + chunk_bytes]
        position = end + 4 + chunk_bytes


class Connection:
    """One kept connection and the response that it is reading."""

    __slots__ = ("first_s", "last_s", "number", "parts", "sent_s", "socket", "tail", "window_parts")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.number = -1
        self.parts: list[bytes] = []
        self.window_parts = [0, 0]
        self.tail = b""
        self.sent_s = self.first_s = self.last_s = 0.0

    def send(self, request: bytes, number: int) -> None:
        """Begin a request."""
        self.number = number
        self.parts = []
        self.tail = b""
        self.first_s = self.last_s = 0.0
        self.sent_s = time.monotonic()
        self.socket.sendall(request)

    def read(self) -> tuple[bytes, bool]:
        """What came, and whether the response is complete. Raises ConnectionError unless it is a 200."""
        data = self.socket.recv(1 << 18)
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"prompt {self.number}: {data[:400]!r}")
        if not data:
            raise ConnectionError(f"prompt {self.number}: closed after {self.tail!r}")
        self.parts.append(data)
        self.tail = (self.tail + data)[-len(_RESPONSE_END) :]
        return data, self.tail == _RESPONSE_END


class Clocks:
    """The CPU clocks of the watched processes over one window."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids | {"client": os.getpid()}
        self._from: dict[str, float] = {}
        self._from_s = 0.0
        self.cpu_s: dict[str, float] = {}
        self.window_s = 0.0

    def _read(self) -> dict[str, float]:
        return {name: cpu_s(pid) for name, pid in self._pids.items()}

    @property
    def has_begun(self) -> bool:
        return bool(self._from)

    def begin(self) -> None:
        self._from, self._from_s = self._read(), time.monotonic()

    def end(self) -> None:
        self.cpu_s = {name: now - self._from[name] for name, now in self._read().items()}
        self.window_s = time.monotonic() - self._from_s


class Streams:
    """All streams at once, each once; window: from `warm_s` after the last first token, for `window_s` or until one ends."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._clocks = Clocks(load.pids)
        self._connections = [Connection(load.port) for _ in range(load.connections)]
        self._poller = select.epoll()
        self._by_fd = {connection.socket.fileno(): connection for connection in self._connections}
        self._events = 0  # within the window
        self._tap: socket.socket | None = None
        self._tap_s = 0.0
        self._gaps_ms: list[float] = []
        self._reads_ms: list[float] = []
        self._state = "starting"  # -> "warm" -> "window" -> "tap" -> "done"
        self._state_s = 0.0

    def run(self) -> Window:
        """Start them, read them to their ends."""
        deadline_s = time.monotonic() + _DEADLINE_S
        waiting = list(reversed(self._connections))
        open_streams = without_text = len(waiting)
        start_s = time.monotonic()
        while open_streams:
            now = time.monotonic()
            if now > deadline_s:
                raise TimeoutError(f"{open_streams} streams did not end in {_DEADLINE_S:.0f} s")
            while waiting and now >= start_s + (self._load.connections - len(waiting)) * self._load.stagger_s:
                self._start(waiting.pop(), self._load.connections - len(waiting) - 1)
            for fd, _ in self._poller.poll(self._load.stagger_s if waiting else 0.1):
                if (connection := self._by_fd.get(fd)) is None:
                    self._hear_tap()
                    continue
                had_text = connection.first_s > 0
                ended = self._take(connection)
                without_text -= (not had_text) and connection.first_s > 0
                open_streams -= ended
            self._advance(
                time.monotonic(), is_running=not without_text, has_ended=open_streams < self._load.connections
            )
        return self._window()

    def _start(self, connection: Connection, place: int) -> None:
        number = self._load.first_prompt + place
        connection.send(http_request(self._load, number), number)
        self._poller.register(connection.socket.fileno(), select.EPOLLIN)

    def _take(self, connection: Connection) -> bool:
        data, ended = connection.read()
        now = time.monotonic()
        events = data.count(b"data: ")
        if not connection.first_s and _FIRST_TEXT.search(data):
            connection.first_s = now
        if events:
            if self._state == "window":
                self._events += events
                self._gaps_ms.append((now - connection.last_s) * 1e3)
            elif self._state == "tap" and self._tap_s:
                self._reads_ms.append((now - self._tap_s) * 1e3)
            connection.last_s = now
        if ended:
            self._poller.unregister(connection.socket.fileno())
        return ended

    def _advance(self, now: float, *, is_running: bool, has_ended: bool) -> None:
        """The window opens and closes between two turns of the loop."""
        waited_s = now - self._state_s
        match self._state:
            case "starting" if is_running:
                self._enter("warm", now)
            case "warm" if waited_s >= self._load.warm_s:
                self._mark(0)
                self._clocks.begin()
                self._enter("window", now)
            case "window" if has_ended or waited_s >= self._load.window_s:
                self._clocks.end()
                self._mark(1)
                self._enter("tap", now)
                if self._load.tap_url:
                    self._open_tap()
            case "tap" if has_ended or waited_s >= self._load.tap_s:
                self._enter("done", now)

    def _mark(self, border: int) -> None:
        """Remember where each stream stands when the window begins (0) or ends (1)."""
        for connection in self._connections:
            connection.window_parts[border] = len(connection.parts)

    def _enter(self, state: str, now: float) -> None:
        self._state, self._state_s = state, now

    def _open_tap(self) -> None:
        """Subscribe to the token frames too, only now: the copy that the server sends us must not count in the window."""
        server = urlsplit(self._load.tap_url)
        self._tap = socket.create_connection((server.hostname, server.port or 4222))
        options = {"verbose": False, "pedantic": False, "user": server.username, "pass": server.password}
        self._tap.sendall(f"CONNECT {json.dumps(options)}\r\nSUB {self._load.tap_subject} 1\r\n".encode())
        self._poller.register(self._tap.fileno(), select.EPOLLIN)

    def _hear_tap(self) -> None:
        assert self._tap is not None
        data = self._tap.recv(1 << 18)
        if b"MSG " in data:
            self._tap_s = time.monotonic()
        if b"PING" in data:
            self._tap.sendall(b"PONG\r\n")

    def _window(self) -> Window:
        if not self._clocks.cpu_s:
            raise TimeoutError("the streams ended before the window did: raise max_tokens")
        step = max(1, len(self._connections) // max(1, self._load.answers_kept))
        return Window(
            window_s=self._clocks.window_s,
            tokens=sum(map(self._tokens, self._connections)),
            requests=len(self._connections),
            events=self._events,
            cpu_s=self._clocks.cpu_s,
            ttft_ms=spread([(each.first_s - each.sent_s) * 1e3 for each in self._connections]),
            gap_ms=spread(self._gaps_ms),
            tap_to_read_ms=spread(self._reads_ms),
            answers={each.number: text_of(each.parts) for each in self._connections[::step]},
        )

    def _tokens(self, connection: Connection) -> float:
        """How many tokens of one stream came within the window."""
        begin, end = connection.window_parts
        before, within, after = connection.parts[:begin], connection.parts[begin:end], connection.parts[end:]
        text_bytes = [sum(map(len, _CONTENT.findall(b"".join(parts)))) for parts in (before, within, after)]
        return self._load.max_tokens * text_bytes[1] / sum(text_bytes)


class Requests:
    """A closed loop: each connection sends its next request when the last one has ended; window: the clock."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._clocks = Clocks(load.pids)
        self._numbers: Iterator[int] = iter(range(load.first_prompt, load.first_prompt + 10_000_000))
        self._connections = [Connection(load.port) for _ in range(load.connections)]
        self._ended = 0
        self._ttft_ms: list[float] = []
        self._answers: dict[int, str] = {}

    def run(self) -> Window:
        """Warm up, measure for `window_s`, then read what is under way to its end."""
        poller = select.epoll()
        by_fd = {connection.socket.fileno(): connection for connection in self._connections}
        for connection in self._connections:
            poller.register(connection.socket.fileno(), select.EPOLLIN)
            self._send(connection)
        begin_s = time.monotonic() + self._load.warm_s
        ended_before = ended_after = 0
        while by_fd:
            now = time.monotonic()
            if not self._clocks.has_begun and now >= begin_s:
                self._clocks.begin()
                ended_before = self._ended
                self._ttft_ms.clear()
            elif not self._clocks.window_s and now >= begin_s + self._load.window_s:
                self._clocks.end()
                ended_after = self._ended
            for fd, _ in poller.poll(0.05):
                if self._take(by_fd[fd]):
                    if self._clocks.window_s:
                        poller.unregister(fd)
                        del by_fd[fd]
                    else:
                        self._send(by_fd[fd])
            if now > begin_s + self._load.window_s + 20:
                unfinished = [(each.number, b"".join(each.parts)[-200:]) for each in by_fd.values()]
                raise TimeoutError(f"these requests did not end: {unfinished}")
        return Window(
            window_s=self._clocks.window_s,
            requests=ended_after - ended_before,
            tokens=(ended_after - ended_before) * self._load.max_tokens,
            cpu_s=self._clocks.cpu_s,
            ttft_ms=spread(self._ttft_ms),
            answers=self._answers,
        )

    def _send(self, connection: Connection) -> None:
        number = next(self._numbers)
        connection.send(http_request(self._load, number), number)

    def _take(self, connection: Connection) -> bool:
        data, ended = connection.read()
        if not connection.first_s and _FIRST_TEXT.search(data):
            connection.first_s = time.monotonic()
            if not self._clocks.window_s:
                self._ttft_ms.append((connection.first_s - connection.sent_s) * 1e3)
        if ended:
            self._ended += 1
            if connection.number - self._load.first_prompt < self._load.answers_kept:
                self._answers[connection.number] = text_of(connection.parts)
        return ended


def spread(values: list[float]) -> dict[str, float | None]:
    """Median and 99th percentile."""
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def main() -> int:
    """Read a Load from stdin, write a Window to stdout."""
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    try:
        window = Streams(load).run() if load.kind == "streams" else Requests(load).run()
    except (ConnectionError, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 1
    sys.stdout.buffer.write(msgspec.json.encode(window))
    return 0


if __name__ == "__main__":
    sys.exit(main())
