"""Every subject of the bus, built and parsed here alone. Tokens are `[A-Za-z0-9_-]+`; anything else raises ValueError."""

from __future__ import annotations

import re

from .ids import RouterId, WorkerId

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
ROOT = "hk"
PREFILL_STREAM = "HK_PREFILL"
REGISTRY_BUCKET = "hk_workers"
SETTINGS_BUCKET = "hk_config"
JOB_CLASSES = ("hi", "std")  # the shared lanes of a pool; each worker pulls from both


def token(text: str) -> str:
    """`text`, when it can be one token of a subject."""
    if not _TOKEN.match(text):
        raise ValueError(f"a subject token is 1 to 64 of A-Z a-z 0-9 _ -, got {text!r}")
    return text


def decode_jobs(pool: str, worker: WorkerId) -> str:
    """DecodeJob, request/reply."""
    return f"{ROOT}.{token(pool)}.decode.{token(worker)}"


def control(pool: str, worker: WorkerId) -> str:
    """Ping, ReplayRequest, FinishAck, KvSnapshotRequest, DescribeHost, ProbeLink to one worker."""
    return f"{ROOT}.{token(pool)}.ctl.{token(worker)}"


def prefill_jobs(pool: str, job_class: str = "std") -> str:
    """PrefillJob for any prefill worker: a shared lane of the work queue, one for each of `JOB_CLASSES`."""
    return f"{ROOT}.{token(pool)}.prefill.{token(job_class)}.any"


def prefill_lane(pool: str, worker: WorkerId) -> str:
    """PrefillJob that one prefill worker should have first: its affinity lane of the work queue."""
    return f"{ROOT}.{token(pool)}.prefill.std.w.{token(worker)}"


def is_lane(subject: str) -> bool:
    """Whether these are jobs for one prefill worker."""
    return subject.split(".")[-2] == "w"


def prefill_jobs_all() -> str:
    """What the work queue stores."""
    return f"{ROOT}.*.prefill.>"


def prefill_direct(pool: str, worker: WorkerId) -> str:
    """PrefillJob for one worker as a core request, when the work queue does not answer (outside the stream's subjects)."""
    return f"{ROOT}.{token(pool)}.direct.{token(worker)}"


def cancel(pool: str) -> str:
    """Cancel, to every worker of the pool."""
    return f"{ROOT}.{token(pool)}.cancel"


def routers(pool: str) -> str:
    """What is asked of every router of the pool: policies, receipts (router/control_messages.py)."""
    return f"{ROOT}.{token(pool)}.routers"


def load(pool: str, worker: WorkerId) -> str:
    """Heartbeat and Goodbye of one worker."""
    return f"{ROOT}.load.{token(pool)}.{token(worker)}"


def placed(pool: str, router: RouterId) -> str:
    """PlacedLoad of one router."""
    return f"{ROOT}.placed.{token(pool)}.{token(router)}"


def placed_all(pool: str) -> str:
    """PlacedLoad of every router of the pool."""
    return f"{ROOT}.placed.{token(pool)}.*"


def load_all(pool: str) -> str:
    """Heartbeat and Goodbye of every worker of the pool."""
    return f"{ROOT}.load.{token(pool)}.*"


def kv_events(pool: str, worker: WorkerId) -> str:
    """KvEvents of one worker."""
    return f"{ROOT}.kv.{token(pool)}.{token(worker)}"


def kv_events_all(pool: str) -> str:
    """KvEvents of every worker of the pool."""
    return f"{ROOT}.kv.{token(pool)}.*"


def tokens(router: RouterId) -> str:
    """TokenFrame to one router."""
    return f"{ROOT}.tok.{token(router)}"


def events(router: RouterId) -> str:
    """PrefillClaimed, PrefillDone, PrefillFailed to one router."""
    return f"{ROOT}.evt.{token(router)}"


def under(subject: str, *names: str) -> str:
    """A subject below one of ours: an inbox for each of many peers, say."""
    return ".".join((subject, *map(token, names)))


def all_under(subject: str) -> str:
    """Every subject one token below."""
    return f"{subject}.*"


def last_token(subject: str) -> str:
    """The last token: whom a subject made by `under` stands for."""
    return subject.rpartition(".")[2]
