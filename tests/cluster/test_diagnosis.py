"""Every finding of `hocket doctor`, from facts alone."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hocket.bus.messages import HostFacts, RankLink
from hocket.cluster.diagnosis import (
    NVLINK_GB_PER_S,
    PINNED_GB_PER_S,
    Finding,
    PairFacts,
    Side,
    diagnose,
    limit_of,
    verdict_of,
)

HOST = HostFacts(
    host_id="one",
    ipc_namespace="ipc:[1]",
    copy_gb_per_s=12.0,
    shm_free_bytes=8 << 30,
    network_mbit_per_s={"eth0": 100_000},
    transports="ucx,tcp",
    ucxx="ucxx-cu13 0.52.0",
    ucx_parts=("cma", "cuda"),
)
OTHER_HOST = replace(HOST, host_id="other")
LINK = RankLink(0, 0, "ucx://h:1", "ucx(sysv,tcp)", False, "host", 14.0, 75.0, ((65536, 3.0), (1 << 20, 8.0)))
TCP_LINK = replace(LINK, address="tcp://h:1", transport="tcp")
GPU_LINK = replace(
    LINK, kv_memory="device", moves_device_memory=True, transport="ucx(cuda_ipc,sysv)", rates=((1 << 24, 300.0),)
)
GPU_SLOW_LANE = replace(GPU_LINK, moves_device_memory=False, transport="ucx(sysv,tcp)", rates=((1 << 24, 10.0),))


def pair(
    prefill: HostFacts | None = HOST,
    decode: HostFacts | None = HOST,
    link: RankLink | None = LINK,
    *,
    failure: str = "",
    detail: str = "",
    addresses: tuple[str, ...] = ("ucx://10.0.0.2:1",),
) -> PairFacts:
    return PairFacts(Side("p", prefill), Side("d", decode, addresses), link, failure, detail)


def found(*pairs: PairFacts) -> dict[str, Finding]:
    return {finding.code: finding for finding in diagnose(pairs)}


def both(facts: HostFacts, link: RankLink = LINK) -> PairFacts:
    return pair(facts, facts, link)


def test_a_good_pair_has_no_finding():
    assert diagnose([pair()]) == []
    assert verdict_of(pair()) == "good"
    assert diagnose([pair(HOST, HOST, GPU_LINK)]) == []


FIXES: dict[str, tuple[PairFacts, str, str]] = {  # code -> facts, what the text says, what the advice says
    "ucx_missing": (both(replace(HOST, ucxx=""), TCP_LINK), "not installed", "pip install 'hocket[ucx-cu12]'"),
    "ucx_without_rdma": (both(replace(HOST, rdma_devices=("mlx5_0",))), "no RDMA in this UCX build", "PREFER_SYSTEM"),
    "memlock": (
        both(replace(HOST, rdma_devices=("mlx5_0",), ucx_parts=("ib",), memlock_bytes=64 << 10)),
        "only 64 KiB",
        "ulimit -l",
    ),
    "ucx_without_cuda": (both(replace(HOST, cuda_devices=2, ucx_parts=("ib",))), "no CUDA", "ucxx-cu12"),
    "fingerprint": (
        PairFacts(Side("p", HOST, fingerprint="a"), Side("d", HOST, fingerprint="b"), LINK),
        "fingerprints",
        "same model",
    ),
    "no_shared_memory": (pair(link=TCP_LINK), "plain TCP knows no shared memory", "--transports ucx,tcp"),
    "slow": (
        pair(link=replace(LINK, rates=((65536, 0.5), (1 << 20, 1.0)))),
        "1.00 GB/s where one memory copy gives 12.0",
        "busy",
    ),
    "no_cuda_ipc": (pair(link=GPU_SLOW_LANE), "CUDA IPC not used because UCX found no way", "nvidia-smi topo"),
    "no_gpu_rdma": (pair(decode=OTHER_HOST, link=GPU_SLOW_LANE), "takes RDMA", "PREFER_SYSTEM"),
    "rdma_not_used": (
        pair(
            replace(HOST, rdma_devices=("mlx5_0",), ucx_parts=("ib",)),
            replace(OTHER_HOST, rdma_devices=("mlx5_0",), ucx_parts=("ib",)),
            replace(LINK, transport="ucx(tcp)"),
        ),
        "yet the link is ucx(tcp)",
        "UCX_NET_DEVICES",
    ),
    "no_answer": (pair(link=None, failure="no_answer"), "did not answer", "log"),
    "not_started": (
        pair(link=None, failure="not_started", detail="ucxx is broken"),
        "does not run here: ucxx is",
        "pip",
    ),
    "unreachable": (pair(link=None, failure="unreachable", detail="timed out"), "timed out", "firewalls"),
    "loopback": (
        pair(decode=OTHER_HOST, link=None, failure="unreachable", addresses=("tcp://127.0.0.1:1",)),
        "no other machine reaches",
        "--bind",
    ),
    "no_address": (pair(link=None, failure="unreachable", addresses=()), "takes KV nowhere", "log"),
}
NOTES: dict[str, tuple[PairFacts, str, str]] = {
    "ucx_not_used": (both(replace(HOST, transports="tcp")), "not configured", "--transports ucx,tcp"),
    "small_shm": (both(replace(HOST, shm_free_bytes=1 << 20)), "1 MiB free", "--shm-size"),
    "busy": (pair(link=None, failure="busy"), "not measured, busy", "again"),
    "no_room": (pair(link=None, failure="no_room"), "no room", "again"),
    "draining": (pair(link=None, failure="draining"), "draining", "again"),
    "unsupported": (pair(link=None, failure="unsupported", detail="vllm measures no links"), "vllm", "--local"),
    "worker_gone": (pair(link=None, failure="wrong_epoch"), "went away", "again"),
    "no_rdma_devices": (
        pair(decode=OTHER_HOST, link=replace(LINK, transport="ucx(tcp)")),
        "no RDMA in this UCX build",
        "",
    ),
    "high_latency": (pair(link=replace(LINK, round_trip_us=20_000.0)), "20.0 ms", "cores"),
}


@pytest.mark.parametrize("code", [*FIXES, *NOTES])
def test_each_finding_says_what_is_wrong_and_what_helps(code: str):
    facts, text, advice = (FIXES | NOTES)[code]
    finding = found(facts)[code]
    assert finding.severity == ("fix" if code in FIXES else "note")
    assert text in finding.text
    assert advice in finding.advice
    assert finding.where in ("p", "d", "p -> d")


@pytest.mark.parametrize("code", [*FIXES, *NOTES])
def test_a_pair_with_another_trouble_does_not_have_it(code: str):
    assert code not in found(pair())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"settings": {"UCX_TLS": "tcp,self"}}, "UCX_TLS=tcp,self leaves shared memory out"),
        ({"settings": {"UCX_TLS": "^sysv"}}, "UCX_TLS=^sysv leaves shared memory out"),
        ({"settings": {"UCX_MM_ERROR_HANDLING": "n"}}, "UCX_MM_ERROR_HANDLING"),
        ({"ipc_namespace": "ipc:[2]"}, "different IPC namespaces"),
        ({}, "UCX found no shared memory"),
        ({"settings": {"UCX_TLS": "all"}}, "UCX found no shared memory"),
        ({"settings": {"UCX_TLS": "tcp,sm"}}, "UCX found no shared memory"),
    ],
)
def test_why_two_processes_of_one_machine_talk_over_tcp(change: dict[str, object], reason: str):
    link = replace(LINK, transport="ucx(tcp)")
    assert reason in found(pair(decode=replace(HOST, **change), link=link))["no_shared_memory"].text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ipc_namespace": "ipc:[2]"}, "different IPC namespaces"),
        ({"settings": {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}}, "d allocates expandable segments"),
        ({"settings": {"PYTORCH_ALLOC_CONF": "a:1,expandable_segments: true"}}, "d allocates expandable segments"),
        ({"settings": {"UCX_TLS": "tcp,sysv"}}, "UCX_TLS=tcp,sysv leaves it out"),
        ({"settings": {"UCX_TLS": "tcp,cuda"}}, "no way between these GPUs"),
        ({"ucx_parts": ("cma",)}, "the UCX of d knows no CUDA"),
    ],
)
def test_why_cuda_ipc_is_not_used(change: dict[str, object], reason: str):
    finding = found(pair(decode=replace(HOST, **change), link=GPU_SLOW_LANE))["no_cuda_ipc"]
    assert reason in finding.text
    assert finding.advice


def test_plain_tcp_that_was_asked_for_is_no_finding():
    assert diagnose([replace(pair(link=TCP_LINK), only="tcp")]) == []


def test_a_missing_ucx_is_said_once_of_this_machine():
    here = Side("this machine", replace(HOST, ucxx=""))
    ucx = PairFacts(here, here, None, "not_started", "ucxx cannot be imported", "ucx")
    tcp = PairFacts(here, here, TCP_LINK, only="tcp")
    assert [(finding.code, finding.where) for finding in diagnose([ucx, tcp])] == [("ucx_missing", "this machine")]


def test_what_is_to_be_fixed_comes_first_and_once():
    broken = replace(HOST, rdma_devices=("mlx5_0",))
    noisy = replace(LINK, round_trip_us=9_000.0)
    findings = diagnose([pair(broken, HOST, noisy), pair(broken, HOST, noisy)])
    assert [finding.code for finding in findings] == ["ucx_without_rdma", "high_latency"]


def test_what_the_hardware_gives():
    assert limit_of(pair(decode=None)) is None
    assert limit_of(pair(link=None, failure="busy")) is None
    assert (limit := limit_of(pair(decode=replace(HOST, copy_gb_per_s=9.0)))) is not None
    assert (limit.gb_per_s, limit.why) == (9.0, "one memory copy")
    assert (
        limit := limit_of(pair(decode=replace(OTHER_HOST, network_mbit_per_s={"a": 1000, "b": 25_000})))
    ) is not None
    assert (limit.gb_per_s, limit.why) == (3.125, "a network of 25 Gbit/s")
    assert limit_of(pair(decode=replace(OTHER_HOST, network_mbit_per_s={}))) is None
    assert (limit := limit_of(pair(link=GPU_LINK))) is not None
    assert limit.gb_per_s == NVLINK_GB_PER_S
    big = replace(HOST, copy_gb_per_s=80.0)
    assert (limit := limit_of(both(big, GPU_SLOW_LANE))) is not None
    assert limit.gb_per_s == PINNED_GB_PER_S


def test_verdicts():
    slow = replace(LINK, rates=((65536, 0.1),))
    assert verdict_of(pair(link=slow)) == "slow"
    assert verdict_of(pair(decode=None)) == "measured"
    assert verdict_of(pair(link=None, failure="busy")) == "busy"
    assert verdict_of(pair(link=None, failure="unreachable")) == "failed"
    line = replace(OTHER_HOST, network_mbit_per_s={"eth0": 10_000})
    assert verdict_of(pair(decode=line, link=replace(TCP_LINK, rates=((1 << 20, 0.5),)))) == "slow"
    assert verdict_of(pair(decode=line, link=replace(TCP_LINK, rates=((1 << 20, 1.0),)))) == "good"


def test_ranks_are_named():
    assert replace(pair(), link=replace(LINK, from_rank=1, to_rank=3)).where == "p -> d (rank 1 -> 3)"
