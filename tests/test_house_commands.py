"""Every command of the pages can be typed: commands, options, recipes, fields, files, targets."""

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from cache.codec.known import row_bytes
from eupe.encoders import Encoder
from flows.cli import app
from pipelines.caching import planning
from pipelines.caching.outlook import HOUR, shown
from pipelines.caching.rates import Figure, Rates, machine
from pipelines.recipe import recipes
from pipelines.recipe.config import SourceConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DATED = "log.md"  # says what was typed then
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
DEPLOYED = {
    (each["entrypoint"].partition(":")[2].replace("_", "-"), each["name"])
    for each in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
}
STAGE_OPTIONS = ("--recipe", "--set", "--json")
BLOCK = re.compile(r"^(?: {4}(?! *[|+]).*\n)+", re.MULTILINE)
FENCED = re.compile(r"^```(?:sh|bash)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(
    r"`((?:eupe|make|python -m benchmarks|python examples|ray job|prefect deployment)"
    r"(?:[ ./](?!<-)[^`]*)?)`"
)
PLACEHOLDER = re.compile(r"[A-Z]+(_[A-Z]+)*|\.\.\.")
IMAGENET_1K = 1_281_167


def commands(page: str) -> Iterator[str]:
    """Yield the command lines of a page: of its blocks, and those quoted in its sentences."""
    for block in [*BLOCK.findall(page), *FENCED.findall(page)]:
        for line in block.replace("\\\n", " ").splitlines():
            typed = re.sub(r"\s# .*|\s{2,}#.*", "", line).strip()
            if re.match(r"(\.venv/bin/)?(eupe|make|stage\d|ray|prefect|python)\b(?!:)", typed):
                yield from (part.strip() for part in typed.split("&&"))
    for quoted in INLINE.findall(page):
        if re.match(r"eupe[./]", quoted):  # a module, a folder
            continue
        yield from (part.strip() for part in quoted.split("&&"))


def fault(line: str) -> str | None:
    """Say what is wrong with a command line; None if nothing is, or if it is none of ours."""
    program, *words = shlex.split(line.replace(".venv/bin/", ""))
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        gone = [word for word in words if word not in targets and "=" not in word]
        return f"{line}: no target {gone}" if gone else None
    if program == "python" and words and words[0] == "-m":
        return None if importlib.util.find_spec(words[1]) else f"{line}: no module {words[1]}"
    if program == "python" and words and words[0].endswith(".py"):
        return None if (ROOT / words[0]).is_file() else f"{line}: no file {words[0]}"
    if program == "prefect" and words[:2] == ["deployment", "run"]:
        flow, _, name = words[2].partition("/")
        if (flow, name) not in DEPLOYED:
            return f"{line}: no deployment {words[2]}"
        named = [word.partition("=")[2] for word in words if word.startswith("recipe=")]
        return bad_recipe(line, named[0], []) if named else None
    if program == "ray" and "--" in words:
        return fault(shlex.join(words[words.index("--") + 1 :]))
    if program == "eupe":
        return bad_eupe(line, words)
    if program in SCRIPTS:
        unknown = [w for w in words if w.startswith("--") and w not in STAGE_OPTIONS]
        named = [words[i + 1] for i, word in enumerate(words) if word == "--recipe"]
        return f"{line}: no option {unknown}" if unknown else bad_recipe(line, *named, changes=[])
    return None


