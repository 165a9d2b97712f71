"""What is bridged between vLLM's versions, where it takes no engine to see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hocket.workers.config import WorkerConfig
from hocket.workers.engines.vllm import versions
from hocket.workers.engines.vllm.engine_args import Identity, engine_args

pytestmark = [
    # vLLM and what it imports, in this process.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_a_vllm_without_a_class_for_wrong_requests_raises_value_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = pytest.importorskip("vllm.exceptions")
    monkeypatch.delattr(exceptions, "VLLMClientError", raising=False)  # As 0.26 is.
    assert versions.client_errors() == (ValueError,)


def test_what_vllm_raises_for_a_wrong_parameter_is_a_client_error() -> None:
    vllm = pytest.importorskip("vllm")
    with pytest.raises(versions.client_errors()):
        vllm.SamplingParams(temperature=-1.0)


def test_kv_tensors_come_in_the_order_in_which_their_layers_are_computed() -> None:
    names = [f"model.layers.{index}.self_attn.attn" for index in range(6)]
    compilation = SimpleNamespace(static_forward_context=dict.fromkeys(["other", *names]))
    grouped = {name: object() for name in (*names[0::3], *names[1::3], *names[2::3], "draft")}  # as 0.26 lists them
    found = versions.in_forward_order(SimpleNamespace(compilation_config=compilation), grouped)
    assert list(found) == [*names, "draft"]
    assert found == grouped


def test_the_engine_keeps_no_kv_events_for_a_replay_that_nobody_asks_for(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text("{}")
    config = WorkerConfig(role="prefill", model=str(tmp_path))
    events = engine_args(config, Identity("p", 1, tmp_path))["kv_events_config"]
    assert events.enable_kv_cache_events
    assert events.buffer_steps == 1
