"""The command line: complete, fast, and precise about what is wrong."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import msgspec.inspect
import pytest

from hocket.cluster import cli
from hocket.cluster import config as cluster
from hocket.cluster.model import DEMO_NAME, model_cache
from hocket.cluster.settings import settings_of
from hocket.router.config import RouterConfig
from hocket.workers.config import WorkerConfig

COMMANDS = (
    "",
    "serve",
    "doctor",
    "policy",
    "policy show",
    "policy set",
    "policy canary",
    "policy shadow",
    "policy rollback",
    "explain",
    "top",
    "router",
    "worker",
    "worker prefill",
    "worker decode",
    "model",
    "model demo",
    "model path",
    "lab",
    "lab diff",
    "lab chaos",
    "lab run",
)
HEAVY = (
    "vllm",
    "torch",
    "transformers",
    "nats",
    "starlette",
    "uvicorn",
    "uvloop",
    "ucxx",
    "numpy",
    "tokenizers",
    "asyncio",
)


def hocket(*arguments: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOCKET_")}
    command = [sys.executable, "-m", "hocket.cluster.cli", *arguments]
    return subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "COLUMNS": "200", **variables},
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_is_there_and_exits_0(command: str):
    done = hocket(*command.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: hocket {command}".rstrip())
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "struct", "absent"),
    [
        ("router", RouterConfig, ()),
        ("worker prefill", WorkerConfig, ("role",)),
        ("worker decode", WorkerConfig, ("role",)),
        ("serve", cluster.ServeConfig, ()),
        ("doctor", cluster.DoctorConfig, ()),
        ("policy show", cluster.PoolConfig, ()),
        ("explain", cluster.PoolConfig, ()),
        ("top", cluster.PoolConfig, ()),
    ],
)
def test_help_lists_every_setting_with_its_default_and_a_sentence(
    command: str, struct: type[msgspec.Struct], absent: tuple[str, ...]
):
    text = re.sub(r"\s+", " ", hocket(*command.split(), "--help").stdout)
    for setting in settings_of(struct, leave_out=absent):
        is_switch = isinstance(setting.shape, msgspec.inspect.BoolType)
        assert (f"--no-{setting.flag[2:]}" if is_switch else f"{setting.flag} {setting.metavar}") in text
        assert setting.description
        assert setting.description in text


def test_help_takes_under_0_3_s_and_imports_nothing_heavy():
    code = (
        "import sys; from hocket.cluster.cli import main\n"
        "try: main(['serve', '--help'])\n"
        f"except SystemExit: print(sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)\n"
    )
    used_s = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr == "[]\n"
    # Its CPU time: it waits for nothing, and on a busy machine the wall clock measures the others.
    assert min(used_s) < 0.3


def test_version_is_the_packages_own():
    done = hocket("--version")
    assert re.fullmatch(r"hocket \d+\.\d+\.\d+\n", done.stdout)
    assert done.returncode == 0


WRONG = [
    (("worker", "prefill", "--slots", "0"), "--slots: '0' is not a whole number >= 1 and <= 4096"),
    (("worker", "prefill", "--slots", "many"), "--slots: 'many' is not a whole number"),
    (("worker", "prefill", "--sim-itl-ms", "-1"), "--sim-itl-ms: '-1' is not a number >= 0"),
    (("worker", "prefill", "--sim-itl-ms", "nan"), "--sim-itl-ms: 'nan' is not a number >= 0"),
    (("worker", "prefill", "--engine", "sglang"), "--engine: 'sglang' is not one of sim, vllm"),
    (("worker", "prefill", "--engine-args", "{"), "--engine-args: '{' is not an object (JSON)"),
    (("worker", "prefill", "--engine-args", "[1]"), "--engine-args: '[1]' is not an object (JSON)"),
    (("worker", "prefill", "--worker-id", "x" * 41), "is not text of at most 40 characters"),
    (("worker", "prefill", "--sim-itl", "3"), "unrecognized arguments: --sim-itl 3 (did you mean --sim-itl-ms?)"),
    (("worker", "prefill", "--role", "decode"), "unrecognized arguments: --role decode"),
    (("worker", "both"), "invalid choice: 'both' (choose from 'prefill', 'decode')"),
    (("router", "--port", "65536"), "--port: '65536' is not a whole number >= 0 and <= 65535"),
    (("router", "--pool", "my pool"), "pool: a subject token is 1 to 64 of A-Z a-z 0-9 _ -, got 'my pool'"),
    (("serve", "--pool", "a.b"), "pool: a subject token is 1 to 64 of A-Z a-z 0-9 _ -, got 'a.b'"),
    (("worker", "decode", "--worker-id", "a*"), "worker_id: a subject token is 1 to 64"),
    (("serve", "--decode", "0"), "--decode: '0' is not a whole number >= 1 and <= 64"),
    (("serve", "--slotz", "3"), "unrecognized arguments: --slotz 3 (did you mean --slots?)"),
    (("serve", "--config", "/no/such/file.toml"), "--config /no/such/file.toml: cannot be read: No such file"),
    ((), "the following arguments are required: COMMAND"),
    (("sevre",), "invalid choice: 'sevre'"),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG)
def test_a_wrong_flag_exits_2_and_says_what_would_be_right(arguments: tuple[str, ...], says: str):
    done = hocket(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_variable_exits_2_and_is_named():
    done = hocket("worker", "prefill", HOCKET_SLOTS="0")
    assert done.returncode == 2
    assert "HOCKET_SLOTS: '0' is not a whole number >= 1" in done.stderr


def test_an_unknown_variable_exits_2_with_the_nearest_known_one():
    done = hocket("router", HOCKET_POTR="80")
    assert done.returncode == 2
    assert "unknown setting 'HOCKET_POTR'; did you mean HOCKET_PORT?" in done.stderr


def test_a_variable_of_another_command_is_no_mistake():
    options = cli.build_parser().parse_args(["router"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOCKET_SIM_ITL_MS", "3")
        assert cli._given(options, cli.ROUTER) == {}


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "worker.toml"
    file.write_text('slots = 5\npool = "file"\nsim_itl_ms = 1\n')
    monkeypatch.setenv("HOCKET_SLOTS", "6")
    monkeypatch.setenv("HOCKET_POOL", "variable")
    options = cli.build_parser().parse_args(["worker", "decode", "--config", str(file), "--slots", "7"])
    config = msgspec.convert({"role": "decode", **cli._given(options, cli.WORKER)}, WorkerConfig)
    assert (config.slots, config.pool, config.sim_itl_ms, config.block_tokens) == (7, "variable", 1.0, 32)


def test_a_folder_without_a_model_exits_1_and_names_it(tmp_path: Path):
    done = hocket("model", "path", str(tmp_path))
    assert done.returncode == 1
    assert f"{tmp_path} has no config.json" in done.stderr
    assert done.stdout == ""


def test_a_model_that_is_neither_folder_nor_id_exits_1():
    done = hocket("model", "path", "no-such-model")
    assert done.returncode == 1
    assert "no model folder 'no-such-model'" in done.stderr


def test_model_path_of_a_folder_imports_no_transformers(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    code = (
        f"import sys; from hocket.cluster.cli import main; main(['model', 'path', {str(tmp_path)!r}])\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout == f"{tmp_path}\nFalse\n"


@pytest.mark.slow
def test_a_worker_that_finds_no_server_exits_1_with_one_line_and_no_secret():
    model = model_cache() / DEMO_NAME
    url = "nats://someone:S3CRET-CANARY@127.0.0.1:1"
    done = hocket("worker", "decode", "--engine", "sim", "--model", str(model), HOCKET_NATS=url)
    assert done.returncode == 1
    assert "cannot reach NATS at nats://127.0.0.1:1" in done.stderr.replace("someone:***@", "").replace("***@", "")
    assert len(done.stderr.splitlines()) == 1
    assert "CANARY" not in done.stdout + done.stderr
