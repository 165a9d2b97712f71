"""`hocket serve` for real, with the simulator: ready, a first answer, a clean end whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hocket.cluster.model import DEMO_NAME, model_cache
from hocket.cluster.serve import curl_line

pytestmark = pytest.mark.slow
READY_S = 60.0


class Served:
    """One `hocket serve`. Every process of it carries a mark in its environment, so what is left can be found."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.mark = uuid.uuid4().hex
        self.output = ""
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HOCKET_")}
        model = model_cache() / DEMO_NAME
        common = (
            "--engine",
            "sim",
            "--transports",
            "tcp",
            "--port",
            "0",
            "--state-dir",
            str(folder),
            "--model",
            str(model),
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hocket.cluster.cli", "serve", *common, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "SERVE_TEST_MARK": self.mark},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
        self.process.stdout.close()

    def wait_ready(self) -> str:
        wait_until(lambda: "stop: Ctrl-C" in self.output or self.process.poll() is not None, READY_S)
        found = re.search(r"Hocket is ready at (http://\S+)", self.output)
        assert found is not None, self.output
        return found[1]

    def wait_exit(self, timeout_s: float) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(5.0)
        return code

    def pids(self, word: str = "") -> list[int]:
        """The living processes of this cluster whose command line has `word`."""
        found = []
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                marked = self.mark.encode() in (path / "environ").read_bytes()
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if marked and command and word in command:
                found.append(int(path.name))
        return found

    def close(self) -> None:
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.wait_exit(10.0)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.02)


def ask(url: str, tokens: int = 4) -> str:
    body = {"model": DEMO_NAME, "max_tokens": tokens, "messages": [{"role": "user", "content": "word " * 60}]}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["choices"][0]["finish_reason"])


Serve = Callable[..., Served]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*flags: str, folder: Path | None = None) -> Served:
        started.append(Served(folder or tmp_path / "state", *flags))
        return started[-1]

    yield start
    for served in started:
        served.close()


def test_workers_of_two_ranks_answer(serve: Serve):
    served = serve("--tp", "2", "--sim-heads", "2")
    assert ask(served.wait_ready()) == "length"


def test_the_printed_curl_line_works_and_ctrl_c_leaves_nothing(serve: Serve):
    served = serve("--prefill", "1", "--decode", "2")
    served.wait_ready()
    (line,) = re.findall(r"^curl .*$", served.output, re.MULTILINE)
    answer = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.rstrip().endswith("data: [DONE]")
    assert len(served.pids("cli worker decode")) == 2
    started_s = time.monotonic()
    served.process.send_signal(signal.SIGINT)
    assert served.wait_exit(15.0) == 0, served.output
    assert time.monotonic() - started_s < 10.0
    assert served.pids() == []
    assert "Traceback" not in served.output


def test_a_stream_that_runs_at_ctrl_c_is_finished_or_ended_within_ten_seconds(serve: Serve):
    served = serve("--sim-itl-ms", "50")
    url = served.wait_ready()
    answers: list[str] = []

    def stream() -> None:
        try:
            answers.append(ask(url, tokens=20))
        except OSError as error:
            answers.append(str(error))

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: b"\nhocket_num_requests_running 1.0\n" in _get(f"{url}/metrics"), 10.0)
    served.process.terminate()
    assert served.wait_exit(15.0) == 0
    thread.join(5.0)
    assert answers == ["length"]
    assert served.pids() == []


def test_kill_9_of_serve_itself_leaves_nothing(serve: Serve):
    served = serve()
    served.wait_ready()
    assert len(served.pids()) >= 5  # serve, guard, nats-server, router, two workers
    served.process.kill()
    wait_until(lambda: served.pids() == [], 15.0)


def test_a_worker_that_is_killed_comes_back(serve: Serve):
    served = serve("--decode", "1")
    url = served.wait_ready()
    (before,) = served.pids("cli worker decode")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: served.output.count("decode-0 is ready") == 2, 30.0)
    (after,) = served.pids("cli worker decode")
    assert after != before
    wait_until(lambda: "ready" in _status(url), 10.0)
    assert ask(url) == "length"
    served.process.terminate()
    assert served.wait_exit(15.0) == 0


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


def _status(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return f"ready {answer.status}"
    except OSError as error:
        return str(error)


def test_a_nats_server_that_is_killed_comes_back(serve: Serve):
    served = serve()
    url = served.wait_ready()
    (before,) = served.pids("nats-server")
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: served.pids("nats-server") not in ([], [before]), 15.0)
    wait_until(lambda: _answers(url), 20.0)
    served.process.terminate()
    assert served.wait_exit(15.0) == 0, served.output
    assert served.pids() == []


def _answers(url: str) -> bool:
    try:
        return ask(url) == "length"
    except OSError:
        return False


def test_ctrl_c_while_starting_and_a_second_one_end_at_once(serve: Serve):
    served = serve("--prefill", "2", "--decode", "2")
    wait_until(lambda: len(served.pids("cli worker")) == 4, 20.0)
    served.process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping" in served.output, 10.0)
    served.process.send_signal(signal.SIGINT)
    assert served.wait_exit(5.0) in (0, 1)
    wait_until(lambda: served.pids() == [], 5.0)


def test_a_port_in_use_fails_the_start_with_the_routers_words(serve: Serve):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = serve("--port", str(port))
        assert served.wait_exit(60.0) == 1
    assert "router ended while starting" in served.output
    assert str(port) in served.output
    assert served.pids() == []


def test_two_clusters_in_one_state_folder_are_refused(serve: Serve):
    first = serve()
    first.wait_ready()
    second = serve()
    assert second.wait_exit(30.0) == 1
    assert "another hocket serve uses" in second.output
    assert "--state-dir" in second.output


def test_the_servers_password_is_on_no_command_line_and_in_no_log(serve: Serve):
    served = serve()
    served.wait_ready()
    config = (served.folder / "nats" / "nats-server.conf").read_text()
    password = re.search(r'password: "([^"]+)"', config)
    assert password is not None
    for pid in served.pids():
        assert password[1].encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert password[1].encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    for log in (served.folder / "logs").iterdir():
        assert password[1] not in log.read_text()
    assert password[1] not in served.output


@pytest.mark.parametrize("model", ["it's", "a model"])
def test_the_curl_line_survives_the_shell(model: str):
    words = subprocess.run(
        f"printf '%s\\n' {curl_line('http://h:1', model).removeprefix('curl ')}",
        shell=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert json.loads(words[-1])["model"] == model


def test_the_example_file_serves_as_it_stands(serve: Serve):
    served = serve("--config", str(Path(__file__).parents[2] / "examples" / "cluster.toml"))
    url = served.wait_ready()
    assert "1 prefill and 2 decode workers" in served.output
    assert ask(url) == "length"
    os.kill(served.process.pid, signal.SIGINT)
    assert served.wait_exit(10.0) == 0
    assert served.pids() == []
