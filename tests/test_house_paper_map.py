"""docs/paper_map.md is held to the code: what it names exists, what it must name it names."""

import ast
import importlib
import itertools
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from pipelines.recipe import family, paper

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/paper_map.md").read_text()
QUOTED = re.compile(r"`([^`]+)`")
RECIPES = [*(family.full(name) for name in family.STUDENTS), family.proxy()]


def section(title: str) -> str:
    """Return one section of the page."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def named_functions(page: str) -> list[str]:
    return sorted({q for q in QUOTED.findall(page) if re.match(r"(eupe|cache|pipelines)\.\w", q)})


def named_tests(page: str) -> list[str]:
    return sorted({quoted for quoted in QUOTED.findall(page) if "::" in quoted})


def exists(name: str) -> bool:
    """Say whether a dotted name is a module's attribute."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


def is_test(name: str) -> bool:
    """Say whether FILE::NAME is a test function there."""
    path, _, function = name.partition("::")
    if not (ROOT / path).is_file():
        return False
    return function in {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


def deviations(source: str) -> Iterator[str]:
    """Yield the names whose docstring has a `Deviation:`; of a constant, the string after it."""
    body = ast.parse(source).body
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for inner in (node, *(n for n in node.body if isinstance(n, ast.FunctionDef))):
                if "Deviation:" in (ast.get_docstring(inner) or ""):
                    yield node.name
    for before, node in itertools.pairwise(body):
        text = node.value if isinstance(node, ast.Expr) else None
        if isinstance(text, ast.Constant) and "Deviation:" in str(text.value):
            target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            yield target.id


def test_every_function_and_test_named_exists():
    assert len(named_functions(PAGE)) > 30
    assert len(named_tests(PAGE)) > 30
    assert [name for name in named_functions(PAGE) if not exists(name)] == []
    assert [name for name in named_tests(PAGE) if not is_test(name)] == []


@pytest.mark.parametrize("name", ["eupe.losses.no_such", "eupe.no_such.cosine_loss"])
def test_a_function_that_is_gone_is_noticed(name):
    assert not exists(name)


@pytest.mark.parametrize("name", ["test_no_such.py::test_it", "test_house_paper_map.py::test_it"])
def test_a_test_that_is_gone_is_noticed(name):
    assert not is_test(f"tests/{name}")


def test_every_row_of_the_paper_has_a_function_and_a_test():
    rows = [row for row in section("What the paper says").splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 15
    for row in rows:
        _, here, shown = row.strip("| ").split(" | ")
        assert named_functions(here), row
        assert named_tests(shown), row


def test_every_equation_has_a_row():
    assert [n for n in range(3, 8) if f"| Eq. {n}:" not in PAGE] == []


def test_every_deviation_of_a_docstring_is_listed():
    found = [
        ".".join((*path.relative_to(ROOT).with_suffix("").parts, name))
        for room in ("eupe", "cache", "pipelines")
        for path in sorted((ROOT / room).rglob("*.py"))
        for name in deviations(path.read_text())
    ]
    assert len(found) >= 6
    listed = named_functions(section("Deviations"))
    assert [name for name in found if name not in listed] == []


def test_every_assumed_setting_is_explained_and_no_other():
    rows = [row for row in section("Assumptions").splitlines() if row.startswith("| `")]
    patterns = [quoted for row in rows for quoted in QUOTED.findall(row.split(" | ")[0])]
    assumed = {
        setting.path
        for recipe in RECIPES
        for setting in paper.settings(recipe)
        if setting.origin == "assumed"
    }
    explained = {path for path in assumed if any(fnmatchcase(path, each) for each in patterns)}
    assert sorted(assumed - explained) == []
    assert [p for p in patterns if not any(fnmatchcase(path, p) for path in assumed)] == []
