"""The wheel: it holds every module, and its commands run without a checkout or sources."""

import compileall
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
PARTS = (*ROOMS, "pyproject.toml", "README.md", "LICENSE")
COMMANDS = ("eupe", "stage2")  # stage1 and stage3 are declared as stage2 is

pytestmark = pytest.mark.slow


def packed() -> set[str]:
    """Name the files that the wheel must hold, as paths below its root."""
    found = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for pattern in ("*.py", "*.j2")
        for path in (ROOT / room).rglob(pattern)
    }
    assert any(name.endswith(".j2") for name in found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, folder / "source" / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, folder / "source" / part)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    done = run(command, folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment that has this one's libraries, but not its eupe.

    The libraries come by a line of a .pth file, whose own .pth files, an editable eupe's among
    them, are not read. That eupe's dependencies are all declared is for
    test_house_dependencies.py to show.
    """
    environment = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment],
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    python = environment / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    done = run([*command, "--no-deps", "--no-index", str(wheel)], environment)
    assert done.returncode == 0, done.stderr
    (site_packages(environment) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


@pytest.fixture(scope="module")
def compiled(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the installed environment's rooms as bytecode alone."""
    folder = tmp_path_factory.mktemp("compiled")
    for room in ROOMS:
        shutil.copytree(site_packages(installed) / room, folder / room)
        assert compileall.compile_dir(folder / room, quiet=1, legacy=True)
        for source in (folder / room).rglob("*.py"):
            source.unlink()
    return folder


def site_packages(environment: Path) -> Path:
    """Return where an environment keeps its packages."""
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def run(command: list[str], where: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a stranger to the checkout would: without this session's PYTHONPATH."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = {**known, "COLUMNS": "200", **variables}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=where,
        env=environment,
        timeout=PATIENCE_SECONDS,
    )


def test_the_wheel_holds_every_module_and_the_template(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == packed()


def test_its_modules_are_its_own(installed: Path, tmp_path: Path):
    code = f"import {', '.join(ROOMS)}; print({', '.join(f'{room}.__file__' for room in ROOMS)})"
    done = run([str(installed / "bin/python"), "-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(file).is_relative_to(installed) for file in done.stdout.split()] == [True] * 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_its_use(installed: Path, tmp_path: Path, command: str):
    done = run([str(installed / "bin" / command), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout.lower()


def test_it_says_its_version(wheel: Path, installed: Path, tmp_path: Path):
    done = run([str(installed / "bin/eupe"), "--version"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert wheel.name.split("-")[1] in done.stdout


def test_recipes_are_listed(installed: Path, tmp_path: Path):
    done = run([str(installed / "bin/eupe"), "recipes"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eupe_vitb16" in done.stdout


def test_without_sources_bad_input_is_one_sentence(installed: Path, compiled: Path, tmp_path: Path):
    assert [path for path in compiled.rglob("*.py")] == []
    python = str(installed / "bin/python")
    command = [python, "-m", "flows.cli", "recipes", "show", "nope"]
    done = run(command, tmp_path, PYTHONPATH=str(compiled))
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "nope" in done.stderr
    command = [python, "-c", "import flows.cli; print(flows.cli.__file__)"]
    done = run(command, tmp_path, PYTHONPATH=str(compiled))
    assert done.stdout.strip() == str(compiled / "flows/cli.pyc")
