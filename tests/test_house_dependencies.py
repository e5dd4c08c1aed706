"""What the rooms import is what pyproject.toml declares; constraints.txt has each version."""

import ast
import json
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Set
from functools import cache
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PATIENCE_SECONDS = 300

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"]]
LOCKED_EXTRAS = ("demo", "dev", "release", "transformers", "bench")  # what `make install` installs
INSTALL = runpy.run_path(str(ROOT / ".ci/install.py"))
AUDIT = runpy.run_path(str(ROOT / ".ci/audit.py"))
LOCK = runpy.run_path(str(ROOT / ".ci/lock.py"))

# Declared though no file imports them, and why.
NOT_IMPORTED = {
    "torchvision": "timm and open_clip import it; each release is built for one torch",
    "tensorboard": "torch.utils.tensorboard imports it",
    "honcho": "the local stack runs its command",
}
# Imported though not declared, and why.
BROUGHT = {"triton": "torch's wheels for CUDA bring the one they were built with, others have none"}
# Imported where they are asked for, and not before: a sentence names the extra that is missing.
OPTIONAL = ("release", "transformers")
SCREEN_LINES = 24


def third_party(source: str) -> set[str]:
    """Top-level names of the third-party modules that the source imports, lazily or not."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - set(ROOMS)


@cache
def owners() -> Mapping[str, list[str]]:
    """Return which distributions provide each top-level module here."""
    return metadata.packages_distributions()


def undeclared(imports: Set[str], declared: set[str]) -> list[str]:
    """Name the imports that no declared distribution provides."""
    return sorted(
        name
        for name in imports
        if name not in BROUGHT
        and not declared & {canonicalize_name(owner) for owner in owners().get(name, [])}
    )


def unused(imports: Set[str], declared: set[str]) -> list[str]:
    """Name the declared distributions that provide none of the imports."""
    used = {canonicalize_name(owner) for name in imports for owner in owners().get(name, [])}
    return sorted(declared - used)


@cache
def imports() -> frozenset[str]:
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(files) > len(ROOMS), "no files found: the test would prove nothing"
    return frozenset().union(*(third_party(path.read_text()) for path in files))


def declared() -> set[str]:
    return {canonicalize_name(wanted.name) for wanted in DECLARED}


def optional() -> set[str]:
    extras = (PROJECT["optional-dependencies"][extra] for extra in OPTIONAL)
    return {canonicalize_name(Requirement(line).name) for line in chain(*extras)}


def test_every_import_of_the_rooms_is_a_declared_runtime_dependency():
    assert undeclared(imports(), declared() | optional()) == []


def test_every_runtime_dependency_is_imported_or_has_its_reason():
    assert unused(imports(), declared()) == sorted(NOT_IMPORTED)


@pytest.mark.parametrize(
    "line", ["import pytest", "def late():\n    from hypothesis import given", "import no_such.one"]
)
def test_an_import_that_is_not_declared_is_noticed(line: str):
    assert undeclared(third_party(line), declared()) != []


def test_a_dependency_without_an_import_is_noticed():
    assert "polars" in unused(imports() - {"polars"}, declared())
    assert third_party("import os, cache.store\nfrom eupe import spec") == set()


def versions(text: str) -> dict[str, str]:
    """Read a constraints file; every line is NAME==VERSION or a comment."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and not set(line) & set("@/; ") for line in lines), lines
    return dict(line.split("==") for line in lines)


def unlocked(requirements: list[Requirement], locked: dict[str, str]) -> list[str]:
    """Name the requirements whose locked version is missing or outside of their bounds."""
    return [
        str(wanted)
        for wanted in requirements
        if canonicalize_name(wanted.name) not in locked
        or locked[canonicalize_name(wanted.name)] not in wanted.specifier
    ]


