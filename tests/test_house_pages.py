"""The pages are held to the code: laws, tests and files that one names exist in the other."""

import ast
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DESIGN = (ROOT / "docs/design.md").read_text()
FOLDERS = (
    "eupe",
    "cache",
    "pipelines",
    "flows",
    "tests",
    "benchmarks",
    "docs",
    "examples",
    "recipes",
    "deploy",
)
NAMED_LAWS = re.compile(r"\blaws?[ \n]+(\d+(?:(?:, | and |, and )\d+)*)")
NAMED_TEST = re.compile(r"\b(tests/\w+\.py)::(test_\w+)")
NAMED_FILE = re.compile(
    r"`((?:eupe|cache|pipelines|flows|tests|benchmarks|examples|recipes|deploy)/[\w./]*)`"
)
NAMED_CODE = re.compile(r"`((?:eupe|cache|pipelines|flows)(?:\.\w+)+)`")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")  # a colon: an address, not a file


def laws() -> dict[int, str]:
    """The laws of the page by number, each with its text."""
    heads = re.split(r"^## (\d+)\. ", DESIGN.split("\n# Choices")[0], flags=re.MULTILINE)[1:]
    return {int(number): text for number, text in zip(heads[::2], heads[1::2], strict=True)}


def named_laws(text: str) -> Iterator[int]:
    """Yield each N of `law N`, `laws N and M` and `laws N, M`."""
    for found in NAMED_LAWS.findall(text):
        yield from (int(number) for number in re.findall(r"\d+", found))


def missing_tests(text: str) -> list[str]:
    """The FILE::NAME of a text that are no test functions."""
    return [f"{path}::{name}" for path, name in NAMED_TEST.findall(text) if not is_test(path, name)]


def is_test(path: str, name: str) -> bool:
    """True if the file has a test function of that name."""
    file = ROOT / path
    return file.is_file() and any(
        isinstance(node, ast.FunctionDef) and node.name == name
        for node in ast.parse(file.read_text()).body
    )


def texts() -> dict[str, str]:
    """Every text of the project that may name a law, by path."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return {
        str(path.relative_to(ROOT)): path.read_text()
        for path in sorted([*found, *ROOT.glob("*")])
        if path.suffix in (".py", ".md", ".yaml", ".toml") and path.is_file()
    }


def pages() -> dict[str, str]:
    """The Markdown pages, by path."""
    return {path: text for path, text in texts().items() if path.endswith(".md")}


def missing_code(text: str) -> list[str]:
    """The files, modules and their attributes that a text names and that are not there."""
    files = [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()]
    return files + [name for name in NAMED_CODE.findall(text) if not is_code(name)]


def is_code(name: str) -> bool:
    """True if the dotted name is a module, or reached by attributes from one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_laws_are_numbered_without_a_gap():
    assert list(laws()) == list(range(1, 19))


def test_every_law_that_anyone_names_is_on_the_page():
    named = {(path, law) for path, text in texts().items() for law in named_laws(text)}
    assert len(named) > 15, "no laws found: the test would prove nothing"
    assert sorted((path, law) for path, law in named if law not in laws()) == []


def test_laws_are_found_however_they_are_named():
    text = "law 1; laws 2 and 3, (laws 4, 5 and 6) and law\n7; by-law, lawn 8, the law of 9"
    assert list(named_laws(text)) == [1, 2, 3, 4, 5, 6, 7]


def test_every_law_says_why_and_is_held_by_a_test_or_not_built_yet():
    for number, text in laws().items():
        assert "- **Reason.** " in text, number
        assert "- **Without it** " in text, number
        assert ("- **Held by** `tests/" in text) != ("**Not built yet.**" in text), number


def test_every_test_that_a_page_names_exists():
    missing = {path: gone for path, text in pages().items() if (gone := missing_tests(text))}
    assert missing == {}


@pytest.mark.parametrize(
    "name", ["test_no_such.py::test_it", "test_house_pages.py::test_no_such", "test_x.py::test_y"]
)
def test_a_test_that_is_gone_is_noticed(name: str):
    text = f"`tests/{name}`, `tests/test_house_pages.py::test_a_test_that_is_gone_is_noticed`"
    assert missing_tests(text) == [f"tests/{name}"]


def test_files_and_code_that_a_page_names_exist():
    missing = {
        path: gone
        for path, text in pages().items()
        if path != "docs/log.md" and (gone := missing_code(text))  # dated: named as it was then
    }
    assert missing == {}


def test_code_that_is_gone_is_noticed():
    there = "`eupe.spec`, `eupe.spec.StoreSpec.directory`, `cache/codec/`, `cache/store.py`, "
    gone = ["cache/no_such.py", "eupe.no_such", "eupe.spec.NoSuch"]
    assert missing_code(there + ", ".join(f"`{name}`" for name in gone)) == gone


def dead_links(path: str, text: str) -> list[str]:
    """The links of a page that lead to no file."""
    return [link for link in LINK.findall(text) if not (ROOT / path).parent.joinpath(link).exists()]


def test_every_link_of_a_page_leads_to_a_file():
    dead = {path: gone for path, text in pages().items() if (gone := dead_links(path, text))}
    assert dead == {}


def test_a_dead_link_is_noticed():
    text = (
        "[a](design.md#1-identity) [b](no_such.md) [c](https://example.org/x.md) [d](../README.md)"
    )
    assert dead_links("docs/x.md", text) == ["no_such.md"]
