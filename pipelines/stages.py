"""The commands `stage1`, `stage2` and `stage3`: one stage of a recipe, from its caches."""

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from pipelines.evaluation import during
from pipelines.machines import interrupt, loopback
from pipelines.machines.errors import one_sentence
from pipelines.recipe import recipes
from pipelines.recipe.stage import StageName
from pipelines.recipe.words import AsJson, Overrides
from pipelines.training import launch
from pipelines.training.loop import StageResult


def stage1() -> None:
    """Train several teachers into one large proxy, and exit (EUPE, arXiv:2603.22387, Stage 1)."""
    run("stage1", recipes.DEFAULT)


def stage2() -> None:
    """Train a student at a fixed resolution, and exit (EUPE, arXiv:2603.22387, Stage 2)."""
    run("stage2", recipes.STAGE_2_ONLY)


def stage3() -> None:
    """Train the student at several resolutions, and exit (EUPE, arXiv:2603.22387, Stage 3)."""
    run("stage3", recipes.DEFAULT)


def run(name: StageName, default: str, arguments: Sequence[str] | None = None) -> None:
    """Train a stage and exit: 0 done, 2 bad input, with one sentence on stderr.

    Args:
        name: of the stage.
        default: recipe trained when none is named.
        arguments: of the command line; None for those of this process.
    """
    command = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )

    @command.command(
        help=f"Train {name} of a recipe from its caches, going on from its newest checkpoint.",
        epilog="Relative paths of recipes are below $EUPE_HOME: the working folder unless set.",
    )
    def train(
        recipe: Annotated[
            str, typer.Option(help="Name of a recipe, or a YAML file that changes one.")
        ] = default,
        overrides: Overrides = None,
        as_json: AsJson = False,
    ) -> None:
        asked = recipes.get(recipe, overrides or [])
        described = describe(launch.train(asked, asked.stage(name), make_evaluate=during.hook))
        if as_json:
            print(json.dumps(described, indent=2))
            return
        for key, value in described.items():
            print(f"{key:>18}  {value}")

    loopback.reach_directly()
    with interrupt.at_once(), one_sentence():
        command(arguments, prog_name=name)


def describe(done: StageResult) -> dict[str, str | int | float]:
    """Return what a stage did, as plain data."""
    return {
        "checkpoint": str(done.checkpoint.directory),
        "steps": done.checkpoint.step,
        "resumed_from": done.first_step,
        "seconds": round(done.seconds, 1),
        "images_per_second": round(done.images_per_second, 1),
        "data_wait_share": round(done.wait_share, 3),
        "invalid_rows": done.invalid_rows,
    }
