"""The naming rule: a module says what it is for, and shadows nothing."""

import ast
import functools
import re
import sys
import tomllib
import warnings
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}


@functools.cache
def dependencies() -> set[str]:
    """Import names of everything pyproject.toml asks for (extras included)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    distributions = {distribution(item) for item in wanted}
    modules = {
        module.lower()
        for module, owners in metadata.packages_distributions().items()
        if distributions & {distribution(owner) for owner in owners}
    }
    return distributions | modules


def distribution(requirement: str) -> str:
    """Distribution name of a requirement line, in its normal form."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "_", match[0]).lower()


def faults(stem: str, taken: set[str]) -> list[str]:
    found = []
    if stem in EMPTY_NAMES or any(part in EMPTY_NAMES for part in stem.split("_")):
        found.append(f"{stem}: says nothing")
    if stem in ROOMS:
        found.append(f"{stem}: is a room")
    if stem in sys.stdlib_module_names:
        found.append(f"{stem}: is in the standard library")
    if stem in taken:
        found.append(f"{stem}: is a dependency")
    return found


def modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("[a-z]*.py"))]


def folders() -> list[Path]:
    """Return every folder of code inside the rooms."""
    return [
        path.parent for room in ROOMS for path in sorted((ROOT / room).glob("*/**/__init__.py"))
    ]


def test_names_of_modules_and_folders_say_something_and_shadow_nothing():
    taken = dependencies()
    assert len(folders()) > 5, "no folders found: the test would prove half"
    assert [fault for path in (*modules(), *folders()) for fault in faults(path.stem, taken)] == []


@pytest.mark.parametrize(
    "stem",
    ["utils", "image_utils", "common", "cache", "codecs", "types", "ray", "torch", "yaml_misc"],
)
def test_the_naming_rule_can_be_broken(stem: str):
    assert faults(stem, dependencies()) != []


def test_every_file_and_folder_opens_with_its_responsibility():
    mute = [
        str(path.relative_to(ROOT))
        for path in (*modules(), *(folder / "__init__.py" for folder in folders()))
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert mute == []


def test_tests_are_flat_and_named_after_what_they_test():
    wings = [path.name for path in (ROOT / "pipelines").iterdir() if path.is_dir()]
    subjects = "|".join([*ROOMS, *wings, "house", "examples", "benchmarks"])
    named = re.compile(rf"test_({subjects})_\w+\.py")
    stray = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if not (
            named.fullmatch(path.name) or path.name == "conftest.py"
            if path.parent == ROOT / "tests"
            else path.parent.name in ("support", "mutants") and not path.name.startswith("test_")
        )
    ]
    assert stray == []


def test_the_page_of_the_tests_names_what_they_share():
    """Every module of support/, every fixture of conftest.py, every marker; and no other."""
    page = (ROOT / "tests/README.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    support = {path.stem for path in (ROOT / "tests/support").glob("[a-z]*.py")}
    tree = ast.parse((ROOT / "tests/conftest.py").read_text())
    fixtures = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        if any("fixture" in ast.unparse(each) for each in node.decorator_list)
        if not any("autouse" in ast.unparse(each) for each in node.decorator_list)
    }
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {marker.partition(":")[0] for marker in options["markers"]}
    assert named - {"support", "conftest"} == support | fixtures | markers


FUNCTIONS_A_CLASS = 20
STATEMENTS_A_FUNCTION = 50
LINES_TO_THINK_AT = 400


def too_large(source: str) -> list[str]:
    """Name the classes with too many functions and the functions with too many statements."""
    function = ast.FunctionDef | ast.AsyncFunctionDef
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            functions = sum(isinstance(each, function) for each in node.body)
            if functions > FUNCTIONS_A_CLASS:
                found.append(f"{node.name}: {functions} functions")
        elif isinstance(node, function):
            statements = sum(isinstance(each, ast.stmt) for each in ast.walk(node)) - 1
            if statements > STATEMENTS_A_FUNCTION:
                found.append(f"{node.name}: {statements} statements")
    return found


def test_no_class_and_no_function_is_larger_than_anyone_reads():
    """A file above the lines to think at only warns: no comment is folded for a count."""
    found = {str(path.relative_to(ROOT)): path.read_text() for path in modules()}
    for name, source in found.items():
        if (lines := len(source.splitlines())) > LINES_TO_THINK_AT:
            warnings.warn(f"{name} has {lines} lines: two responsibilities?", stacklevel=1)
    assert {name: large for name, source in found.items() if (large := too_large(source))} == {}


def test_a_large_class_and_a_long_function_are_noticed():
    methods = "".join(f"    def f{number}(self): pass\n" for number in range(21))
    assert too_large(f"class Large:\n{methods}") == ["Large: 21 functions"]
    body = "    if x:\n" + "        x = 1\n" * 50
    assert too_large(f"def long(x):\n{body}") == ["long: 51 statements"]
    assert too_large(f"def long(x):\n{body.removesuffix('        x = 1' + chr(10))}") == []
