"""Clients that leave, do not read, or send garbage; and failures on the other side. On raw sockets."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import time

import pytest

from hocket.bus.messages import FINISH_CANCELLED, FINISH_ERROR, FINISH_STOP, EntryDetail
from hocket.router.api import server as server_module
from hocket.router.api.server import ApiServer, ServerError
from hocket.router.generation import Overloaded


def body(**fields) -> bytes:
    return json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with an RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def takes_connections(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def read_events(reader: asyncio.StreamReader) -> str:
    """The response up to its end, chunk sizes and all."""
    response = b""
    async with asyncio.timeout(10):
        while not response.endswith(b"\r\n0\r\n\r\n"):
            part = await reader.read(1 << 16)
            assert part, response[-300:]
            response += part
    return response.decode()


@pytest.mark.parametrize(
    "leave", [asyncio.StreamWriter.close, reset, asyncio.StreamWriter.write_eof], ids=["fin", "rst", "half"]
)
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("phase", ["starting", "waiting", "streaming"])
async def test_a_client_that_leaves_cancels_its_generations(serve, says, leave, is_streamed, phase) -> None:
    api = await serve(None)
    if phase == "starting":
        api.core.admitted.clear()
    _, writer = await api.raw(body(stream=is_streamed, n=2))
    await api.core.wait(lambda: len(api.core.generations) == 2)
    if phase == "streaming":
        for stream_id in (1, 2):
            api.core.send(stream_id, await says.ids("a"))
        await asyncio.sleep(0)
    left_s = time.monotonic()
    leave(writer)
    await api.core.wait(lambda: set(api.core.cancelled) == {1, 2})
    assert time.monotonic() - left_s < 1
    assert not len(api.path)


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_choice_that_cannot_start_ends_the_others(serve, says, is_streamed) -> None:
    api = await serve(None)
    api.core.error, api.core.error_from = Overloaded("full", retry_after_s=1.0), 3
    answer = await api.chat(n=4, stream=is_streamed)
    assert answer.status_code == 429
    assert {1, 2} <= set(api.core.cancelled)
    assert not len(api.path)


async def test_a_stopped_server_lets_answers_end_within_the_grace_and_cuts_the_rest(serve, says, caplog) -> None:
    api = await serve(None)
    reader, _ = await api.raw(body(stream=True))
    stuck, _ = await api.raw(body(stream=True))
    await api.core.wait(lambda: len(api.core.generations) == 2)
    api.server.stop()
    async with asyncio.timeout(5):
        while await takes_connections(api.port):
            await asyncio.sleep(0.02)
    api.core.send(1, [*await says.ids("fox"), says.eos], finish=FINISH_STOP, detail=EntryDetail(stop_token=says.eos))
    assert content(await read_events(reader)) == "fox"
    async with asyncio.timeout(5):
        await stuck.read()
    await api.core.wait(lambda: api.core.cancelled == [2])


async def test_a_client_that_leaves_while_sending_its_body_costs_nothing(serve, says) -> None:
    api = await serve(await says("a"))
    _, writer = await api.connect()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    await writer.drain()
    writer.close()
    assert (await api.chat()).status_code == 200
    assert len(api.core.generations) == 1


async def test_slow_readers_get_everything_or_are_cut_and_do_not_slow_the_others(
    serve, says, text, monkeypatch
) -> None:
    monkeypatch.setattr(server_module, "SEND_BUFFER_BYTES", 4096)  # So that what counts is our own bound.
    api = await serve(None, client_backlog_bytes_max=128 << 10)
    paused_reader, _ = await api.raw(body(stream=True), small_window())
    dead_reader, _ = await api.raw(body(stream=True), small_window())
    reader, _ = await api.raw(body(stream=True))
    await api.core.wait(lambda: len(api.core.generations) == 3)
    ids = (await says.ids("the quick brown fox jumps over the lazy dog, "))[:8]
    memory_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = asyncio.create_task(read_events(reader))
    for step in range(4000):
        streams = (1, 2, 3) if step < 560 else (2, 3)  # 150 KB for the one that pauses, 1 MB for the others
        api.core.send_entries([(stream_id, 0, step * 8, ids, 0) for stream_id in streams])
        await asyncio.sleep(0)
    assert api.core.cancelled == [2]  # It never read: over the bound it was cut.
    api.core.send(3, [says.eos], index=32_000, finish=FINISH_STOP)
    api.core.send(1, [says.eos], index=4480, finish=FINISH_STOP)
    assert content(await got) == text.decode(ids * 4000)
    assert content(await read_events(paused_reader)) == text.decode(ids * 560)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_kb < 50_000
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):  # Not held open: its connection was aborted.
        await dead_reader.readexactly(1 << 30)


def small_window() -> socket.socket:
    """Of a client whose kernel takes little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return sock


