"""The config file and the plan of processes that follows from it."""

from __future__ import annotations

import itertools
from pathlib import Path

import msgspec
import pytest

from hocket.cluster import config as cluster
from hocket.cluster.config import Plan, ServeConfig, plan_from, share_cores
from hocket.cluster.settings import SettingsError, read_file
from hocket.router.config import RouterConfig
from hocket.workers.config import WorkerConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "cluster.toml"


def plan(file: dict[str, object] | None = None, **flags: str) -> Plan:
    return plan_from(flags=flags, environ={}, file=file or {}, where="f.toml")


def test_the_default_is_one_prefill_and_one_decode_worker():
    made = plan()
    assert [spec.name for spec in made.workers] == ["prefill-0", "decode-0"]
    assert {spec.config.engine for spec in made.workers} == {"vllm"}
    assert made.router.port == 8000


def test_flags_reach_every_worker_and_the_router():
    made = plan(engine="sim", decode="2", sim_itl_ms="3", policy="round_robin", model="/m", transports="tcp", port="0")
    assert [spec.name for spec in made.workers] == ["prefill-0", "decode-0", "decode-1"]
    for spec in made.workers:
        config = spec.config
        assert (config.engine, config.sim_itl_ms, config.model, config.transports) == ("sim", 3.0, "/m", "tcp")
        assert f"{config.role}-{config.worker_id}" == spec.name
    assert (made.router.policy, made.router.port, made.router.model) == ("round_robin", 0, "/m")


def test_a_worker_table_overrides_what_every_worker_has():
    file: dict[str, object] = {
        "worker": {"slots": 4, "block_tokens": 16},
        "workers": [
            {"role": "prefill", "gpus": "0", "dtype": "bfloat16"},
            {"role": "decode", "count": 2, "slots": 9, "cpu_cores": "0-3"},
        ],
    }
    prefill, *decodes = plan(file).workers
    assert (prefill.config.slots, prefill.config.dtype, prefill.config.block_tokens) == (4, "bfloat16", 16)
    assert dict(prefill.environment) == {"CUDA_VISIBLE_DEVICES": "0"}
    assert [(spec.name, spec.config.slots, spec.config.cpu_cores) for spec in decodes] == [
        ("decode-0", 9, "0-3"),
        ("decode-1", 9, "0-3"),
    ]


def test_the_example_file_is_right_and_shows_every_table():
    made = plan(read_file(EXAMPLE))
    assert [spec.name for spec in made.workers] == ["prefill-0", "decode-0", "decode-1"]
    assert made.workers[1].config.slots == 16
    assert made.workers[0].config.block_tokens == 16
    assert made.router.local_prefill_tokens_max == 16


WRONG: list[tuple[dict[str, object], str]] = [
    ({"slotz": 1}, "f.toml: unknown setting 'slotz'"),
    ({"worker": {"slotz": 1}}, "f.toml [worker]: unknown setting 'slotz'; did you mean slots?"),
    ({"worker": {"port": 1}}, "f.toml [worker]: unknown setting 'port'"),
    ({"worker": 3}, "f.toml: worker is not a table; write [worker]"),
    ({"router": {"polcy": "kv"}}, "f.toml [router]: unknown setting 'polcy'; did you mean policy?"),
    ({"router": {"port": 1}}, "f.toml [router]: unknown setting 'port'"),
    ({"worker": {"slots": "8"}}, "f.toml [worker]: slots: '8' is not a whole number"),
    ({"worker": {"slots": 0}}, "f.toml [worker]: slots: 0 is not a whole number >= 1 and <= 4096"),
    ({"port": 3.5}, "f.toml: port: 3.5 is not a whole number"),
    ({"decode": True}, "f.toml: decode: True is not a whole number"),
    ({"engine": "sglang"}, "f.toml: engine: 'sglang' is not one of sim, vllm"),
    ({"workers": {"role": "decode"}}, "f.toml: workers is not a list of tables; write [[workers]]"),
    ({"workers": [{"count": 2}]}, "f.toml [[workers]] 0: role is missing"),
    ({"workers": [{"role": "both"}]}, "f.toml [[workers]] 0: role: 'both' is not one of decode, prefill"),
    (
        {"workers": [{"role": "decode"}, {"role": "prefill", "slotz": 1}]},
        "f.toml [[workers]] 1: unknown setting 'slotz'",
    ),
    ({"workers": [{"role": "decode", "count": -1}]}, "f.toml [[workers]] 0: count: -1 is not a whole number"),
    ({"workers": [{"role": "decode", "gpus": 0}]}, "f.toml [[workers]] 0: gpus: 0 is not text"),
    ({"workers": [{"role": "decode", "tp": 2, "gpus": "0"}]}, "[[workers]] 0: gpus: '0' names 1, and tp is 2"),
    ({"worker": {"tp": 2}, "workers": [{"role": "decode", "gpus": "1,2,3"}]}, "gpus: '1,2,3' names 3, and tp is 2"),
    ({"workers": [{"role": "prefill"}]}, "f.toml: [[workers]] has no decode worker"),
    ({"workers": [{"role": "decode"}], "decode": 2}, "[[workers]] lists the workers, so decode cannot count them"),
    ({"workers": [{"role": "decode", "count": 2, "metrics_port": 9000}]}, "2 workers cannot share one port"),
]


@pytest.mark.parametrize(("file", "says"), WRONG)
def test_a_mistake_in_the_file_is_named_with_its_table(file: dict[str, object], says: str):
    with pytest.raises(SettingsError) as caught:
        plan(file)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", "slots = = 3", "a.toml: Invalid value"),
        ("a.json", "{", "a.json: Input data was truncated"),
        ("a.json", "[]", "a.json: Expected `object`"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, says: str):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_file(path)
    assert says in str(caught.value)


def test_every_worker_and_router_setting_has_exactly_one_place_in_serve():
    serve = {setting.name for setting in cluster.SERVE}
    worker = {setting.name for setting in cluster.EVERY_WORKER}
    router = {setting.name for setting in cluster.THE_ROUTER}
    for one, other in itertools.combinations((serve, worker, router), 2):
        assert not one & other
    all_of_them = {field.name for struct in (WorkerConfig, RouterConfig) for field in msgspec.structs.fields(struct)}
    assert all_of_them - serve - worker - router == {
        "role", "worker_id", "router_id", "metrics_port", "cpu_cores", "reuse_port",
    }  # fmt: skip


def test_the_serve_defaults_agree_with_the_processes_own():
    for setting in cluster.SERVE:
        for struct in (WorkerConfig, RouterConfig):
            own = {field.name: field.default for field in msgspec.structs.fields(struct)}
            if setting.name in own and setting.name not in ("nats", "grace_s"):
                assert setting.default == own[setting.name], setting.name
    assert ServeConfig().nats == ""


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([0, 1], ["0", "1"]),
        ([0], ["0", "0"]),
        ([0, 1, 2, 3], ["0,1", "2,3"]),
        (list(range(8)), ["1,2,3", "4,5,6"]),
        ([], ["", ""]),
    ],
)
def test_engines_on_the_cpu_share_the_cores_out(cores: list[int], expected: list[str]):
    assert [spec.config.cpu_cores for spec in share_cores(plan().workers, cores)] == expected


def test_cores_named_by_the_config_and_simulated_engines_are_left_alone():
    tables = [{"role": "prefill", "cpu_cores": "5"}, {"role": "decode"}, {"role": "decode", "engine": "sim"}]
    specs = share_cores(plan({"workers": tables}).workers, [0, 1])
    assert [spec.config.cpu_cores for spec in specs] == ["5", "0,1", ""]
