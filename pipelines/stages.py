"""The commands `stage1`, `stage2` and `stage3`: one stage of a recipe, from its caches."""

import argparse
import json
import sys
from collections.abc import Sequence

from pipelines.evaluation import during
from pipelines.machines.errors import one_sentence
from pipelines.recipe import recipes
from pipelines.recipe.stage import StageName
from pipelines.training import launch
from pipelines.training.loop import StageResult


def stage1() -> None:
    """Train several teachers into one large proxy, and exit (EUPE, arXiv:2603.22387, Stage 1)."""
    sys.exit(run("stage1", recipes.DEFAULT))


def stage2() -> None:
    """Train a student at a fixed resolution, and exit (EUPE, arXiv:2603.22387, Stage 2)."""
    sys.exit(run("stage2", recipes.STAGE_2_ONLY))


def stage3() -> None:
    """Train the student at several resolutions, and exit (EUPE, arXiv:2603.22387, Stage 3)."""
    sys.exit(run("stage3", recipes.DEFAULT))


def run(name: StageName, default: str, arguments: Sequence[str] | None = None) -> int:
    """Train a stage and return 0; bad input exits with 2 and one sentence on stderr.

    Args:
        name: of the stage.
        default: recipe trained when none is named.
        arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(
        prog=name,
        description=f"Train {name} of a recipe from its caches, going on from its newest "
        "checkpoint. Relative paths of recipes are below $EUPE_HOME, which is the working folder "
        "unless set.",
    )
    parser.add_argument(
        "--recipe",
        default=default,
        help=f"name of a recipe, or a YAML file that changes one (default: {default})",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        help=f"change a field of the recipe, e.g. stages.{name}.optimizer.lr=1e-4; may be given "
        "many times",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    asked = parser.parse_args(arguments)
    with one_sentence():
        recipe = recipes.get(asked.recipe, asked.overrides)
        done = launch.train(recipe, recipe.stage(name), make_evaluate=during.hook)
    described = describe(done)
    if asked.json:
        print(json.dumps(described, indent=2))
    else:
        for key, value in described.items():
            print(f"{key:>18}  {value}")
    return 0


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