def content(response: str) -> str:
    """The text of a streamed chat answer, whatever its HTTP chunks."""
    head, _, rest = response.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200")
    raw, at = b"", 0
    encoded = rest.encode()
    while True:
        end = encoded.index(b"\r\n", at)
        size = int(encoded[at:end], 16)
        if not size:
            break
        raw += encoded[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    events = [event.removeprefix("data: ") for event in raw.decode().split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"]["content"] for event in events[:-1])


async def test_a_failure_after_the_first_token_is_one_error_event_and_done(serve, says) -> None:
    api = await serve(None)
    reader, writer = await api.raw(body(stream=True, n=2))
    await api.core.wait(lambda: len(api.core.generations) == 2)
    api.core.send(1, await says.ids("a"))
    api.core.fail(1)
    response = await read_events(reader)
    assert response.startswith("HTTP/1.1 200")
    assert response.count('"error"') == 1
    assert response.count("[DONE]") == 1
    assert response.index('"content":"a"') < response.index('"code":"decode_worker_lost"') < response.index("[DONE]")
    await api.core.wait(
        lambda: 2 in api.core.cancelled
    )  # One failed choice ends the answer, so the other must not run on.
    assert not len(api.path)


async def test_the_openai_client_raises_the_error_of_a_broken_stream(serve, says) -> None:
    from openai import APIError

    api = await serve(None)
    asking = asyncio.create_task(
        api.openai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}], stream=True)
    )
    await api.core.wait(lambda: len(api.core.generations) == 1)
    api.core.send(1, await says.ids("a"))
    stream = await asking
    api.core.fail(1)
    with pytest.raises(APIError, match="the worker has gone"):
        [chunk async for chunk in stream]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_failure_before_the_first_byte_is_an_http_error(serve, says, is_streamed) -> None:
    api = await serve(None)
    if is_streamed:
        api.core.admitted.clear()
    asking = asyncio.create_task(api.chat(stream=is_streamed))
    await api.core.wait(lambda: len(api.core.generations) == 1)
    api.core.fail(1, "timeout", 504)
    api.core.admitted.set()
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize(
    ("finish", "detail", "code"),
    [
        (FINISH_ERROR, EntryDetail(error_code="oom", error="no memory"), "oom"),
        (FINISH_ERROR, None, "engine_error"),
        (FINISH_CANCELLED, None, "cancelled"),
    ],
)
async def test_an_engines_error_ends_a_whole_answer_with_a_500(serve, says, finish, detail, code) -> None:
    api = await serve(None)
    asking = asyncio.create_task(api.chat())
    await api.core.wait(lambda: len(api.core.generations) == 1)
    api.core.send(1, await says.ids("a"))
    api.core.send(1, [], index=1, finish=finish, detail=detail)
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, code)
    assert api.core.ended == {1: (finish, 1)}


async def test_a_bug_in_the_core_is_a_500_without_a_traceback(serve, says, caplog) -> None:
    api = await serve(None)
    api.core.error = ZeroDivisionError("secret")  # type: ignore[assignment]  # Not a RouterError: a bug.
    answer = await api.chat(n=2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "could not be started" in caplog.text


async def test_requests_on_one_connection_are_answered_in_order(serve, says) -> None:
    api = await serve(await says("hello", "world", "fox"))
    reader, writer = await api.connect()
    request = body()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(request)
    writer.write((head + request) * 3)
    for word in ("hello", "world", "fox"):
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        size = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        assert json.loads(await reader.readexactly(size))["choices"][0]["message"]["content"] == word


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    ],
    ids=range(8),
)
async def test_garbage_is_refused_and_the_next_client_is_served(serve, says, garbage) -> None:
    api = await serve(await says("a"))
    reader, writer = await api.connect()
    writer.write(garbage)
    async with asyncio.timeout(10):
        answer = await reader.read()  # To the end: the connection is closed.
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert (await api.chat()).status_code == 200


async def test_garbage_after_a_request_does_not_harm_its_answer_to_others(serve, says) -> None:
    api = await serve(await says("hello"), pace_s=0.01)
    reader, writer = await api.raw(body())
    writer.write(b"\x00\x01GARBAGE\r\n\r\n")
    other = await api.chat()
    assert other.json()["choices"][0]["message"]["content"] == "hello"
    async with asyncio.timeout(10):
        await reader.read()


async def test_an_endless_head_is_cut_off(serve, says) -> None:
    api = await serve(await says("a"))
    reader, writer = await api.connect()
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX: ")

    async def send_for_ever() -> None:
        while True:
            writer.write(b"x" * 16384)
            await writer.drain()
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(send_for_ever(), 10)
    assert (await api.http.get("/health")).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nHo"])
async def test_a_head_that_does_not_come_is_not_waited_for(serve, says, said, monkeypatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT_S", 0.1)
    api = await serve(await says("a"))
    reader, writer = await api.connect()
    writer.write(said)
    async with asyncio.timeout(10):
        assert (await reader.read()).startswith(b"HTTP/1.1 408")


async def test_a_port_that_is_taken_is_said_with_the_way_out(serve, says) -> None:
    api = await serve(await says("a"))
    with pytest.raises(ServerError, match=rf"127.0.0.1:{api.port}: .*choose one with --port"):
        ApiServer(lambda: None, host="127.0.0.1", port=api.port, grace_s=1)  # type: ignore[arg-type]  # Never called.
    with pytest.raises(ServerError, match="cannot listen on no.such.host.invalid"):
        ApiServer(lambda: None, host="no.such.host.invalid", port=0, grace_s=1)  # type: ignore[arg-type]  # Never called.
