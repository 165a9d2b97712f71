"""From facts to findings: what is wrong with a link between two workers, and what would help. Decides; measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from ..bus.messages import HostFacts, RankLink

NVLINK_GB_PER_S = 394.0  # copy between two H200 over NV18, 1 GiB, torch copy_
PINNED_GB_PER_S = 55.0  # H200 to pinned host memory over PCIe 5, 1 GiB, torch copy_
SLOW_SHARE = 0.15  # of what the hardware gives. Shared memory copies twice and two processes share its bandwidth.
SLOW_TCP_SHARE = 0.04  # the same over TCP, through the kernel
SLOW_LINE_SHARE = 0.5  # of a network's line rate
ROUND_TRIP_US_MAX = 5_000.0  # 70 us is usual on one machine, and this is what a hand-off waits a few times
MEMLOCK_BYTES_MIN = 64 << 20
SHM_BYTES_MIN = 64 << 20
_RDMA_LANES = ("rc_", "dc_", "ud_", "gga_", "srd")
_MEMORY_LANES = ("sysv", "posix", "cma", "xpmem", "knem")
_SYSTEM_UCX = (
    "install a UCX that was built with verbs (conda-forge ucx with rdma-core, or the distribution's) and set "
    "RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true for the workers"
)


class Finding(msgspec.Struct, frozen=True):
    """Something about a machine or link. `fix`: it costs speed or works not at all; `note`: good to know."""

    code: str
    severity: Literal["fix", "note"]
    where: str  # the worker or pair it is about
    text: str
    advice: str = ""


class Side(msgspec.Struct, frozen=True):
    """One worker of a pair, as far as it answered."""

    name: str
    facts: HostFacts | None = None
    addresses: tuple[str, ...] = ()  # where it takes KV
    fingerprint: str = ""


class PairFacts(msgspec.Struct, frozen=True):
    """Everything that is known of one prefill-decode pair, or of one link of it."""

    prefill: Side
    decode: Side
    link: RankLink | None = None
    failure: str = ""  # of LinkReport, or "no_answer", "not_started"
    detail: str = ""
    only: str = ""  # the transport that was asked for: what another one would do better is no finding then

    @property
    def where(self) -> str:
        if self.only:
            return f"{self.only} on {self.prefill.name}"
        name = f"{self.prefill.name} -> {self.decode.name}"
        if self.link and (self.link.from_rank or self.link.to_rank):
            name += f" (rank {self.link.from_rank} -> {self.link.to_rank})"
        return name

    @property
    def is_one_host(self) -> bool | None:
        """None: not known."""
        one, other = self.prefill.facts, self.decode.facts
        if one is None or other is None or not one.host_id or not other.host_id:
            return None
        return one.host_id == other.host_id


class Limit(msgspec.Struct, frozen=True):
    """What the hardware gives between two workers."""

    gb_per_s: float
    why: str
    slow_share: float


def best_gb_per_s(link: RankLink) -> float:
    """Of all sizes."""
    return max((rate for _, rate in link.rates), default=0.0)


def lanes_of(transport: str) -> list[str]:
    """ "ucx(sysv,tcp)" -> sysv, tcp; of another transport its own name."""
    return transport.partition("(")[2].rstrip(")").split(",") if "(" in transport else [transport]


def _has_shared_memory(link: RankLink) -> bool:
    return link.transport == "inproc" or any(lane in _MEMORY_LANES for lane in lanes_of(link.transport))


def limit_of(pair: PairFacts) -> Limit | None:
    """None: not known."""
    link, one, other = pair.link, pair.prefill.facts, pair.decode.facts
    if link is None or one is None or other is None:
        return None
    if link.kv_memory == "device" and "cuda_ipc" in lanes_of(link.transport):
        return Limit(NVLINK_GB_PER_S, "NVLink", SLOW_SHARE)
    limits: list[Limit] = []
    if link.kv_memory == "device" and not link.moves_device_memory:
        limits.append(Limit(PINNED_GB_PER_S, "GPU to pinned host memory", SLOW_SHARE))
    if pair.is_one_host:
        share = SLOW_SHARE if _has_shared_memory(link) else SLOW_TCP_SHARE
        limits.append(Limit(min(one.copy_gb_per_s, other.copy_gb_per_s), "one memory copy", share))
    elif pair.is_one_host is False and one.network_mbit_per_s and other.network_mbit_per_s:
        line = min(max(one.network_mbit_per_s.values()), max(other.network_mbit_per_s.values()))
        limits.append(Limit(line / 8000, f"a network of {line / 1000:g} Gbit/s", SLOW_LINE_SHARE))
    return min(limits, key=lambda limit: limit.gb_per_s, default=None)


def verdict_of(pair: PairFacts) -> str:
    """ "good", "slow", "measured" (nothing to compare with), "busy" or "failed"."""
    if pair.link is None:
        return "busy" if pair.failure == "busy" else "failed"
    limit = limit_of(pair)
    if limit is None or not limit.gb_per_s:
        return "measured"
    return "slow" if best_gb_per_s(pair.link) < limit.slow_share * limit.gb_per_s else "good"


def diagnose(pairs: Sequence[PairFacts]) -> list[Finding]:
    """Everything that follows, each finding once, what is to be fixed first."""
    findings: dict[tuple[str, str], Finding] = {}
    sides = {side.name: side for pair in pairs for side in (pair.prefill, pair.decode)}
    found = [finding for side in sides.values() for finding in side_findings(side)]
    found += [finding for pair in pairs for finding in pair_findings(pair)]
    for finding in found:
        findings.setdefault((finding.code, finding.where), finding)
    return sorted(findings.values(), key=lambda finding: finding.severity)


def side_findings(side: Side) -> Iterable[Finding]:
    """About one worker and its machine."""
    facts, where = side.facts, side.name
    if facts is None:
        return
    if "ucx" in facts.transports and not facts.ucxx:
        text = "UCX is configured but ucxx is not installed, so KV goes over plain TCP"
        yield Finding("ucx_missing", "fix", where, text, "pip install 'hocket[ucx-cu12]' or 'hocket[ucx-cu13]'")
    elif not facts.ucxx:
        text = "UCX is not installed; shared memory, NVLink and RDMA need it"
        yield Finding("ucx_not_used", "note", where, text, "pip install 'hocket[ucx-cu12]' and --transports ucx,tcp")
    elif "ucx" not in facts.transports:
        text = f"UCX is installed but not configured (transports: {facts.transports})"
        yield Finding("ucx_not_used", "note", where, text, "start the worker with --transports ucx,tcp")
    if facts.rdma_devices and facts.ucxx and "ib" not in facts.ucx_parts:
        text = f"no RDMA in this UCX build, though the machine has {', '.join(facts.rdma_devices)} (PyPI's libucx has none)"
        yield Finding("ucx_without_rdma", "fix", where, text, _SYSTEM_UCX)
    if facts.rdma_devices and facts.memlock_bytes is not None and facts.memlock_bytes < MEMLOCK_BYTES_MIN:
        text = f"only {facts.memlock_bytes >> 10} KiB of memory may be locked, and RDMA pins its buffers"
        yield Finding("memlock", "fix", where, text, "ulimit -l unlimited (Docker: --ulimit memlock=-1)")
    if facts.cuda_devices and facts.ucxx and "cuda" not in facts.ucx_parts:
        text = f"this UCX build knows no CUDA, though the machine has {facts.cuda_devices} GPUs"
        yield Finding("ucx_without_cuda", "fix", where, text, "install ucxx-cu12 or ucxx-cu13 with PyPI's libucx")
    if facts.shm_free_bytes is not None and facts.shm_free_bytes < SHM_BYTES_MIN:
        text = f"/dev/shm has {facts.shm_free_bytes >> 20} MiB free; UCX may not find room for its queues"
        yield Finding(
            "small_shm", "note", where, text, "give the container more (Docker: --shm-size=1g, or --ipc=host)"
        )


def pair_findings(pair: PairFacts) -> Iterable[Finding]:
    """About one link."""
    prints = pair.prefill.fingerprint, pair.decode.fingerprint
    if all(prints) and prints[0] != prints[1]:
        text = "their model or KV layout differs (fingerprints), so the one cannot read the other's KV"
        yield Finding(
            "fingerprint", "fix", pair.where, text, "same model, dtype, engine version and KV settings on both"
        )
    if pair.link is None:
        yield from _failure_findings(pair)
        return
    yield from _lane_findings(pair, pair.link)
    yield from _speed_findings(pair, pair.link)


def _failure_findings(pair: PairFacts) -> Iterable[Finding]:
    detail = f": {pair.detail}" if pair.detail else ""
    match pair.failure:
        case "busy" | "no_room" | "draining":
            text = f"not measured, {pair.failure.replace('_', ' ')}{detail}"
            yield Finding(pair.failure, "note", pair.where, text, "run hocket doctor again")
        case "unsupported":
            text = f"not measured{detail}"
            yield Finding(
                "unsupported", "note", pair.where, text, "hocket doctor --local measures links on one machine"
            )
        case "unknown_worker" | "wrong_epoch":
            text = f"the decode worker went away meanwhile{detail}"
            yield Finding("worker_gone", "note", pair.where, text, "run hocket doctor again")
        case "not_started" if pair.only == "ucx" and pair.prefill.facts and not pair.prefill.facts.ucxx:
            return  # Said of the machine.
        case "not_started":
            advice = "pip install 'hocket[ucx-cu12]' or 'hocket[ucx-cu13]'" if "ucxx" in pair.detail else ""
            yield Finding("not_started", "fix", pair.where, f"the transport does not run here{detail}", advice)
        case "no_answer":
            text = f"the prefill worker did not answer in time{detail}"
            yield Finding("no_answer", "fix", pair.where, text, "look at its log; restart it if it hangs")
        case _:
            yield _unreachable(pair, detail)


def _unreachable(pair: PairFacts, detail: str) -> Finding:
    is_loopback = any(
        host in address for address in pair.decode.addresses for host in ("//127.", "//localhost:", "//[::1]")
    )
    if is_loopback and not pair.is_one_host:
        text = (
            f"the decode worker takes KV on {', '.join(pair.decode.addresses)}, which no other machine reaches{detail}"
        )
        advice = "start it with --bind ADDRESS, an address of its machine that prefill workers reach"
        return Finding("loopback", "fix", pair.where, text, advice)
    if not pair.decode.addresses:
        text, advice = "the decode worker takes KV nowhere", "look at its log: no transport started"
        return Finding("no_address", "fix", pair.where, text, advice)
    text = f"no way to the decode worker{detail}"
    advice = "check routes and firewalls between them (the ports are any free ones), and that they share a transport"
    return Finding("unreachable", "fix", pair.where, text, advice)


def _lane_findings(pair: PairFacts, link: RankLink) -> Iterable[Finding]:
    lanes = lanes_of(link.transport)
    if link.kv_memory == "device" and not link.moves_device_memory:
        yield _no_device_lane(pair, link)
    elif pair.is_one_host and link.kv_memory == "host" and not _has_shared_memory(link) and pair.only != link.transport:
        yield _no_shared_memory(pair, link)
    elif pair.is_one_host is False and not any(lane.startswith(_RDMA_LANES) for lane in lanes):
        yield from _no_rdma(pair, link)


def _no_device_lane(pair: PairFacts, link: RankLink) -> Finding:
    """Why CUDA IPC (one machine) or GPUDirect RDMA (two) is not used."""
    text = f"KV in GPU memory goes through host memory ({link.transport}); "
    if pair.is_one_host is False:
        text += "between machines that takes RDMA, and this link has none"
        return Finding("no_gpu_rdma", "fix", pair.where, text, _SYSTEM_UCX)
    reasons = list(_no_cuda_ipc(pair, link)) or [
        (
            "UCX found no way between these GPUs (peer access)",
            "look at nvidia-smi topo -p2p r; use GPUs that reach each other",
        )
    ]
    text += "CUDA IPC not used because " + "; ".join(reason for reason, _ in reasons)
    return Finding("no_cuda_ipc", "fix", pair.where, text, "; ".join(dict.fromkeys(advice for _, advice in reasons)))


def _no_cuda_ipc(pair: PairFacts, link: RankLink) -> Iterable[tuple[str, str]]:
    if not link.transport.startswith("ucx"):
        advice = "start both workers with --transports ucx,tcp; their logs say why cuda_ipc was passed over"
        yield "the link is neither cuda_ipc nor UCX", advice
    for side in (pair.prefill, pair.decode):
        facts = side.facts
        if facts is None:
            continue
        allocator = facts.settings.get("PYTORCH_CUDA_ALLOC_CONF", "") + facts.settings.get("PYTORCH_ALLOC_CONF", "")
        if "expandable_segments:true" in allocator.lower().replace(" ", ""):
            yield f"{side.name} allocates expandable segments", "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
        if _excludes(facts.settings.get("UCX_TLS"), ("cuda_ipc", "cuda")):
            yield f"UCX_TLS={facts.settings['UCX_TLS']} leaves it out", "unset UCX_TLS"
        if facts.ucxx and "cuda" not in facts.ucx_parts:
            yield f"the UCX of {side.name} knows no CUDA", "install ucxx-cu12 or ucxx-cu13 with PyPI's libucx"
    yield from _other_namespaces(pair)


def _other_namespaces(pair: PairFacts) -> Iterable[tuple[str, str]]:
    one, other = pair.prefill.facts, pair.decode.facts
    if one and other and one.ipc_namespace != other.ipc_namespace:
        yield "they are in containers with different IPC namespaces", "give them one (Docker, Podman: --ipc=host)"


def _no_shared_memory(pair: PairFacts, link: RankLink) -> Finding:
    """Two processes of one machine that talk over TCP."""
    text = f"only TCP between two processes of one machine ({link.transport})"
    reasons = list(_other_namespaces(pair))
    for side in (pair.prefill, pair.decode):
        settings = side.facts.settings if side.facts else {}
        if _excludes(settings.get("UCX_TLS"), ("sysv", "posix", "shm", "sm", "mm")):
            reasons.append((f"UCX_TLS={settings['UCX_TLS']} leaves shared memory out", "unset UCX_TLS"))
        if settings.get("UCX_MM_ERROR_HANDLING", "y").lower() not in ("y", "yes", "on", "1", "try"):
            reasons.append(("UCX_MM_ERROR_HANDLING turns shared memory off", "unset UCX_MM_ERROR_HANDLING"))
    if not link.transport.startswith("ucx"):
        reasons.append(("plain TCP knows no shared memory", "install ucxx and start both with --transports ucx,tcp"))
    if not reasons:
        reasons.append(
            ("UCX found no shared memory", "look at the workers' logs, and at ipcs -m and /dev/shm for room")
        )
    text += ": " + "; ".join(dict.fromkeys(reason for reason, _ in reasons))
    return Finding(
        "no_shared_memory", "fix", pair.where, text, "; ".join(dict.fromkeys(advice for _, advice in reasons))
    )


def _no_rdma(pair: PairFacts, link: RankLink) -> Iterable[Finding]:
    one, other = pair.prefill.facts, pair.decode.facts
    if one is None or other is None:
        return
    if not (one.rdma_devices and other.rdma_devices):
        parts = {*one.ucx_parts, *other.ucx_parts}
        text = "no RDMA devices are seen on both machines" + (
            "" if "ib" in parts else "; no RDMA in this UCX build either"
        )
        yield Finding("no_rdma_devices", "note", pair.where, f"{link.transport}: {text}")
    elif "ib" in one.ucx_parts and "ib" in other.ucx_parts:
        text = f"both machines have RDMA and a UCX with verbs, yet the link is {link.transport}"
        advice = "check UCX_TLS and UCX_NET_DEVICES, ibstat (port active, same fabric) and ulimit -l"
        yield Finding("rdma_not_used", "fix", pair.where, text, advice)


def _speed_findings(pair: PairFacts, link: RankLink) -> Iterable[Finding]:
    limit = limit_of(pair)
    if limit is not None and verdict_of(pair) == "slow":
        text = f"{best_gb_per_s(link):.2f} GB/s where {limit.why} gives {limit.gb_per_s:.1f}"
        yield Finding("slow", "fix", pair.where, text, _slow_advice(limit))
    if link.round_trip_us > ROUND_TRIP_US_MAX:
        text = f"a round trip takes {link.round_trip_us / 1000:.1f} ms"
        advice = "the processes wait for a core, or the network is far: give workers cores of their own"
        yield Finding("high_latency", "note", pair.where, text, advice)


def _slow_advice(limit: Limit) -> str:
    if limit.why == "NVLink":
        return (
            "these GPUs may have no NVLink between them (nvidia-smi topo -m); over PCIe 25 to 50 GB/s is all there is"
        )
    if "network" in limit.why:
        return (
            "look for other traffic, a slower switch port, MTU 1500, or another interface being taken (UCX_NET_DEVICES)"
        )
    return "look for a busy machine (fewer cores than processes), and at what the transport column says"


def _excludes(tls: str | None, names: Sequence[str]) -> bool:
    """Whether a UCX_TLS that is set leaves all of these out."""
    if not tls or tls == "all":
        return False
    listed = tls.lstrip("^").split(",")
    if tls.startswith("^"):
        return any(name in listed for name in names)
    return not any(name in listed or "all" in listed for name in names)
