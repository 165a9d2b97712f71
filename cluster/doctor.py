"""`hocket doctor`: measures the links of a running pool, or of this machine alone, and says what to do about slow ones.

Gathers and prints; `diagnosis.py` decides. Exit 0: nothing to fix; 1: something is, or nothing could be measured.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..bus import subjects
from ..bus.base import Bus, BusError, NoResponders, RequestTimeout
from ..bus.messages import (
    DescribeHost,
    Heartbeat,
    HostReport,
    LinkReport,
    Message,
    Ping,
    ProbeLink,
    RankLink,
    WorkerCard,
    decode,
    encode,
)
from ..bus.nats_bus import NatsBus
from ..transport.registry import installed_schemes
from ..workers.host_facts import host_facts
from .config import server_here
from .diagnosis import Finding, PairFacts, Side, best_gb_per_s, diagnose, limit_of, verdict_of
from .tables import table

ASK_S = 2.0
DESCRIBE_S = 5.0
PROBE_S = 35.0  # a little over what the worker itself allows
BUSY_AGAIN_S = 1.0  # somebody else's probe of the same worker is over by then
BUSY_TRIES = 3
CHILD_S = 30.0
CHILD = "hocket.cluster.doctor_child"


class DoctorError(Exception):
    """Nothing could be examined; the text says why and what would help."""


def doctor(*, nats: str, pool: str, is_local: bool, json_file: str) -> int:
    """Run it and print the report; the exit code. Raises DoctorError."""
    pairs = asyncio.run(_local() if is_local else _pool(nats or server_here(pool), pool))
    findings = diagnose(pairs)
    for line in report_lines(pairs, findings):
        print(line)
    if json_file:
        try:
            Path(json_file).write_text(json.dumps(report_json(pairs, findings), indent=2) + "\n")
        except OSError as error:
            raise DoctorError(f"cannot write {json_file}: {error.strerror}") from error
    is_measured = any(pair.link for pair in pairs)
    return 0 if is_measured and not any(finding.severity == "fix" for finding in findings) else 1


# ---- a running pool


async def _pool(nats: str, pool: str) -> list[PairFacts]:
    bus = NatsBus(nats, name="doctor")
    try:
        await bus.connect()
        return await examine(bus, pool)
    except BusError as error:
        raise DoctorError(str(error)) from error
    finally:
        await bus.aclose()


async def examine(bus: Bus, pool: str) -> list[PairFacts]:
    """Measure every pair of the pool, one after the other: two at once would measure each other. Raises DoctorError."""
    cards = [card for card in await bus.registry.list() if await _is_here(bus, pool, card)]
    prefills = [card for card in cards if card.role == "prefill"]
    decodes = [card for card in cards if card.role == "decode"]
    if not prefills or not decodes:
        raise DoctorError(
            f"pool {pool!r} has {len(prefills)} prefill and {len(decodes)} decode workers that answer; it takes one of each "
            "(--pool names another; --local needs no pool)"
        )
    sides = {card.worker_id: await _side(bus, pool, card) for card in cards}
    pairs: list[PairFacts] = []
    for prefill in prefills:
        for decode_card in decodes:
            print(f"measuring {prefill.worker_id} -> {decode_card.worker_id}", file=sys.stderr)
            report = await _measure(bus, pool, prefill, decode_card)
            pairs += pairs_of(sides[prefill.worker_id], sides[decode_card.worker_id], report)
    return pairs


def pairs_of(prefill: Side, decode_side: Side, report: LinkReport | None) -> list[PairFacts]:
    """One for each link of the report, or one with its failure."""
    if report is None:
        return [PairFacts(prefill, decode_side, None, "no_answer")]
    if not report.links:
        return [PairFacts(prefill, decode_side, None, report.failure or "unreachable", report.detail)]
    return [PairFacts(prefill, decode_side, link) for link in report.links]


async def _is_here(bus: Bus, pool: str, card: WorkerCard) -> bool:
    """Alive and of this pool: the registry has the cards of all pools, and of the dead."""
    answer = await _ask(bus, pool, card, Ping(), ASK_S)
    return isinstance(answer, Heartbeat) and answer.epoch == card.epoch


async def _side(bus: Bus, pool: str, card: WorkerCard) -> Side:
    answer = await _ask(bus, pool, card, DescribeHost(), DESCRIBE_S)
    facts = answer.facts if isinstance(answer, HostReport) else None  # None: an older worker.
    return Side(card.worker_id, facts, card.handoff_addresses, card.fingerprint)


async def _measure(bus: Bus, pool: str, prefill: WorkerCard, decode_card: WorkerCard) -> LinkReport | None:
    question = ProbeLink(decode_card.worker_id, decode_card.epoch)
    for attempt in range(BUSY_TRIES):
        answer = await _ask(bus, pool, prefill, question, PROBE_S)
        if not isinstance(answer, LinkReport):
            return None
        if answer.failure != "busy" or attempt + 1 == BUSY_TRIES:
            return answer
        await asyncio.sleep(BUSY_AGAIN_S)
    return None


async def _ask(bus: Bus, pool: str, card: WorkerCard, question: Message, timeout_s: float) -> Message | None:
    """None: no answer."""
    try:
        return decode(await bus.request(subjects.control(pool, card.worker_id), encode(question), timeout_s=timeout_s))
    except (NoResponders, RequestTimeout, msgspec.MsgspecError):
        return None


# ---- this machine alone


class ChildReport(msgspec.Struct):
    """The last line of a `doctor_child`: where it listens, what it measured, or why neither."""

    addresses: tuple[str, ...] = ()
    link: RankLink | None = None
    failure: str = ""


async def _local() -> list[PairFacts]:
    """Each installed transport between two processes of their own, because one that crashes is a finding too."""
    schemes = [scheme for scheme in installed_schemes() if scheme != "inproc"]  # Not between processes.
    here = Side("this machine", await asyncio.to_thread(host_facts, ",".join(schemes)))
    pairs = []
    for scheme in schemes:
        print(f"measuring {scheme}", file=sys.stderr)
        pairs.append(await _local_pair(scheme, here))
    return pairs


async def _local_pair(scheme: str, here: Side) -> PairFacts:
    listener = await _child("listen", scheme)
    try:
        listening = await _child_report(listener)
        if not listening.addresses:
            return PairFacts(here, here, None, "not_started", listening.failure, scheme)
        prober = await _child("probe", *listening.addresses)
        try:
            measured = await _child_report(prober)
        finally:
            await _end(prober)
    except DoctorError as error:
        return PairFacts(here, here, None, "not_started", str(error), scheme)
    finally:
        await _end(listener)
    return PairFacts(here, here, measured.link, measured.failure and "unreachable", measured.failure, scheme)


async def _child(*arguments: str) -> asyncio.subprocess.Process:
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", CHILD, *arguments, stdin=pipe, stdout=pipe, stderr=null
    )


async def _child_report(child: asyncio.subprocess.Process) -> ChildReport:
    """Its report line; UCX may write others. Raises DoctorError."""
    assert child.stdout is not None
    try:
        async with asyncio.timeout(CHILD_S):
            while line := await child.stdout.readline():
                if line.startswith(b'{"addresses"'):
                    return msgspec.json.decode(line, type=ChildReport)
            raise DoctorError(f"a process that used it ended with exit code {await child.wait()}")
    except TimeoutError:
        raise DoctorError(f"a process that used it said nothing for {CHILD_S:g} s") from None


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        child.kill()
    await child.wait()


# ---- the report


def report_lines(pairs: Sequence[PairFacts], findings: Sequence[Finding]) -> list[str]:
    """A table of the links, then what was found."""
    header = ("link", "transport", "dial ms", "round trip us", "GB/s by message size", "hardware", "verdict")
    lines = table(header, [_row(pair) for pair in pairs], left=len(header))
    for finding in findings:
        lines += ["", f"{finding.severity}: {finding.where}: {finding.text}"]
        if finding.advice:
            lines.append(f"     {finding.advice}")
    if not findings:
        lines += ["", "nothing to fix"]
    return lines


def _row(pair: PairFacts) -> tuple[str, ...]:
    link = pair.link
    if link is None:
        return pair.where, "-", "-", "-", pair.failure, "-", verdict_of(pair)
    limit = limit_of(pair)
    return (
        pair.where,
        link.transport,
        "linked" if link.dial_ms is None else f"{link.dial_ms:.1f}",
        f"{link.round_trip_us:.0f}",
        ", ".join(f"{_size(size)} {rate:.2f}" for size, rate in link.rates),
        f"{limit.gb_per_s:.1f} ({limit.why})" if limit else "not known",
        verdict_of(pair),
    )


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def report_json(pairs: Sequence[PairFacts], findings: Sequence[Finding]) -> dict[str, object]:
    """What `--json` writes: `links` (a row each), `hosts` by worker, `findings`."""
    sides = {side.name: side for pair in pairs for side in (pair.prefill, pair.decode)}
    return {
        "links": [_json_row(pair) for pair in pairs],
        "hosts": {name: side.facts and msgspec.structs.asdict(side.facts) for name, side in sides.items()},
        "findings": [msgspec.structs.asdict(finding) for finding in findings],
    }


def _json_row(pair: PairFacts) -> dict[str, object]:
    link, limit = pair.link, limit_of(pair)
    row: dict[str, object] = {"prefill": pair.prefill.name, "decode": pair.decode.name, "verdict": verdict_of(pair)}
    if link is None:
        return {**row, "failure": pair.failure, "detail": pair.detail}
    measured = msgspec.structs.asdict(link)
    measured["rates"] = [{"message_bytes": size, "gb_per_s": rate} for size, rate in link.rates]
    return {
        **row,
        **measured,
        "best_gb_per_s": best_gb_per_s(link),
        "hardware_gb_per_s": limit and limit.gb_per_s,
        "hardware": limit.why if limit else "",
    }
