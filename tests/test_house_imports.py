"""The import law: eupe <- cache <- pipelines <- flows, and a store opens without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
MAY_IMPORT = {
    "eupe": {"eupe"},
    "cache": {"eupe.addressed", "eupe.errors", "eupe.fingerprint", "eupe.spec", "cache"},
    "pipelines": {"eupe", "cache", "pipelines"},
    "flows": {"eupe", "cache", "pipelines", "flows"},
}
# A room's own character: what it is built without.
NEVER = {
    "eupe": {"ray", "prefect", "zarr", "pyarrow", "polars"},
    "cache": {"torch", "torchvision", "timm", "open_clip", "ray", "prefect"},
    "pipelines": {"prefect"},
    "flows": set(),
}


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import anywhere in the source, lazy ones included.

    `from a.b import c` yields both `a.b` and `a.b.c`, since c may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: absolute imports only"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def allowed(room: str, name: str) -> bool:
    """Say whether a file of `room` may import the dotted name."""
    top = name.partition(".")[0]
    if top in ROOMS:
        return any(name == entry or name.startswith(entry + ".") for entry in MAY_IMPORT[room])
    return top not in NEVER[room]


def violations(room: str, source: str) -> list[str]:
    return [
        f"line {line}: {room} imports {name}"
        for line, name in imported(source)
        if not allowed(room, name)
    ]


def files() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(found) > len(ROOMS), "no files found: the test would prove nothing"
    return found


def test_every_file_obeys_the_import_law():
    broken = [
        f"{path.relative_to(ROOT)} {fault}"
        for path in files()
        for fault in violations(path.relative_to(ROOT).parts[0], path.read_text())
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("cache", "import torch"),
        ("cache", "from eupe.teachers import Teacher"),
        ("cache", "from eupe import teachers"),
        ("cache", "def late():\n    import ray"),
        ("eupe", "from cache.reader import Reader"),
        ("eupe", "import polars as pl"),
        ("pipelines", "from flows import cli"),
        ("pipelines", "from prefect import flow"),
    ],
)
def test_the_law_can_be_broken(room: str, line: str):
    assert violations(room, line) != []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("cache", "from eupe.spec import StoreSpec"),
        ("cache", "from eupe.errors import BadInput"),
        ("cache", "from eupe import fingerprint"),
        ("pipelines", "import torch, ray\nfrom cache.reader import Reader"),
        ("flows", "from prefect import flow\nfrom pipelines import train"),
    ],
)
def test_the_law_allows_what_it_should(room: str, line: str):
    assert violations(room, line) == []


def loaded_by(statement: str, modules: set[str]) -> set[str]:
    """Return which of the modules a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*sorted({modules!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def cache_modules() -> list[str]:
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "cache").rglob("[a-z]*.py"))
    ]


def test_a_store_opens_without_torch_ray_or_prefect():
    statement = "\n".join(["import cache", *(f"import {name}" for name in cache_modules())])
    assert loaded_by(statement, NEVER["cache"]) == set()


def test_the_subprocess_test_can_fail():
    assert loaded_by("import cache, torch", {"torch", "ray"}) == {"torch"}
