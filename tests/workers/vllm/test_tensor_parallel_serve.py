"""`hocket serve --tp 2`: a whole cluster with engines of two ranks, from the command line to the answer."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tiny_models import make_model
from tp_rig import prompt_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(600)]
START_S = 300.0
ANSWER_S = 200.0
STOP_S = 30.0


@asynccontextmanager
async def served(*arguments: str) -> AsyncIterator[str]:
    """The URL of a cluster, which has gone afterwards."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "hocket.cluster.cli", "serve", *arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout
    output = ""
    try:
        async with asyncio.timeout(START_S):
            while not (found := re.search(r"Hocket is ready at (http://\S+)", output)):
                line = await process.stdout.readline()
                assert line, output
                output += line.decode()
        yield found[1]
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
        try:
            await asyncio.wait_for(process.communicate(), STOP_S)
        except TimeoutError:
            process.kill()  # Its processes go with it.
            await process.communicate()
            raise


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def has_landed(page: str, direction: str) -> bool:
    return f'hocket_handoffs_total{{direction="{direction}",outcome="landed"' in page


async def test_a_cluster_of_two_ranks_each_answers(tmp_path: Path, demo_model: Path) -> None:
    model = make_model("llama", tmp_path / "tiny")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model / name, model)
    ports = {"prefill": free_port(), "decode": free_port()}
    file = tmp_path / "cluster.json"
    workers = [{"role": role, "metrics_port": port} for role, port in ports.items()]
    settings = {"max_model_len": 512, "kv_gib": 0.0625, "engine_args": {"skip_tokenizer_init": True}}
    file.write_text(json.dumps({"model": str(model), "worker": settings, "workers": workers}))
    flags = ["--config", str(file), "--engine", "vllm", "--tp", "2", "--port", "0", "--state-dir", str(tmp_path / "s")]
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    async with served(*flags) as url, httpx.AsyncClient(timeout=120, trust_env=False) as client:
        async with asyncio.timeout(ANSWER_S):
            for seed in itertools.count():  # Where cores are few the first steps are slower than a hand-off waits.
                answer = await client.post(f"{url}/v1/completions", json=body | {"prompt": prompt_of(200, seed)})
                pages = {
                    role: (await client.get(f"http://127.0.0.1:{port}/metrics")).text for role, port in ports.items()
                }
                if has_landed(pages["prefill"], "sent") and has_landed(pages["decode"], "received"):
                    break
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-hocket-plan"] == "remote"
        assert answer.json()["usage"]["completion_tokens"] == 8
