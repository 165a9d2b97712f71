"""`hocket doctor` against real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pool import Pool

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.fixture
def pool(nats_url: str, demo_model: Path) -> Iterator[Pool]:
    built = Pool(nats_url, demo_model)
    yield built
    built.stop()


def doctor(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hocket.cluster.cli", "doctor", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HOCKET_", "UCX_"))}
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env={**environment, **variables})


def test_every_pair_of_a_pool_has_a_row(pool: Pool, tmp_path: Path) -> None:
    for role in ("prefill", "decode", "decode"):
        pool.worker(role, transports="ucx,tcp")
    prefill, *decodes = pool.names
    file = tmp_path / "report.json"
    done = doctor("--pool", pool.pool, "--json", str(file), HOCKET_NATS=pool.nats_url)
    for decode in decodes:
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(f"{prefill} -> {decode} ")]
        assert "ucx(" in line
        assert "16 MiB" in line
    report = json.loads(file.read_text())
    assert [(row["prefill"], row["decode"]) for row in report["links"]] == [
        (prefill, decode) for decode in sorted(decodes)
    ]
    assert all(rate["gb_per_s"] > 0 for row in report["links"] for rate in row["rates"])
    assert set(report["hosts"]) == set(pool.names)
    assert done.returncode == (1 if any(finding["severity"] == "fix" for finding in report["findings"]) else 0)
    secret = pool.nats_url.partition(":")[2].partition(":")[2].partition("@")[0]
    assert len(secret) > 20
    assert secret not in done.stdout + done.stderr + file.read_text()


def test_a_pool_over_plain_tcp_on_one_machine_is_told_to_take_ucx(pool: Pool) -> None:
    for role in ("prefill", "decode"):
        pool.worker(role, transports="tcp")
    done = doctor("--pool", pool.pool, HOCKET_NATS=pool.nats_url)
    assert done.returncode == 1
    assert "only TCP between two processes of one machine (tcp): plain TCP knows no shared memory" in done.stdout
    assert "--transports ucx,tcp" in done.stdout


def test_a_pool_without_a_pair_is_refused(pool: Pool) -> None:
    done = doctor("--pool", pool.pool, HOCKET_NATS=pool.nats_url)
    assert done.returncode == 1
    assert "0 prefill and 0 decode workers" in done.stderr
    assert done.stdout == ""


def test_a_prefill_worker_that_is_stopped_does_not_hang_the_doctor(pool: Pool) -> None:
    for role in ("prefill", "decode"):
        pool.worker(role, transports="tcp")
    stopped = pool.names[next(iter(pool.names))]
    stopped.kill(19)
    try:
        done = doctor("--pool", pool.pool, HOCKET_NATS=pool.nats_url)
    finally:
        stopped.kill(18)
    assert done.returncode == 1
    assert "0 prefill and 1 decode workers that answer" in done.stderr


def test_local_measures_what_is_installed(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = doctor("--local", "--json", str(file))
    rows = {row.get("transport", row.get("failure")): row for row in json.loads(file.read_text())["links"]}
    assert rows["tcp"]["best_gb_per_s"] > 0
    assert "tcp on this machine" in done.stdout
    assert len(rows) >= 2, "tcp, and ucx or why it does not run"


def test_local_names_the_setting_that_keeps_shared_memory_out() -> None:
    pytest.importorskip("ucxx")
    done = doctor("--local", UCX_TLS="tcp")
    assert done.returncode == 1
    assert "UCX_TLS=tcp leaves shared memory out" in done.stdout


def test_wrong_use_is_2_and_no_server_is_1() -> None:
    assert doctor("--poool", "x").returncode == 2
    assert doctor("--pool", "a.b").returncode == 2
    done = doctor(HOCKET_NATS="nats://someone:S3CRET-CANARY@127.0.0.1:1")
    assert done.returncode == 1
    assert "cannot reach NATS" in done.stderr
    assert "CANARY" not in done.stdout + done.stderr


def test_the_pool_of_a_serve_is_found_without_a_url(demo_model: Path, tmp_path: Path) -> None:
    state = {"XDG_STATE_HOME": str(tmp_path)}
    arguments = ["serve", "--engine", "sim", "--model", str(demo_model), "--port", "0", "--pool", "doctored"]
    serve = subprocess.Popen(
        [sys.executable, "-m", "hocket.cluster.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **state},
    )
    file = tmp_path / "hocket" / "doctored" / "nats-url"
    try:
        assert serve.stdout is not None
        for line in serve.stdout:
            if "curl" in line:
                break
        assert file.stat().st_mode & 0o777 == 0o600
        done = doctor("--pool", "doctored", **state)
        assert "prefill-0" in done.stdout, done.stderr
        assert "decode-0" in done.stdout
        assert file.read_text().partition("@")[0].rpartition(":")[2] not in done.stdout + done.stderr
    finally:
        serve.terminate()
        serve.communicate(timeout=30)
    assert not file.exists()
