"""The floors of the house, read from the source: who may import what, and what stays out of which module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS: dict[str, set[str]] = {
    "bus": set(),
    "transport": set(),
    "router": {"bus"},
    "workers": {"bus", "transport"},
    "cluster": {"bus", "transport", "router", "workers", "lab"},  # its command line has the lab's commands
    "lab": {"bus", "transport", "router", "workers"},
}
# Optional or slow libraries: where they may be imported, and the modules that may do so at their own import.
HOMES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # vLLM itself imports the connector, and only there.
    "vllm": (("workers.engines.vllm",), ("workers.engines.vllm.connector",)),
    # `transport.gpu` is nothing but torch and Triton, so it is imported lazily as a whole (the test below).
    "torch": (
        ("workers.engines.vllm", "transport.gpu", "cluster.convert"),
        ("workers.engines.vllm.connector", "transport.gpu"),
    ),
    "triton": (("transport.gpu",), ("transport.gpu",)),
    "ucxx": (("transport.links",), ()),
    "zmq": (("workers.engines.vllm",), ()),
    "transformers": (("cluster.convert",), ()),
    "huggingface_hub": (("cluster.model",), ()),
    "uvloop": (("cluster",), ()),
    "nats": (("bus",), ("bus",)),
    "starlette": (("router",), ("router",)),
    "uvicorn": (("router",), ("router",)),
    "matplotlib": (("lab",), ()),
    "prometheus_client": (("router", "workers"), ("router", "workers")),
}
# What decides takes time and randomness as arguments and awaits nothing, so that a test can replay a run exactly.
DECISIONS = (
    *("router.request", "router.view", "router.index", "router.policies"),
    *("router.chooser", "router.policy_set", "router.receipts", "router.control_messages"),
    *("transport.handoff", "transport.sender", "transport.receiver", "transport.frames", "transport.layout"),
    *("workers.admission", "workers.attempts", "workers.kv_ledger", "workers.throughput"),
    *("lab.engine_model", "lab.timing", "lab.pool", "lab.prefill_queue", "lab.router_model", "lab.measure", "lab.fit"),
    *("cluster.supervision", "cluster.settings", "cluster.diagnosis", "bus.subjects", "bus.messages", "bus.block_hash"),
    *("cluster.preflight", "cluster.preflight_rules", "cluster.preflight_facts"),
    *("cluster.model_shape", "cluster.engine_memory"),
)
EFFECTS = ("asyncio", "time", "socket", "threading", "subprocess", "uuid", "secrets", "datetime")
UNSAFE_IMPORTS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml")
UNSAFE_CALLS = ("eval", "exec", "compile", "__import__")


@dataclass(frozen=True, slots=True)
class Import:
    """One imported module of one source file."""

    module: str  # who imports: router.text.template
    target: str  # what: bus.messages for our own, jinja2.sandbox for others
    is_ours: bool
    is_lazy: bool  # inside a function, or for the type checker only
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def trees() -> dict[str, tuple[ast.Module, bool]]:
    """Every module's syntax tree, and whether it is a package."""
    paths = [path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {name_of(path): (ast.parse(path.read_text(), str(path)), path.stem == "__init__") for path in paths}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_nodes(node: ast.AST, is_lazy: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, is_lazy
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(child)
            yield from import_nodes(child, is_lazy or inside)


def targets(module: str, is_package: bool, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.ImportFrom) and node.level:
        base = module.split(".")
        base = base[: len(base) - node.level + (1 if is_package else 0)]
        yield ".".join([*base, *(node.module or "").split(".")]).strip("."), True
        return
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for name in names:
        is_ours = name.split(".")[0] == "hocket"
        yield (name.removeprefix("hocket").strip("."), True) if is_ours else (name, False)


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        Import(module, target, is_ours, is_lazy, node.lineno)
        for module, (tree, is_package) in trees().items()
        for node, is_lazy in import_nodes(tree)
        for target, is_ours in targets(module, is_package, node)
    )


def within(module: str, homes: tuple[str, ...]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


def test_imports_only_go_down():
    wrong = []
    for item in imports():
        folder, target = item.module.split(".")[0], item.target.split(".")[0]
        if item.is_ours and target != folder and target not in FLOORS[folder]:
            wrong.append(str(item))
    assert wrong == []


def test_the_house_is_read():
    assert len(trees()) > 40
    assert {item.module.split(".")[0] for item in imports()} == set(FLOORS)
    assert any(item.is_lazy for item in imports())


def test_our_own_modules_are_imported_relatively():
    absolute = [
        f"{module}:{node.lineno}"
        for module, (tree, _) in trees().items()
        for node, _ in import_nodes(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "hocket"
    ]
    assert absolute == []


@pytest.mark.parametrize("folder", ["examples", "tests", "benchmarks"])
def test_nobody_imports_what_is_not_shipped(folder: str):
    assert [str(item) for item in imports() if item.target.split(".")[0] == folder] == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_in_its_home_only_and_lazily_where_it_is_optional(library: str):
    homes, at_import = HOMES[library]
    uses = [item for item in imports() if item.target.split(".")[0] == library and not item.is_ours]
    assert [str(item) for item in uses if not within(item.module, homes)] == []
    assert [str(item) for item in uses if not item.is_lazy and not within(item.module, at_import)] == []


def test_what_needs_a_gpu_is_imported_by_whoever_has_one():
    """vLLM itself imports the connector, in a process that has torch already."""
    outside = [item for item in imports() if item.is_ours and not within(item.module, ("transport.gpu",))]
    eager = [item for item in outside if within(item.target, ("transport.gpu",)) and not item.is_lazy]
    assert [str(item) for item in eager if item.module != "workers.engines.vllm.connector"] == []
    needs_gpu = [item for item in imports() if item.target.split(".")[0] == "triton"]
    assert {item.module for item in needs_gpu} == {"transport.gpu.kernel"}


@pytest.mark.parametrize("module", DECISIONS)
def test_what_decides_has_no_clock_no_task_and_no_io(module: str):
    assert any(within(name, (module,)) for name in trees()), f"{module} is gone; name what decides now"
    found = [item for item in imports() if within(item.module, (module,)) and item.target.split(".")[0] in EFFECTS]
    assert [str(item) for item in found] == []


@pytest.mark.parametrize("module", DECISIONS)
def test_what_decides_takes_its_randomness_as_an_argument(module: str):
    """`random.Random` may name a parameter's type; nothing else of the module is used, and it is not called."""
    for name, (tree, _) in trees().items():
        if not within(name, (module,)):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                assert not ast.unparse(node.func).startswith("random."), f"{name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert node.module != "random", f"{name}:{node.lineno}"


def test_subjects_are_built_in_one_module():
    wrong = []
    for module, (tree, _) in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_subject = node.value.startswith(("hk.", "hk_", "HK_")) and " " not in node.value
                is_servers_own = node.value.startswith(("$JS.", "$KV.")) and not module.startswith("bus.")
                if (is_subject and module != "bus.subjects") or is_servers_own:
                    wrong.append(f"{module}:{node.lineno} {node.value!r}")
    assert wrong == []


def test_nothing_is_unpickled_or_evaluated():
    wrong = [str(item) for item in imports() if item.target.split(".")[0] in UNSAFE_IMPORTS and not item.is_ours]
    for module, (tree, _) in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in UNSAFE_CALLS or called in ("torch.load", "yaml.load"):
                    wrong.append(f"{module}:{node.lineno} calls {called}")
    assert wrong == []


def test_a_package_file_holds_only_its_docstring_and_re_exports():
    for module, (tree, is_package) in trees().items():
        if not is_package:
            continue
        for node in tree.body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            is_import = isinstance(node, ast.ImportFrom | ast.Import)
            assert is_docstring or is_all or is_import, f"{module}:{node.lineno}"


def test_every_folder_is_packaged_and_linked_for_the_type_checker():
    setup = (ROOT / "setup.py").read_text()
    for folder in FLOORS:
        assert f'"{folder}"' in setup
        assert (ROOT / "typings" / "hocket" / folder).resolve() == ROOT / folder
