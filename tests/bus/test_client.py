"""The hardened client against a real server and against peers that misbehave on purpose."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hocket.bus import BusDisconnected, BusError, Delivery, EmbeddedServer, NatsBus
from hocket.bus.client import OUTBOUND_BYTES_MAX, mask_url, split_url
from hocket.bus.parser import Parser, ProtocolBroken
from hocket.bus.server import find_binary

from .conftest import until

INFO = b'INFO {"server_id":"x","version":"2.15.0","headers":true,"max_payload":1048576}\r\n'


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[NatsBus]:
    bus = NatsBus(url, name="test", connect_timeout_s=3)
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.aclose()


@asynccontextmanager
async def peer(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Something that listens like a server; its address."""
    writers: list[asyncio.StreamWriter] = []

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(on_client, "127.0.0.1", 0)
    try:
        yield f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        for writer in writers:
            writer.close()
        await listener.wait_closed()


async def shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(INFO)
    await reader.readuntil(b"PING\r\n")
    writer.write(b"PONG\r\n")


async def answer_pings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log: bytearray) -> None:
    while chunk := await reader.read(65536):
        log.extend(chunk)
        writer.write(b"PONG\r\n" * chunk.count(b"PING\r\n"))


# ---- what stock nats-py gets wrong


async def test_a_flush_follows_what_was_published_before_it() -> None:
    log = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await answer_pings(reader, writer, log)

    async with peer(serve) as url, connected(url) as bus:
        await bus.client.flush()
        log.clear()
        bus.publish_nowait("a", b"1")
        bus.publish_nowait("a", b"2")
        await bus.client.flush()
        assert bytes(log) == b"PUB a  1\r\n1\r\nPUB a  1\r\n2\r\nPING\r\n"


async def test_a_cancelled_flush_does_not_stop_the_reading(server: EmbeddedServer) -> None:
    async with connected(server.url) as bus:
        got: list[bytes] = []
        await bus.subscribe("a", lambda delivery: got.append(delivery.payload))
        flush = asyncio.create_task(bus.client.flush())
        await asyncio.sleep(0)
        flush.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flush
        await bus.client.flush()
        bus.publish_nowait("a", b"still here")
        await until(lambda: bool(got))


async def test_a_subject_that_is_not_utf8_does_not_stop_the_reading(server: EmbeddedServer) -> None:
    async with connected(server.url) as bus:
        got: list[Delivery] = []
        await bus.subscribe("t.*", got.append)
        user, _, password = server.url.removeprefix("nats://").partition("@")[0].partition(":")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.address.rpartition(":")[2]))
        writer.write(b'CONNECT {"verbose":false,"user":"%b","pass":"%b"}\r\n' % (user.encode(), password.encode()))
        writer.write(b"PUB t.\xff\xfe 1\r\nX\r\nPUB t.ok 1\r\nY\r\nPING\r\n")
        await reader.readuntil(b"PONG\r\n")
        writer.close()
        await writer.wait_closed()
        await until(lambda: len(got) == 2)
        assert [delivery.payload for delivery in got] == [b"X", b"Y"]
        assert bus.is_connected


async def test_requests_in_flight_fail_when_the_server_is_killed(server: EmbeddedServer) -> None:
    async with connected(server.url) as bus:
        await bus.subscribe("silent", lambda delivery: None)
        request = asyncio.create_task(bus.request("silent", b"", timeout_s=30))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(BusDisconnected):
            await request
        assert time.monotonic() - start < 1
        await server.wait_exit()
        await server.start()
        await until(lambda: bus.is_connected)


@pytest.mark.parametrize("line", [b"-ERR 'Unknown Protocol Operation'\r\n", b"WHAT is this\r\n", b"MSG nonsense\r\n"])
async def test_an_error_of_the_protocol_means_a_new_connection(line: bytes) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await shake_hands(reader, writer)
        if connections == 1:
            await asyncio.sleep(0.05)
            writer.write(line)
        await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        seen: list[bool] = []
        bus.on_connection(seen.append)
        await until(lambda: seen == [False, True])
        assert connections == 2


async def test_a_server_that_sends_info_before_pong_is_connected_to() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        await reader.readuntil(b"PING\r\n")
        writer.write(INFO + b"PING\r\nPONG\r\n")
        await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        await bus.client.flush()