def test_constraints_cover_every_declared_dependency_within_its_bounds():
    extras = (PROJECT["optional-dependencies"][extra] for extra in LOCKED_EXTRAS)
    requirements = [*DECLARED, *map(Requirement, chain(*extras))]
    locked = versions((ROOT / "constraints.txt").read_text())
    assert unlocked(requirements, locked) == []
    assert len(locked) > 3 * len(requirements), "the dependencies' dependencies are missing"


@pytest.mark.parametrize("locked", [{}, {"torch": "2.13.0"}])
def test_a_version_that_is_missing_or_out_of_bounds_is_noticed(locked: dict[str, str]):
    assert unlocked([Requirement("torch>=2.14,<2.15")], locked) == ["torch<2.15,>=2.14"]


def test_the_lock_follows_extras_and_writes_what_it_can_read():
    found = LOCK["closure"]("pytest", frozenset())
    assert {"pluggy", "iniconfig"} <= set(found)
    assert "pytest" not in found
    assert "aiohttp-cors" in LOCK["closure"]("ray", frozenset({"default"}))
    assert "aiohttp-cors" not in LOCK["closure"]("ray", frozenset())
    assert versions(LOCK["constraints"](found)) == found


def test_an_installation_fits_a_screen():
    lines = [f"Collecting package-{number}>=1\n" for number in range(200)]
    lines += [
        f"  Downloading package_{number}-1.0-py3-none-any.whl (2.8 MB)\n" for number in range(9)
    ]
    lines += ["  Downloading ray-2.60.0-cp311-cp311-manylinux2014_x86_64.whl (79.3 MB)\n"]
    lines += ["WARNING: an address is ignored\n", "Installing collected packages: a, b, c\n"]
    lines += ["Successfully installed a-1 b-2 c-3\n"]
    shown = list(INSTALL["progress"](lines))
    assert len(shown) < SCREEN_LINES
    assert [*shown[:1], *shown[-3:]] == [
        "50 packages found",
        "ray 2.60.0, 79 MB",
        "installing 3 packages: a minute or two",
        "installed 3 packages",
    ]


def test_a_failed_installation_shows_what_pip_said(tmp_path: Path):
    command = [sys.executable, str(ROOT / ".ci/install.py"), str(tmp_path / "log")]
    command += ["--no-index", "--isolated", "no-such-package-of-eupe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 1
    assert "No matching distribution found for no-such-package-of-eupe" in done.stderr
    assert str(tmp_path / "log") in done.stderr


def audited(*vulnerabilities: dict[str, object]) -> str:
    """Return a report as pip-audit prints it: one package looked up, one that was not found."""
    found = {"name": "a", "version": "1", "vulns": list(vulnerabilities)}
    skipped = {"name": "b", "skip_reason": "not found"}
    return json.dumps({"dependencies": [found, skipped], "fixes": []})


def test_a_known_vulnerability_is_a_finding_unless_it_is_answered(monkeypatch):
    findings = AUDIT["findings"]
    assert findings(audited()) == ([], 1)
    known = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}
    assert findings(audited(known)) == (["a 1: PYSEC-1, mended in 2"], 1)
    monkeypatch.setitem(findings.__globals__["ANSWERED"], "CVE-1", "not called")
    assert findings(audited(known)) == ([], 1)


@pytest.mark.parametrize(
    ("report", "code", "says"),
    [
        ("", 0, "nothing was audited"),
        (
            json.dumps({"dependencies": [{"name": "b", "skip_reason": "x"}]}),
            0,
            "nothing was audited",
        ),
        (audited({"id": "PYSEC-1", "aliases": [], "fix_versions": []}), 1, "no version yet"),
        (audited(), 0, "1 packages, 0 vulnerabilities"),
    ],
)
def test_the_audit_fails_on_a_finding_and_says_when_nothing_answers(
    tmp_path, monkeypatch, capsys, report, code, says
):
    """The interpreter in place of pip-audit prints what it is told."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\ncat <<'END'\n{report}\nEND\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    assert AUDIT["main"](tmp_path / "constraints.txt") == code
    assert says in capsys.readouterr().out
