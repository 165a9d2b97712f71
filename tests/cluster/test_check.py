"""`hocket serve --check`: what a plan takes and what does not fit, without starting anything."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from hocket.cluster.check import report_json, report_lines
from hocket.cluster.config import plan_from
from hocket.cluster.gpus import CARDS, Gpu, find_gpu, gpus_here, named_gpus
from hocket.cluster.preflight import preflight
from hocket.cluster.preflight_facts import MachineFacts, ModelFacts, Port, Report
from hocket.cluster.settings import SettingsError, read_file

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "deploy" / "models"
FILES = sorted((ROOT / "deploy").glob("*.toml"))
LLAMA_70B = "Llama-3.3-70B-Instruct-FP8-dynamic"
GIB = 1 << 30


def model_facts(name: str = LLAMA_70B, **changes: object) -> ModelFacts:
    config = json.loads((MODELS / name / "config.json").read_text())
    return ModelFacts(name, {**config, **changes})


def machine(named: str = "8xH200", **more: object) -> MachineFacts:
    found = named_gpus(named)
    facts: dict[str, object] = {
        "gpus": found, "own_gpus": found, "cores": tuple(range(64)), "memory_bytes": 1 << 40,
        "transports": ("cma", "cuda_ipc", "inproc", "tcp", "ucx"),
    }  # fmt: skip
    return MachineFacts(**{**facts, **more})  # type: ignore[arg-type]  # A test's own facts.


def good_file() -> dict[str, object]:
    """One prefill GPU and a pair that decodes."""
    return {
        "model": LLAMA_70B,
        "worker": {"block_tokens": 16, "max_model_len": 8192},
        "workers": [
            {"role": "prefill", "gpus": "0", "kv_gib": 60.0, "chunk_tokens": 8192, "slots": 4},
            {"role": "decode", "gpus": "1,2", "tp": 2, "kv_gib": 95.0, "slots": 32},
        ],
    }


def report(
    file: dict[str, object],
    facts: MachineFacts | None = None,
    models: tuple[ModelFacts, ...] = (),
    ports: tuple[Port, ...] = (),
) -> Report:
    plan = plan_from(flags={}, environ={}, file=file, where="f.toml")
    return preflight(plan, facts or machine(), models or (model_facts(),), ports)


def changed(prefill: dict[str, object] | None = None, decode: dict[str, object] | None = None) -> dict[str, object]:
    file = good_file()
    workers = file["workers"]
    assert isinstance(workers, list)
    file["workers"] = [{**workers[0], **(prefill or {})}, {**workers[1], **(decode or {})}]
    return file


# ---- what fits


def test_a_plan_that_fits_is_told_worker_by_worker():
    made = report(good_file())
    assert made.is_ok
    assert [finding.severity for finding in made.findings] == []
    prefill, decode = made.workers
    assert (prefill.gpus, decode.gpus, decode.tp) == (("0",), ("1", "2"), 2)
    assert prefill.kv is not None
    assert decode.kv is not None
    assert (prefill.kv.token_bytes, decode.kv.token_bytes) == (320 << 10, 160 << 10)
    assert [gpu.workers for gpu in made.gpus[1:3]] == [{"decode-0": decode.rank_bytes}] * 2
    assert made.gpus[3].workers == {}
    assert made.pinned_bytes == 3 * 512 << 20


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_deploy_file_fits_the_machine_it_is_for(file: Path):
    plan = read_file(file)
    name = str(plan["model"]).rpartition("/")[2]
    made = report(plan, machine(str(plan["machine_gpus"])), (ModelFacts(str(plan["model"]), model_facts(name).config),))
    assert [finding for finding in made.findings if finding.code != "kv_room"] == []
    assert made.is_ok
    assert all(worker.kv and worker.kv.requests > 8 for worker in made.workers)
    assert all(0.85 < gpu.share < 0.97 for gpu in made.gpus)  # All of them work, and vLLM has room to breathe.
    assert {worker.role for worker in made.workers} == {"prefill", "decode"}


def test_deploy_has_the_pools_that_are_asked_for():
    assert [path.stem for path in FILES] == [
        "gpt-oss-120b-8gpu", "llama-70b-fp8-2gpu", "llama-70b-fp8-4gpu", "llama-70b-fp8-8gpu",
    ]  # fmt: skip
    for path in FILES:
        assert len(named_gpus(str(read_file(path)["machine_gpus"]))) == int(path.stem[-4])


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_the_check_that_a_deploy_file_names_passes_as_written(file: Path, tmp_path: Path):
    """But for the port and the folder, which something else may use here."""
    line = next(line for line in file.read_text().splitlines() if "hocket serve --check" in line)
    done = serve(*line.partition("hocket serve ")[2].split(), "--port", "0", "--state-dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing to fix" in done.stdout


# ---- what does not

CONTRADICTIONS: list[tuple[dict[str, object], str, str, str]] = [
    (changed(decode={"gpus": "0,1"}), "gpu_twice", "GPU 0", "prefill-0 and decode-0 share it"),
    (changed(decode={"gpus": "1,1"}), "gpu_twice", "decode-0", "names GPU 1 twice"),
    (changed(decode={"gpus": "7,8"}), "gpu_missing", "decode-0", "there is no GPU 8; there are 8, 0 to 7"),
    (changed(decode={"gpus": "1,2,3", "tp": 3}), "tp", "decode-0", "tp 3 does not divide the model's 64 attention heads"),
    (changed(decode={"engine_args": {"tensor_parallel_size": 4}}), "tp", "decode-0", "engine_args asks for 4"),
    (changed(decode={"engine_args": {"pipeline_parallel_size": 2}}), "engine_args", "decode-0", "pipeline_parallel_size"),
    (changed(decode={"engine_args": {"max_model_len": "8k"}}), "engine_args", "decode-0", "max_model_len: '8k' is not"),
    (changed(prefill={"block_tokens": 24}), "block_tokens", "prefill-0", "24 is not a multiple of 16"),
    (changed(prefill={"max_model_len": 4096}), "max_model_len", "prefill-0 -> decode-0", "prompts over 4096 tokens"),
    (changed(decode={"max_model_len": 200_000}), "max_model_len", "decode-0", "is more than the model's 131072"),
    (changed(decode={"kv_gib": 1.0}), "kv_room", "decode-0", "408 KV blocks, and a request of 8192 tokens takes 512"),
    (changed(prefill={"kv_gib": 75.0}), "gpu_memory", "GPU 0", "prefill-0 take 146.6 GiB of 140.4 GiB"),
    (changed(decode={"kv_gib": 110.0}), "gpu_memory", "GPUs 1, 2", "decode-0 take"),
    (changed(prefill={"engine_args": {"kv_cache_dtype": "fp8"}}), "pair", "prefill-0", "KV dtype fp8 and bfloat16"),
    (changed(prefill={"dtype": "float16"}), "pair", "decode-0", "differ in their dtype float16 and bfloat16"),
    (changed(prefill={"engine": "sim"}), "pair", "prefill-0", "has the engine sim"),
    (changed(decode={"transports": "rdma"}), "transport", "decode-0", "no transport 'rdma'; installed: cma"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "code", "where", "says"), CONTRADICTIONS)
def test_what_cannot_be_is_named(file: dict[str, object], code: str, where: str, says: str):
    made = report(file)
    assert not made.is_ok
    found = [
        finding for finding in made.findings if (finding.code, finding.where, finding.severity) == (code, where, "fix")
    ]
    assert found, made.findings
    assert says in found[0].text


def test_a_fix_that_is_proposed_is_enough():
    """The KV that is said to fit does."""
    made = report(changed(prefill={"kv_gib": 75.0}))
    advice = next(finding.advice for finding in made.findings if finding.code == "gpu_memory")
    kv_gib = re.fullmatch(r"kv_gib = ([\d.]+) fits", advice)
    assert kv_gib
    assert report(changed(prefill={"kv_gib": float(kv_gib[1])})).is_ok
    least = next(
        finding.advice for finding in report(changed(decode={"kv_gib": 1.0})).findings if finding.code == "kv_room"
    )
    assert report(changed(decode={"kv_gib": float(least.split()[2])})).is_ok


def test_two_engines_may_share_a_gpu_that_is_split():
    half: dict[str, object] = {"gpus": "0", "kv_gib": 8.0, "tp": 1, "engine_args": {"gpu_memory_utilization": 0.45}}
    small = model_facts(num_hidden_layers=16)
    made = report(changed(prefill=half, decode=half), machine("1xH200"), (small,))
    assert made.is_ok
    assert [finding.code for finding in made.findings if finding.where == "GPU 0"] == ["gpu_shared", "gpu_idle"]
    assert len(made.gpus[0].workers) == 2
    too_much = {**half, "kv_gib": 60.0}
    over = report(changed(prefill=too_much, decode=too_much), machine("1xH200"), (small,))
    assert any(finding.code == "gpu_memory" and "prefill-0, decode-0 take" in finding.text for finding in over.findings)


def test_ranks_of_different_numbers_and_blocks_of_different_sizes_are_mapped():
    made = report(changed(prefill={"block_tokens": 32}, decode={"tp": 4, "gpus": "1,2,3,4", "kv_gib": 110.0}))
    assert made.is_ok
    assert [(finding.code, finding.severity) for finding in made.findings] == [("block_tokens", "note")]


def test_a_gpu_that_stays_mostly_empty_is_worth_a_word():
    made = report(changed(prefill={"kv_gib": 20.0}))
    assert made.is_ok
    assert [(finding.code, finding.where) for finding in made.findings] == [("gpu_idle", "GPU 0")]


def test_a_gpu_that_is_nearly_full_is_worth_a_word():
    made = report(changed(prefill={"kv_gib": 66.0}))
    assert made.is_ok
    assert [(finding.code, finding.where) for finding in made.findings] == [("gpu_tight", "GPU 0")]
    safer = re.fullmatch(r"kv_gib = ([\d.]+) is safer", made.findings[0].advice)
    assert safer
    assert report(changed(prefill={"kv_gib": float(safer[1])})).findings == ()


def test_the_gpus_that_are_here_must_be_those_that_were_named():
    file = {**good_file(), "machine_gpus": "8xH200"}
    facts = machine(own_gpus=named_gpus("2xH100"))
    assert [finding.text for finding in report(file, facts).findings if finding.code == "other_gpus"] == [
        "machine_gpus says 8 x H200, there are 2 x H100"
    ]
    elsewhere = report(file, machine(own_gpus=(), is_elsewhere=True, has_vllm=False, memory_bytes=8 * GIB))
    assert elsewhere.is_ok  # What this machine lacks is not what the plan's lacks.
    assert [finding.code for finding in elsewhere.findings] == ["elsewhere"]


def test_without_gpus_a_worker_that_wants_one_is_told_what_to_do():
    made = report(good_file(), machine(""))
    assert not made.is_ok
    assert any("--machine-gpus 8xH200" in finding.advice for finding in made.findings)


def test_a_machine_without_vllm_or_memory_is_named():
    made = report(
        good_file(), machine(has_vllm=False, memory_bytes=4 * GIB, state_problem="another hocket serve uses it")
    )
    assert {finding.code for finding in made.findings} >= {"vllm", "host_memory", "state"}


def test_fewer_cores_than_busy_processes_are_worth_a_word():
    made = report(good_file(), machine(cores=tuple(range(6))))
    assert made.is_ok
    assert made.cores_wanted == 1 + 1 + 2 + 3  # router, NATS, one engine of a rank and one of two
    assert [finding.code for finding in made.findings] == ["few_cores"]


def test_engines_on_cpus_are_counted_in_host_memory():
    small = model_facts(num_hidden_layers=2, quantization_config=None, vocab_size=32000)
    file: dict[str, object] = {"model": LLAMA_70B, "workers": [{"role": "decode", "cpu_cores": "0-3,90"}]}
    made = report(file, machine("", is_cpu_build=True, cores=(0, 1, 2, 3)), (small,))
    assert [finding.text for finding in made.findings if finding.code == "cores"] == ["this machine has no core 90"]
    assert made.workers[0].gpus == ()
    assert made.host_bytes > (made.workers[0].weight_bytes or 0) > 5 * GIB


def test_ports_that_are_taken_or_named_twice_are_named():
    ports = (
        Port("router", "API", "127.0.0.1", 8000, "cannot listen on 127.0.0.1:8000: Address already in use"),
        Port("decode-0", "/metrics", "127.0.0.1", 8000),
        Port("nats-server", "NATS", "127.0.0.1", 0),
        Port("decode-0", "KV", "127.0.0.1", 0),
    )
    found = [(finding.where, finding.text) for finding in report(good_file(), ports=ports).findings]
    assert found[0][0] == "router"
    assert "Address already in use" in found[0][1]
    assert found[1:] == [("decode-0", "port 8000 is router's already")]


def test_models_that_are_missing_or_not_fetched_yet():
    missing = report(good_file(), models=(ModelFacts(LLAMA_70B, None, "no model folder"),))
    assert [(finding.code, finding.severity) for finding in missing.findings] == [("model", "fix")]
    later = report(good_file(), models=(ModelFacts(LLAMA_70B, None, "not here yet", is_fetched_later=True),))
    assert later.is_ok
    assert [worker.kv for worker in later.workers] == [None, None]
    strange = report(good_file(), models=(ModelFacts(LLAMA_70B, {"hidden_size": 1}),))
    assert [finding.severity for finding in strange.findings] == ["fix"]


def test_weights_that_differ_from_their_config_are_worth_a_word():
    facts = model_facts()
    made = report(good_file(), models=(ModelFacts(facts.name, facts.config, file_bytes=141 * 10**9),))
    assert made.is_ok
    assert "its files hold 141.0 GB of weights, config.json describes 72.7 GB" in made.findings[0].text


def test_the_report_has_a_line_for_all_that_is_alike_and_json_the_sums():
    made = report(good_file(), ports=(Port("router", "API", "127.0.0.1", 8000),))
    text = "\n".join(report_lines(made))
    assert re.search(r"^decode-0 +33\.8 +95\.0 +0\.5 +\d\.\d +13\d\.\d$", text, re.MULTILINE)
    assert "GPU 1,2 (H200, 140.4 GiB): 94% by decode-0" in text
    assert "GPU 3,4,5,6,7 (H200, 140.4 GiB): nobody's" in text
    plain = json.loads(json.dumps(report_json(made)))
    assert plain["workers"][1]["rank_bytes"] == made.workers[1].rank_bytes
    assert plain["gpus"][0]["share"] == pytest.approx(made.gpus[0].share, abs=1e-4)


# ---- which GPUs


def test_gpus_are_named_by_card_or_by_size():
    assert named_gpus("8xH200") == (Gpu("H200", CARDS["H200"] << 20),) * 8
    assert named_gpus("h100") == (Gpu("h100", CARDS["H100"] << 20),)
    assert [gpu.memory_bytes for gpu in named_gpus("2x80GiB")] == [80 * GIB] * 2
    assert named_gpus("1x24GB")[0].memory_bytes == 24 * 10**9
    assert named_gpus("") == ()


@pytest.mark.parametrize("text", ["8xH900", "0xH200", "8 H200", "eight", "8x", "8x80", "x"])
def test_gpus_that_are_not_known_are_refused(text: str):
    with pytest.raises(SettingsError, match="is not like 8xH200 or 2x80GiB; cards known by name: A100"):
        named_gpus(text)


def test_gpus_of_the_machine_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the driver's tool, which this machine lacks; the lines are an H200's."""
    tool = tmp_path / "nvidia-smi"
    rows = "\\n".join(f"NVIDIA H200, GPU-{name}-11d2, 143771, {used}" for name, used in (("5a", 0), ("5b", 4096)))
    tool.write_text(f'#!/bin/sh\nprintf "{rows}\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpus_here()
    assert found == (
        Gpu("NVIDIA H200", 143771 << 20, 0, "GPU-5a-11d2"),
        Gpu("NVIDIA H200", 143771 << 20, 4096 << 20, "GPU-5b-11d2"),
    )
    assert [find_gpu(name, found) for name in ("0", "1", "2", "GPU-5b", "GPU-5", "")] == [0, 1, None, 1, None, None]
    here = machine("2xH200", gpus=found, own_gpus=found)
    prefill: dict[str, object] = {"gpus": "1"}
    one_each = changed(prefill, {"gpus": "0", "tp": 1, "kv_gib": 60.0, "slots": 16})
    used = report(one_each, here)
    assert [(finding.code, finding.where, finding.severity) for finding in used.findings] == [
        ("gpu_used", "GPU 1", "note")
    ]
    full = (found[0], msgspec.structs.replace(found[1], used_bytes=30 * GIB))
    taken = report(one_each, machine("2xH200", gpus=full, own_gpus=full))
    assert [(finding.code, finding.severity) for finding in taken.findings] == [("gpu_used", "fix")]


def test_without_a_driver_there_are_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_here() == ()


# ---- the command


def serve(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOCKET_")}
    return subprocess.run(
        [sys.executable, "-m", "hocket.cluster.cli", "serve", *flags],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={**environment, **variables},
    )  # fmt: skip


def test_check_starts_nothing_and_sees_a_port_that_is_taken(tmp_path: Path):
    state = tmp_path / "state"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = serve(
            "--check", "--engine", "sim", "--port", port, "--state-dir", str(state), "--model", str(MODELS / LLAMA_70B)
        )
    assert done.returncode == 1
    assert f"fix: router: port {port}: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stdout
    assert not state.exists()
    again = serve(
        "--check", "--engine", "sim", "--port", port, "--state-dir", str(state), "--model", str(MODELS / LLAMA_70B)
    )
    assert again.returncode == 0
    assert "nothing to fix" in again.stdout


def test_what_serve_would_refuse_check_refuses_in_the_same_words(tmp_path: Path):
    file = tmp_path / "f.toml"
    file.write_text("[worker]\nslotz = 3\n")
    done = serve("--check", str(file), "--json")
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert said["is_ok"] is False
    assert said["findings"][0]["text"] == f"{file} [worker]: unknown setting 'slotz'; did you mean slots?"
    assert serve("--config", str(file)).stderr == f"hocket: {said['findings'][0]['text']}\n"


def test_a_file_that_is_not_there_and_flags_that_contradict():
    assert serve("--check", "missing.toml").returncode == 1
    both = serve("--check", "a.toml", "--config", "b.toml")
    assert (both.returncode, both.stderr) == (2, "hocket: --check FILE and --config name a file each; leave one out\n")
    alone = serve("--json")
    assert (alone.returncode, alone.stderr) == (2, "hocket: --json is for the report of --check; give --check FILE\n")


def test_json_is_what_a_program_can_read(tmp_path: Path):
    here = ("--port", "0", "--state-dir", str(tmp_path))
    done = serve("--check", "deploy/gpt-oss-120b-8gpu.toml", "--model", "deploy/models/gpt-oss-120b", "--json", *here)
    assert done.returncode == 0
    said = json.loads(done.stdout)
    decode = next(worker for worker in said["workers"] if worker["role"] == "decode")
    assert (decode["tp"], decode["gpus"]) == (4, ["4", "5", "6", "7"])
    assert decode["kv"]["groups"] == ["window 128", "full"]
    assert decode["kv"]["token_bytes"] == 18 << 10
    assert (said["ports"][0]["process"], said["ports"][0]["port"]) == ("router", 0)


def test_a_misspelt_variable_is_refused_too():
    done = serve("--check", "--engine", "sim", HOCKET_POTR="1")
    assert done.returncode == 1
    assert "unknown setting 'HOCKET_POTR'; did you mean HOCKET_PORT?" in done.stdout


def test_another_cluster_in_the_same_state_folder_is_seen(tmp_path: Path):
    import fcntl

    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = serve(
            "--check",
            "--engine",
            "sim",
            "--port",
            "0",
            "--state-dir",
            str(tmp_path),
            "--model",
            str(MODELS / LLAMA_70B),
        )
    assert done.returncode == 1
    assert "another hocket serve uses" in done.stdout