async def test_reconnection_survives_servers_that_break_the_handshake() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        match connections:
            case 1:
                await shake_hands(reader, writer)
                await asyncio.sleep(0.02)
            case 2:
                writer.write(b"INFO this is no json\r\n")
            case 3:
                writer.write(b"HTTP/1.1 400 Bad Request\r\n")
            case 4:
                writer.write(INFO)
                await reader.readuntil(b"PING\r\n")
            case 5:  # It breaks between the handshake and the confirmation of the subscriptions.
                await shake_hands(reader, writer)
                await reader.readuntil(b"SUB ")
            case _:
                await shake_hands(reader, writer)
                await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        await until(lambda: connections == 6 and bus.is_connected)
        await bus.client.flush()
        names = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("nats ")]
        assert sorted(names) == ["nats flush", "nats ping", "nats read"]


async def test_a_half_open_connection_is_left() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await shake_hands(reader, writer)
        if connections == 1:
            await asyncio.Event().wait()  # Takes nothing and says nothing: the peer's network has gone.
        await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        bus.client.options["ping_interval"] = 0.05
        bus.client._ping_interval_task.cancel()  # type: ignore[union-attr]
        bus.client._ping_interval_task = asyncio.create_task(bus.client._ping_interval())
        while bus.publish_nowait("a", b"x" * 1_000_000):
            await asyncio.sleep(0)  # More than the sockets hold: close() would wait for ever.
        await until(lambda: connections == 2 and bus.is_connected)


async def test_a_full_outbound_buffer_refuses_and_recovers() -> None:
    go_on = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await go_on.wait()
        await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        queued = 0
        while bus.publish_nowait("a", b"x" * 1_000_000):
            queued += 1_000_000
            await asyncio.sleep(0)
        assert OUTBOUND_BYTES_MAX - 2_000_000 < queued < OUTBOUND_BYTES_MAX + 30_000_000
        with pytest.raises(BusDisconnected, match="too much"):
            await bus.request("a", b"x" * 1_000_000, timeout_s=1)
        go_on.set()
        await until(lambda: bus.publish_nowait("a", b"x" * 1_000_000))


# ---- for good


async def test_a_denied_publish_is_fatal(tmp_path: Path) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await reader.readuntil(b"PUB secret")
        writer.write(b"-ERR 'Permissions Violation for Publish to \"secret\"'\r\n")
        await answer_pings(reader, writer, bytearray())

    async with peer(serve) as url, connected(url) as bus:
        fatal = asyncio.create_task(bus.fatal())
        await asyncio.sleep(0.01)
        assert not fatal.done()
        bus.publish_nowait("secret", b"x")
        async with asyncio.timeout(5):
            error = await fatal
        assert "permissions violation" in str(error).lower()
        assert "secret" in str(error)


async def test_a_password_that_is_no_longer_right_is_fatal(server: EmbeddedServer) -> None:
    async with connected(server.url) as bus:
        await server.stop()
        async with EmbeddedServer(port=int(server.address.rpartition(":")[2])):
            async with asyncio.timeout(5):
                error = await bus.fatal()
        assert "Authorization Violation" in str(error)
        assert not bus.is_connected


async def test_a_wrong_password_fails_the_first_connection_at_once(server: EmbeddedServer) -> None:
    bus = NatsBus(f"nats://hocket:secret-guess@{server.address}", name="test")
    start = time.monotonic()
    with pytest.raises(BusError, match="Authorization Violation") as caught:
        await bus.connect()
    assert time.monotonic() - start < 2
    assert "secret-guess" not in str(caught.value)
    assert server.address in str(caught.value)


async def test_a_server_that_says_nothing_fails_the_first_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with peer(serve) as url:
        bus = NatsBus(url, name="test")
        with pytest.raises(BusError, match="cannot reach NATS at nats://127.0.0.1"):
            await bus.connect()


async def test_something_else_that_listens_is_named() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    async with peer(serve) as url:
        with pytest.raises(BusError, match="no NATS server, it said b'SSH"):
            await NatsBus(url, name="test").connect()


# ---- the end


async def test_a_bus_that_was_never_connected_can_be_closed(server: EmbeddedServer) -> None:
    bus = NatsBus(server.url, name="test")
    await bus.aclose()
    refused = NatsBus("nats://127.0.0.1:1", name="test", connect_timeout_s=0.2)
    with pytest.raises(BusError, match="127.0.0.1:1"):
        await refused.connect()
    await refused.aclose()


async def test_a_bus_can_be_closed_while_the_server_is_away_and_twice(server: EmbeddedServer) -> None:
    async with connected(server.url) as bus:
        await server.stop()
        await until(lambda: not bus.is_connected)
        await asyncio.sleep(0.15)  # within a reconnection
        async with asyncio.timeout(5):
            await bus.aclose()
            await bus.aclose()
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("nats ")]


async def test_a_close_does_not_wait_for_a_server_that_stopped_answering(server: EmbeddedServer) -> None:
    bus = NatsBus(server.url, name="test")
    await bus.connect()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        while bus.publish_nowait("a", b"x" * 1_000_000):
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await bus.aclose()
    finally:
        os.kill(server.pid, signal.SIGCONT)