def bad_eupe(line: str, words: list[str]) -> str | None:
    """Say what is wrong with the words after `eupe`."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if words and hasattr(command, "commands") and not words[0].startswith("-"):
        return f"{line}: no command {words[0]!r}"
    options = {name: option for option in command.params for name in option.opts}
    changes, given = list[str](), list[str]()
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            given.append(word)
        elif (name := word.partition("=")[0]) not in {*options, "--help", "--version"}:
            return f"{line}: no option {name}"
        elif name in options and not getattr(options[name], "is_flag", False) and "=" not in word:
            value = words.pop(0)
            changes += [value] if name == "--set" else []
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    takes = [each.name for each in arguments]
    if len(given) > len(takes) and all(each.nargs == 1 for each in arguments):
        return f"{line}: takes {takes}"
    return bad_recipe(line, *given[:1], changes=changes) if takes == ["recipe"] else None


def bad_recipe(line: str, name: str = "demo", changes: list[str] | None = None) -> str | None:
    """Say why a recipe or its changes do not fit; the files that a page tells to write are none."""
    if PLACEHOLDER.fullmatch(name) or name == "recipes/mine.yaml":
        return None
    try:
        recipes.get(name, [change for change in changes or [] if not PLACEHOLDER.search(change)])
    except ValueError as error:
        return f"{line}: {error}"
    return None


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EUPE_HOME", str(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_can_be_typed(page: Path):
    if page.name == DATED:
        pytest.skip("dated: what was typed then")
    assert [found for line in commands(page.read_text()) if (found := fault(line))] == []


def test_the_pages_name_commands():
    assert len(set(commands((ROOT / "README.md").read_text()))) > 15


@pytest.mark.parametrize(
    "line",
    [
        "make dmo",
        "python -m benchmarks.no_such",
        "python examples/no_such.py ROOT",
        "prefect deployment run teacher-caches/default",
        "prefect deployment run distill/default -p recipe=eupe_vitb14",
        "ray job submit -- stage2 --recipe eupe_vitb14",
        "ray job submit --entrypoint-num-gpus 1 -- eupe reports demo",
        "stage2 --recpie demo",
        "eupe cache lst",
        "eupe runs demo",
        "eupe run dmo",
        "eupe run demo --sets seed=1",
        "eupe run demo --set seeds=1",
        "eupe run demo --set stages.stage2.steps=-1",
        "eupe run demo another",
        ".venv/bin/eupe cache ls --jsn",
    ],
)
def test_a_command_that_cannot_be_typed_is_noticed(line: str):
    assert fault(line) is not None


def yaml_blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_readmes_recipe_is_one(tmp_path: Path):
    (text,) = yaml_blocks((ROOT / "README.md").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    recipe = recipes.get(str(file))
    teacher = recipe.teachers["dinov3_s"]
    assert recipe.name == "mine"
    assert recipe.stage("stage1").teachers == ("dinov3_s",)
    for resolution in teacher.resolutions:
        Encoder(teacher.encoder).check_resolution(resolution)
        assert resolution <= recipe.views.canvas


def test_help_and_page_name_every_field_of_a_source():
    page = (ROOT / "docs/sources.md").read_text()
    said = CliRunner().invoke(app, ["cache", "build", "--help"], env={"COLUMNS": "100"}).output
    for name, field in SourceConfig.model_fields.items():
        kinds = field.annotation.__args__ if name == "kind" else ()
        for word in (name, *kinds):
            assert re.search(rf"\b{word}\b", page), word
            assert re.search(rf"\b{word}\b", said), word


def test_what_a_view_costs_is_what_the_store_takes():
    page = (ROOT / "README.md").read_text()
    table = page.split("## What it costs")[1].split("\n\n")[2].splitlines()[2:]
    shapes = {
        "student": [(256, 768)],
        "experts": [(1024, 1536), (1024, 1536), (256, 1280)],
        "proxy": [(256, 1536), (576, 1536), (1024, 1536)],
    }
    assert len(table) == 8
    for line in table:
        codec, _, *said = line.strip("| ").split(" | ")
        for (mega, tera), shape in zip(
            zip(said[::2], said[1::2], strict=True), shapes.values(), strict=True
        ):
            view = sum(row_bytes(codec, *tokens) for tokens in shape)
            places = len(mega.split()[0].partition(".")[2])
            assert mega == f"{view / 1e6:.{places}f} MB", line
            assert tera == f"{view * IMAGENET_1K / 1e12:.2f} TB", line


@pytest.mark.parametrize("page", ["plan_imagenet1k.md", "eight_h100.md"])
def test_hours_and_money_of_eight_h100_are_what_the_planner_says(page: str):
    text = (ROOT / "docs" / page).read_text()
    asked = recipes.get("imagenet1k_vits16")
    found = planning.outlook(asked, (), machine("h100:8"), Rates(), disk_terabytes=28)
    stages = [
        Figure(max(found.stage_seconds(stage).values()) / HOUR, "h", "assumed")
        for stage in found.plan.stages.values()
    ]
    totals = {name.partition(",")[0]: figure for name, figure in found.totals().items()}
    named = ("caches on disk", "building", "a run from caches", "a run with live teachers")
    priced = ("the caches", "a run from caches", "a run with live teachers")
    wanted = [*stages, *(totals[n] for n in (*named, *(f"price of {p}" for p in priced)))]
    assert len(wanted) == 10
    for figure in wanted:
        assert re.search(rf"[|,] {re.escape(shown(figure))} ?[|,]", text), shown(figure)
