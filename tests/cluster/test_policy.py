"""`hocket policy` against routers on a real nats-server: all of them switch, bad documents change nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from hocket.bus import Bus, EmbeddedServer, NatsBus, RouterId
from hocket.cluster.ask_routers import ask_all
from hocket.cluster.policy import Changed, PolicyRefused, change, rollback, set_canary, set_primary, set_shadows
from hocket.cluster.policy_report import policy_json, policy_lines
from hocket.router import control
from hocket.router.api.stream import TokenPath
from hocket.router.config import RouterConfig
from hocket.router.control_messages import AskPolicies, PolicyConfig, PolicyStatus
from hocket.router.metrics import RouterMetrics
from hocket.router.policies import load_policy
from hocket.router.router import Router

POOL = "main"
MINE = """
from hocket.router.policies import Choice

class Mine:
    worker = {worker!r}

    def pick(self, request, workers, now, rng):
        return Choice(workers[0].worker_id, why=self.worker)
"""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def routing(url: str, name: str, policy: str = "kv") -> AsyncIterator[Router]:
    """A router that hears; it has no workers."""
    bus = NatsBus(url, name=name)
    await bus.connect()
    router = Router(
        RouterConfig(pool=POOL, policy=policy), bus, load_policy(policy), router_id=RouterId(name), served_name="m",
        metrics=RouterMetrics(CollectorRegistry()),
    )  # fmt: skip
    path = TokenPath(router, None)
    ready = asyncio.Event()
    running = asyncio.create_task(router.run(path, path.on_frame, ready.set))
    try:
        async with asyncio.timeout(10):
            await ready.wait()
        yield router
    finally:
        running.cancel()
        await asyncio.wait([running])
        await bus.aclose()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    async with EmbeddedServer(tmp_path / "store") as running:
        yield running


@pytest.fixture
async def bus(server: EmbeddedServer) -> AsyncIterator[Bus]:
    made = NatsBus(server.url, name="operator")
    await made.connect()
    yield made
    await made.aclose()


def decides(router: Router) -> str:
    """The class of what the chooser really asks."""
    assert router.chooser.policy is router.control.policies
    return type(router.control.policies.primary.policy).__name__


def everywhere(changed: Changed, routers: int) -> int:
    assert changed.is_everywhere
    assert len(changed.statuses) == routers
    return changed.document.version


async def test_every_router_switches_and_a_new_one_begins_with_what_is_stored(server: EmbeddedServer, bus: Bus) -> None:
    async with routing(server.url, "r1") as one, routing(server.url, "r2") as two:
        assert (decides(one), decides(two)) == ("KvPolicy", "KvPolicy")
        assert everywhere(await change(bus, POOL, set_primary("least_loaded", {})), 2) == 1
        assert (decides(one), decides(two)) == ("LeastLoaded", "LeastLoaded")
        assert everywhere(await change(bus, POOL, set_canary("round_robin", 0.25)), 2) == 2
        assert everywhere(await change(bus, POOL, set_shadows(["kv", "kv"])), 2) == 3
        async with routing(server.url, "r3") as three:
            status = three.control.status()
            assert (status.version, decides(three)) == (3, "LeastLoaded")
            assert status.config == one.control.status().config
            assert [arm.policy for arm in status.arms] == ["least_loaded", "round_robin"]
            assert [shadow.policy for shadow in status.shadows] == ["kv", "kv"]


async def test_a_change_is_stored_when_no_router_runs(server: EmbeddedServer, bus: Bus) -> None:
    changed = await change(bus, POOL, set_primary("round_robin", {"pick_budget_ms": 2.0}))
    assert not changed.statuses
    with pytest.raises(PolicyRefused, match="no_such.*no router answered"):
        await change(bus, POOL, set_shadows(["no_such"]))
    async with routing(server.url, "r1") as router:
        assert decides(router) == "RoundRobin"
        assert router.control.policies.config.pick_budget_ms == 2.0


async def test_nothing_is_changed_by_what_a_router_cannot_load(
    server: EmbeddedServer, bus: Bus, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("class Mine:\n    pick = None\n\nraise RuntimeError('boom')\n")
    async with routing(server.url, "r1") as router:
        edits = {
            "missing.py": set_primary(f"{tmp_path}/missing.py:Mine", {}),
            "RuntimeError: boom": set_shadows([f"{broken}:Mine"]),
            "installed:": set_canary("no_such", 0.5),
            "<= 1": set_canary("round_robin", 1.5),
            "> 0": set_primary("kv", {"window_s": 0.0}),
            "length <= 4": set_shadows(["kv"] * 5),
        }
        for words, edit in edits.items():
            with pytest.raises(PolicyRefused, match=words):
                await change(bus, POOL, edit)
        assert router.control.status().version == 0
        assert await bus.settings.get(POOL) is None


async def test_a_module_that_never_loads_stops_neither_the_router_nor_the_operator(
    server: EmbeddedServer, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOAD_TIMEOUT_S", 0.2)
    (tmp_path / "slow.py").write_text("import threading\nthreading.Event().wait(2)\n")
    async with routing(server.url, "r1") as router:
        with pytest.raises(PolicyRefused, match="did not load in 0.2 s"):
            await change(bus, POOL, set_primary(f"{tmp_path}/slow.py:Mine", {}))
        assert everywhere(await change(bus, POOL, set_primary("round_robin", {})), 1) == 1
        assert decides(router) == "RoundRobin"


@pytest.mark.parametrize("value", [b"{", b'{"version": 9}', b'{"version": 9, "config": {"primary": "no_such"}}'])
async def test_a_router_keeps_its_policies_when_the_stored_document_is_bad(
    server: EmbeddedServer, bus: Bus, value: bytes
) -> None:
    async with routing(server.url, "r1") as router:
        await change(bus, POOL, set_primary("least_loaded", {}))
        stored = await bus.settings.get(POOL)
        assert stored is not None
        await bus.settings.put(POOL, value, after=stored.revision)
        [status] = await ask_all(bus, POOL, AskPolicies(reads=True), PolicyStatus)
        assert (status.version, decides(router)) == (1, "LeastLoaded")
        assert status.problem
        assert "! r1" in "\n".join(policy_lines(POOL, None, [status]))
        async with routing(server.url, "r2", "round_robin") as newcomer:
            assert decides(newcomer) == "RoundRobin"
            assert newcomer.control.status().problem == status.problem


async def test_a_rollback_returns_to_the_last_good_policies(server: EmbeddedServer, bus: Bus) -> None:
    async with routing(server.url, "r1", "kv") as router:
        with pytest.raises(PolicyRefused, match="no earlier"):
            await rollback(bus, POOL)
        for name in ("least_loaded", "round_robin"):
            await change(bus, POOL, set_primary(name, {}))
        router.control.policies.primary.status.replaced = "raised 5 times"  # As after a bad night.
        await change(bus, POOL, set_shadows(["kv"]))
        changed = await rollback(bus, POOL)
        assert changed.document.config == PolicyConfig("least_loaded")  # not the one that failed
        assert everywhere(changed, 1) == 4
        assert decides(router) == "LeastLoaded"
        assert (await rollback(bus, POOL)).document.config == PolicyConfig("kv")
        with pytest.raises(PolicyRefused, match="no earlier"):
            await rollback(bus, POOL)


async def test_setting_a_file_again_picks_up_its_edits_and_ends_a_replacement(
    server: EmbeddedServer, bus: Bus, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    async with routing(server.url, "r1") as router:
        for worker in ("aaa", "bbb"):  # Of one length, within one second: compiled files look alike.
            path.write_text(MINE.format(worker=worker))
            await change(bus, POOL, set_primary(f"{path}:Mine", {}))
            policy = router.control.policies.primary.policy
            assert getattr(policy, "worker", "") == worker
        router.control.policies.primary.status.replaced = "raised 5 times"
        await change(bus, POOL, set_primary(f"{path}:Mine", {}))
        assert not router.control.policies.primary.status.replaced
        assert router.control.policies.primary.policy is not policy


async def test_setting_a_module_again_picks_up_its_edits_and_a_bad_one_does_not_touch_what_decides(
    server: EmbeddedServer, bus: Bus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "my_own_policy.py"
    edit = set_primary("my_own_policy:Mine", {})
    try:
        async with routing(server.url, "r1") as router:
            for worker in ("aaa", "bbb"):
                path.write_text(f"WORKER = {worker!r}\n{MINE.format(worker=worker)}")
                await change(bus, POOL, edit)
                policy = router.control.policies.primary.policy
                assert getattr(policy, "worker", "") == worker
            path.write_text("WORKER = 'ccc'\nraise RuntimeError('boom')\n")
            with pytest.raises(PolicyRefused, match="boom"):
                await change(bus, POOL, edit)
            assert router.control.policies.primary.policy is policy
            assert sys.modules["my_own_policy"].WORKER == "bbb"
    finally:
        sys.modules.pop("my_own_policy", None)


async def test_what_a_policy_has_learnt_outlives_other_changes(
    server: EmbeddedServer, bus: Bus, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(MINE.format(worker="x"))
    async with routing(server.url, "r1") as router:
        await change(bus, POOL, set_primary(f"{path}:Mine", {}))
        learnt = router.control.policies.primary.policy
        await change(bus, POOL, set_shadows([f"{path}:Mine", "round_robin"]))
        assert router.control.policies.primary.policy is learnt
        assert router.control.policies.shadows[0].policy is not learnt
        turns = router.control.policies.shadows[1].policy
        await change(bus, POOL, set_primary("round_robin", {}))
        assert router.control.policies.primary.policy is turns
        assert router.control.policies.shadows[0].policy is learnt


async def test_of_two_operators_at_once_one_is_told(server: EmbeddedServer, bus: Bus) -> None:
    async def one(name: str) -> str:
        try:
            return f"version {(await change(bus, POOL, set_primary(name, {}))).document.version}"
        except PolicyRefused as error:
            return str(error).partition(" at the same")[0]

    async with routing(server.url, "r1"), asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(one(name)) for name in ("least_loaded", "round_robin")]
    assert sorted(task.result() for task in both) == ["the setting 'main' was changed by somebody else", "version 1"]


async def test_a_change_while_a_router_was_cut_off_is_read_when_it_is_back(server: EmbeddedServer, bus: Bus) -> None:
    async with routing(server.url, "r1") as router:
        await change(bus, POOL, set_primary("least_loaded", {}))
        stored = await bus.settings.get(POOL)
        assert stored is not None
        # Nobody tells the router of this one.
        silent = msgspec.json.encode({"version": 2, "config": {"primary": "round_robin"}})
        await bus.settings.put(POOL, silent, after=stored.revision)
        assert decides(router) == "LeastLoaded"
        await server.stop()
        await until(lambda: not bus.is_connected)
        await server.start()
        await until(lambda: router.control.policies.version == 2)
        assert decides(router) == "RoundRobin"


async def test_the_report_adds_up_all_routers_and_names_who_differs(server: EmbeddedServer, bus: Bus) -> None:
    async with routing(server.url, "r1") as one, routing(server.url, "r2") as two:
        await change(bus, POOL, set_canary("round_robin", 0.5))
        changed = await change(bus, POOL, set_shadows(["kv"]))
        for number, router in enumerate((one, two), 1):
            for arm in router.control.policies.arms:
                arm.status.picks, arm.status.requests = 10 * number, number
                arm.status.ttft_s.add(0.1 * number)
            router.control.policies.shadows[0].status.scored = number
        two.control.policies.primary.status.replaced = "raised 5 times"
        statuses = await ask_all(bus, POOL, AskPolicies(), PolicyStatus)
        lines = policy_lines(POOL, changed.document, statuses)
        [primary] = [line for line in lines if line.startswith("primary")]
        assert primary.split()[:5] == ["primary", "kv", "30", "3", "0"]
        assert "150.0 ms" in primary  # the mean of both
        assert any("raised 5 times" in line and "least loaded decides" in line for line in lines)
        report = policy_json(POOL, changed.document, statuses)
        assert [arm["picks"] for arm in report["arms"]] == [30, 30]  # type: ignore[attr-defined, index]
        assert [shadow["scored"] for shadow in report["shadows"]] == [3]  # type: ignore[attr-defined, index]
        assert msgspec.json.encode(report)


async def test_routers_with_policies_of_their_own_are_not_added_up(server: EmbeddedServer, bus: Bus) -> None:
    async with routing(server.url, "r1", "kv"), routing(server.url, "r2", "round_robin"):
        statuses = await ask_all(bus, POOL, AskPolicies(), PolicyStatus)
        lines = policy_lines(POOL, None, statuses)
    assert "nothing stored" in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("primary")] == ["kv", "round_robin"]