# ---- TLS


@asynccontextmanager
async def tls_server(folder: Path) -> AsyncIterator[str]:
    """A nats-server with a certificate of its own for localhost; its address."""
    make = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    words = [*make.split(), "-addext", "subjectAltName=DNS:localhost"]
    made = await asyncio.create_subprocess_exec(
        *words, cwd=folder, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    assert await made.wait() == 0
    config = folder / "tls.conf"
    config.write_text('listen: "127.0.0.1:-1"\nmax_payload: 8388608\ntls { cert_file: cert.pem, key_file: key.pem }\n')
    process = await asyncio.create_subprocess_exec(
        *(find_binary(), "-c", config.name, "--ports_file_dir", ".", "-l", "log"), cwd=folder
    )
    try:
        ports = folder / f"nats-server_{process.pid}.ports"
        await until(lambda: ports.exists() and ports.read_text().strip().endswith("}"))
        yield f"tls://localhost:{json.loads(ports.read_text())['nats'][0].rpartition(':')[2]}"
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
async def test_tls_is_spoken_and_a_foreign_certificate_refused(tmp_path: Path) -> None:
    async with tls_server(tmp_path) as url:
        bus = NatsBus(url, name="test", tls=ssl.create_default_context(cafile=str(tmp_path / "cert.pem")))
        await bus.connect()
        await bus.subscribe("echo", lambda delivery: bus.publish_nowait(delivery.reply, delivery.payload) and None)
        for length in (5, 300_000):
            assert await bus.request("echo", b"x" * length, timeout_s=5) == b"x" * length
        await bus.aclose()
        with pytest.raises(BusError, match="certificate verify failed"):
            await NatsBus(url, name="test", connect_timeout_s=2).connect()


# ---- addresses


def test_credentials_are_split_off_and_masked() -> None:
    url = "nats://me:p%40ss@a:1,tls://[::1]:2,b"
    assert split_url(url) == (["nats://a:1", "tls://[::1]:2", "nats://b:4222"], "me", "p@ss")
    assert mask_url(url) == "nats://***@a:1,tls://[::1]:2,b"
    assert split_url("nats://token@h") == (["nats://h:4222"], "token", None)


@pytest.mark.parametrize("url", ["http://a", "", "nats://", "ws://a:1"])
def test_an_address_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="NATS address"):
        split_url(url)


# ---- the parser alone


def test_messages_cut_at_any_byte_are_the_same() -> None:
    stream = (
        b"MSG a 1 5\r\nhello\r\nPING\r\nHMSG b.c 2 _R.1 12 17\r\nNATS/1.0\r\n\r\nworld\r\n+OK\r\nMSG a 1 re 0\r\n\r\n"
        b"MSG gone 9 2\r\nxx\r\nPONG\r\nMSG big 1 70000\r\n" + b"z" * 70000 + b"\r\nINFO {}\r\n"
    )

    def parse(*chunks: bytes) -> tuple[list[tuple[bytes, ...]], list[bytes]]:
        got: list[tuple[bytes, ...]] = []

        def take(*message: bytes) -> None:
            got.append(message)

        parser = Parser({1: take, 2: take})
        return got, [line for chunk in chunks for line in parser.feed(chunk)]

    whole = parse(stream)
    assert whole[0] == [
        (b"a", b"", b"hello", b""),
        (b"b.c", b"_R.1", b"world", b"NATS/1.0\r\n\r\n"),
        (b"a", b"re", b"", b""),
        (b"big", b"", b"z" * 70000, b""),
    ]
    assert whole[1] == [b"PING", b"PONG", b"INFO {}"]
    for cut in [*range(150), *range(70000, len(stream), 7)]:
        assert parse(stream[:cut], stream[cut:]) == whole
    assert parse(*[stream[index : index + 1] for index in range(160)], stream[160:]) == whole


@pytest.mark.parametrize("bad", [b"MSG a\r\n", b"MSG a 1 x\r\n", b"HMSG a 1 2\r\n", b"A" * 5000])
def test_what_is_not_the_protocol_is_refused(bad: bytes) -> None:
    with pytest.raises(ProtocolBroken):
        Parser({}).feed(bad)


def test_a_reset_forgets_the_half_message_of_the_old_connection() -> None:
    got: list[bytes] = []
    parser = Parser({1: lambda subject, reply, payload, header: got.append(payload)})
    parser.feed(b"MSG a 1 5\r\nhe")
    parser.reset()
    parser.feed(b"MSG a 1 90000\r\nhe")
    parser.reset()
    assert parser.feed(b"MSG a 1 2\r\nok\r\n") == []
    assert got == [b"ok"]
