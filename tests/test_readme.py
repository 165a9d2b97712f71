"""What the README shows works as it stands there."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.policies import RequestView, WorkerView, load_policy

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_policy_of_the_readme_loads_and_picks(tmp_path: Path) -> None:
    [block] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(block.splitlines()) <= 20
    path = tmp_path / "my_policy.py"
    path.write_text(block)
    policy = load_policy(f"{path}:ShortestQueueThenPrefix")
    request = RequestView(RequestId("r"), "m", 64, 16, 1, 16)
    workers = [
        WorkerView(
            WorkerId(name), 16, slots=8, kv_blocks=10, can_prefill_locally=True, hit_blocks=hits, in_flight=0,
            in_flight_blocks=0, running=running, waiting=0, kv_blocks_free=10,
        )
        for name, hits, running in (("a", 0, 0), ("b", 3, 0), ("c", 4, 1))
    ]  # fmt: skip
    assert policy.pick(request, workers, 0.0, random.Random(1)).worker_id == "b"


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("line", re.findall(r"^\$ make (\w+)", README, re.MULTILINE))
def test_every_make_target_of_the_readme_exists(line: str) -> None:
    assert re.search(rf"^{line}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_flag_of_the_readme_is_one_of_hocket_serve() -> None:
    shown = {
        flag for arguments in re.findall(r'ARGS="([^"]*)"', README) for flag in re.findall(r"--[a-z-]+", arguments)
    }
    command = [sys.executable, "-m", "hocket.cluster.cli", "serve", "--help"]
    known = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    assert shown
    assert not {flag for flag in shown if not re.search(rf"{flag}\b", known)}
