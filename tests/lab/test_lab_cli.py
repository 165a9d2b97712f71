"""`hocket lab run` and `plan` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hocket.cluster.cli import main

TRACE = "synthetic:poisson,requests=60,rate=3,prompt=600,output=20"
QUICK = ("--jobs", "1", "--quiet")


def test_every_combination_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = tmp_path / "rows.json"
    pools = ["--workers", "2", "--workers", "3", "--prefill", "1", "--decode", "1"]
    flags = [*pools, "--policy", "kv", "--link-gb-per-s", "10", "--link-gb-per-s", "50"]
    assert main(["lab", "run", "--trace", TRACE, *flags, *QUICK, "--json", str(rows)]) == 0
    found = [row["label"] for row in json.loads(rows.read_text())]
    pools = ["kv, 2 workers", "kv, 3 workers", "kv, 1P : 1D"]
    assert found == [f"{pool}, {link} GB/s" for pool in pools for link in (10, 50)]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(found)


def test_a_plan_says_what_to_do(capsys: pytest.CaptureFixture[str]):
    flags = ["--trace", TRACE, "--profile", "h200-llama-8b", "--slo", "ttft=1s,itl=50ms", *QUICK]
    assert main(["lab", "plan", *flags]) == 0
    assert capsys.readouterr().out.startswith("Do not disaggregate: 1 workers that do both (1 GPU)")


def test_the_report_is_one_page_with_its_plots(tmp_path: Path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "report.html"
    flags = ["--trace", TRACE, "--workers", "2", "--slo", "ttft=2s", *QUICK, "--html", str(page)]
    assert main(["lab", "run", *flags]) == 0
    text = page.read_text()
    assert text.count("<svg") == 6
    assert "TTFT &lt;= 2 s" in text
    assert "serves" in text
    assert "src=" not in text
    assert "<link" not in text


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--trace", "/nowhere"], "/nowhere"),
        (["--trace", TRACE, "--policy", "best"], "no policy 'best'"),
        (["--trace", TRACE, "--profile", "h300"], "no profile 'h300'"),
        (["--trace", TRACE, "--prefill", "1"], "--prefill and --decode belong together"),
        (["--trace", TRACE, "--workers", "0"], "at least one worker that decodes"),
    ],
)
def test_wrong_use_is_told_and_nothing_runs(flags: list[str], why: str, capsys: pytest.CaptureFixture[str]):
    assert main(["lab", "run", *flags, *QUICK]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("text", ["ttft", "ttft=fast", "tpot=2s", "itl=-5ms"])
def test_limits_that_are_none_are_refused(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["lab", "plan", "--trace", TRACE, "--slo", text])
    assert "--slo" in capsys.readouterr().err
