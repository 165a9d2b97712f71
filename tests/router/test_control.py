"""How a router tries a policy before it lets it decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from hocket.bus.ids import RequestId, WorkerId
from hocket.router.control import load_fresh, source_digest, try_policy
from hocket.router.control_messages import PolicyConfig
from hocket.router.policies import PolicyError, RequestView, WorkerView

WORKERS = (
    WorkerView(
        WorkerId("w1"), 16, slots=8, kv_blocks=100, can_prefill_locally=True, hit_blocks=0, in_flight=0,
        in_flight_blocks=0, running=0, waiting=0, kv_blocks_free=100,
    ),
)  # fmt: skip
INPUTS = (RequestView(RequestId("r"), "m", 64, 16, 1, local_prefill_tokens_max=16), WORKERS)
POLICY = """
import time
from hocket.router.policies import Choice

class Mine:
    def pick(self, request, workers, now, rng):
        {body}
        return Choice(workers[0].worker_id)
"""


def written(folder: Path, body: str) -> str:
    (folder / "mine.py").write_text(POLICY.format(body=body))
    return f"{folder}/mine.py:Mine"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError(request.tenant)", "raised KeyError: ''"),
        ("return Choice('elsewhere')", "'elsewhere', which was not offered"),
        ("return None", "raised AttributeError"),
        ("end = time.thread_time() + 0.005\n        while time.thread_time() < end: pass", "over its 1 ms"),
    ],
)
def test_a_policy_that_would_fail_is_refused_on_trial(tmp_path: Path, body: str, words: str) -> None:
    config = PolicyConfig("x", pick_budget_ms=1.0)
    name = written(tmp_path, body)
    with pytest.raises(PolicyError, match=words):
        try_policy(name, config, INPUTS, 0.0)
    try_policy(name, config, None, 0.0)  # Nothing is known that it could choose from.


def test_a_policy_that_works_passes_its_trial(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    name = written(tmp_path, f"with open({str(asked)!r}, 'a') as file: file.write('x')")
    try_policy(name, PolicyConfig(name, pick_budget_ms=1000.0), INPUTS, 0.0)
    assert asked.read_text() == "xxx"


def test_a_file_is_loaded_as_it_is_now_and_told_apart_by_its_digest(tmp_path: Path) -> None:
    digests = set()
    for word in ("aaa", "bbb"):
        name = written(tmp_path, f"return {word!r}")
        assert load_fresh(name).pick(*INPUTS, 0.0, None) == word  # type: ignore[arg-type, comparison-overlap]
        digests.add(source_digest(f"{name}?option=1"))
    assert len(digests) == 2
    assert source_digest("kv") == source_digest(f"{tmp_path}/missing.py:Mine") == source_digest("no.such:Thing") == ""
