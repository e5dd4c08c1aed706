"""The import laws: of the rooms, of the wings and the cache's folders, and no circle anywhere."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
WINGS = (
    "doctor",
    "sweeps",
    "evaluation",
    "release",
    "caching",
    "training",
    "features",
    "images",
    "recipe",
    "machines",
    "records",
)
"""Of pipelines, top to bottom; its own files (stages) stand above them all."""
STRANGERS = {"caching": "training"}
"""Two trades: what both need lies below them."""


def below(wing: str) -> set[str]:
    """Return what a wing may import: the rooms below, itself, and the wings under it."""
    lower = WINGS[WINGS.index(wing) :]
    wings = {f"pipelines.{each}" for each in lower if each != STRANGERS.get(wing)}
    return {"eupe", "cache", *wings}


PLAIN = {"eupe.addressed", "eupe.errors", "eupe.fingerprint", "eupe.spec"}
"""Of the science, what needs no torch."""
# Of the entries that name a file's folder, the deepest holds.
MAY_IMPORT = {
    "eupe": {"eupe"},
    "cache": {*PLAIN, "cache"},
    "cache.codec": {*PLAIN, "cache.errors", "cache.codec"},
    "cache.files": {*PLAIN, "cache.errors", "cache.files"},
    "cache.format": {*PLAIN, "cache.errors", "cache.codec", "cache.files", "cache.format"},
    "pipelines": {"eupe", "cache", "pipelines"},
    **{f"pipelines.{wing}": below(wing) for wing in WINGS},
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


def allowed(folder: str, name: str) -> bool:
    """Say whether a file of `folder`, dotted, may import the dotted name."""
    top = name.partition(".")[0]
    if top in ROOMS:
        while folder not in MAY_IMPORT:
            folder = folder.rpartition(".")[0]
        return any(name == entry or name.startswith(entry + ".") for entry in MAY_IMPORT[folder])
    return top not in NEVER[folder.partition(".")[0]]


def violations(folder: str, source: str) -> list[str]:
    return [
        f"line {line}: {folder} imports {name}"
        for line, name in imported(source)
        if not allowed(folder, name)
    ]


def files() -> list[Path]:
    found = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(found) > len(ROOMS), "no files found: the test would prove nothing"
    return found


def dotted(path: Path) -> str:
    """Return the dotted name of a file or folder of the checkout."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_every_file_obeys_the_import_law():
    broken = [
        f"{path.relative_to(ROOT)} {fault}"
        for path in files()
        for fault in violations(dotted(path.parent), path.read_text())
    ]
    assert broken == []


def test_every_folder_of_pipelines_is_a_wing_with_its_floor():
    folders = {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")}
    assert folders <= set(WINGS)
    assert len(folders) > 5, "no wings found: the test would prove nothing"


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("cache", "import torch"),
        ("cache", "from eupe.teachers import Teacher"),
        ("cache", "from eupe import teachers"),
        ("cache", "def late():\n    import ray"),
        ("eupe", "from cache.reader import Reader"),
        ("eupe", "import polars as pl"),
        ("pipelines", "from flows import cli"),
        ("pipelines", "from prefect import flow"),
        ("pipelines.records", "from prefect import flow"),
        ("pipelines.recipe", "from pipelines.training import start"),
        ("pipelines.recipe", "def late():\n    import pipelines.training.start"),
        ("pipelines.features", "from pipelines import stages"),
        ("pipelines.records", "from pipelines import machines"),
        ("pipelines.caching", "from pipelines.doctor import facts"),
        ("pipelines.caching", "from pipelines.training.batches import Batches"),
        ("pipelines.training", "from pipelines.caching import indexing"),
        ("cache.format", "from cache.store import Store"),
        ("cache.codec", "from cache.format import layout"),
        ("cache.files", "from cache import reader"),
    ],
)
def test_the_laws_can_be_broken(folder: str, line: str):
    assert violations(folder, line) != []


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("cache", "from eupe.spec import StoreSpec"),
        ("cache", "from eupe.errors import BadInput"),
        ("cache", "from eupe import fingerprint"),
        ("pipelines", "import torch, ray\nfrom cache.reader import Reader"),
        ("flows", "from prefect import flow\nfrom pipelines import train"),
        ("pipelines", "from pipelines.evaluation import report"),
        ("pipelines.evaluation", "from pipelines.training import inputs"),
        ("pipelines.recipe", "from pipelines.recipe import config\nfrom pipelines import records"),
        ("pipelines.evaluation.protocols", "from pipelines.training import inputs"),
        ("cache.format", "from cache.files import place\nfrom cache.errors import StoreError"),
        ("flows.commands", "from flows import cli"),
    ],
)
def test_the_laws_allow_what_they_should(folder: str, line: str):
    assert violations(folder, line) == []


def circle(sources: Mapping[str, str]) -> list[str]:
    """Return the modules of one import circle, the first again at the end; none: empty.

    Imports inside functions count, those for type checkers alone do not.

    Args:
        sources: dotted module name -> source.
    """
    graph = {
        module: {found for name in run_imports(source) if (found := owner(name, sources))}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def run_imports(source: str) -> set[str]:
    """Return the dotted names that a module imports when it runs."""

    class NotForTypes(ast.NodeTransformer):
        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node

    tree = NotForTypes().visit(ast.parse(source))
    return {name for _, name in imported(ast.unparse(tree))}


def owner(name: str, modules: Mapping[str, str]) -> str | None:
    """Return the module that a dotted name is, or is an attribute of; None: another's."""
    return next((each for each in (name, name.rpartition(".")[0]) if each in modules), None)


def test_no_modules_import_each_other_in_a_circle():
    assert (
        circle({dotted(path).removesuffix(".__init__"): path.read_text() for path in files()}) == []
    )


def test_a_circle_is_found():
    late = "def later():\n    from a.b import Thing"
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import Thing"
    chain = {"a": "", "a.b": "import numpy\nfrom a import c", "a.c": "from a.d import Other"}
    assert set(circle({**chain, "a.d": late})) == {"a.b", "a.c", "a.d"}
    assert circle({**chain, "a.d": typed}) == []


def loaded_by(statement: str, modules: set[str]) -> set[str]:
    """Return which of the modules a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*sorted({modules!r} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=PATIENCE_SECONDS,
    )
    return set(run.stdout.split())


def cache_modules() -> list[str]:
    return [dotted(path) for path in sorted((ROOT / "cache").rglob("[a-z]*.py"))]


def test_a_store_opens_without_torch_ray_or_prefect():
    statement = "\n".join(["import cache", *(f"import {name}" for name in cache_modules())])
    assert loaded_by(statement, NEVER["cache"]) == set()


@pytest.mark.slow
def test_a_run_without_networks_of_open_clip_does_not_wait_for_its_imports():
    """Seconds of each of a demo's ten processes: transformers, and all of torchvision."""
    work = "pipelines.stages, pipelines.caching.extractor, pipelines.evaluation.report"
    assert loaded_by(f"import {work}", {"open_clip", "transformers"}) == set()


@pytest.mark.slow
def test_the_subprocess_test_can_fail():
    assert loaded_by("import cache, torch", {"torch", "ray"}) == {"torch"}
