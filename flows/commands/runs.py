"""`eupe train`, `evaluate`, `report` and `run`: what is done with a recipe."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.files import copies
from eupe.errors import BadInput
from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson, Overrides, RecipeName, RecipeNameOrNone

if TYPE_CHECKING:
    from pipelines.recipe.config import Recipe

CONNECT_SECONDS = 4.0  # which Prefect's client does four times
ANSWER_SECONDS = 15.0

app = typer.Typer()


@app.command("train")
def train(
    recipe: RecipeName = "demo",
    stage: Annotated[
        str, typer.Option(help="Stage to train: stage1, stage2 or stage3 of the recipe.")
    ] = "stage2",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Train one stage from its caches, here, going on from its newest checkpoint.

    The same loop as `stage1`, `stage2` and `stage3`, which Ray jobs run.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])
    trained = asked.stage(stage)
    from pipelines.evaluation import during
    from pipelines.stages import describe
    from pipelines.training import launch

    done = launch.train(asked, trained, make_evaluate=during.hook)
    if as_json:
        print_json(describe(done))
    else:
        print_table([describe(done)])


@app.command("evaluate")
def evaluate(
    recipe: RecipeNameOrNone = None,
    stage: Annotated[
        str | None, typer.Option(help="Stage whose student is judged. Left out: all of them.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Judge this beside raw pixels and the recipe's experts, and no run of it: a run "
            "directory, a folder of [b]eupe export[/b], or a network of timm or open_clip; may be "
            "given many times. With [b]--stage[/b], that stage of a run.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="With [b]--model[/b]: weights of the network. Left out: its own download.",
            show_default=False,
        ),
    ] = None,
    named: Annotated[
        str | None,
        typer.Option("--recipe", help="The recipe, for its name at the end.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Judge the newest checkpoints of a run on the held-out images.

    Every encoder in one table: kNN in two protocols, a linear probe, likeness to the
    cached teachers; beside raw pixels, the student before training, and the best prediction that
    ignores the image. Written into the run directory: evaluation.json and correct.parquet, or with
    --stage files of the stage's own, evaluation-stage1.json.
    """
    from pipelines.recipe import recipes

    if recipe is not None and named is not None:
        raise BadInput(f"{recipe} and --recipe {named}: wants the recipe once")
    asked = recipes.get(recipe or named or recipes.DEFAULT, overrides or [])
    if model:
        evaluate_models(asked, model, weights, stage, as_json)
        return
    if weights is not None:
        raise BadInput(f"--weights {weights}: wants --model, the network that they are of")
    alone = asked.stage(stage) if stage else None
    from pipelines.evaluation import evaluate as evaluation
    from pipelines.evaluation.frozen import FrozenStudent
    from pipelines.recipe.stores import Opened
    from pipelines.training import outputs

    outputs.bring(asked.directory)
    judged, opened = [alone] if alone else asked.stages.values(), Opened()
    found = evaluation.evaluate(
        [FrozenStudent(asked, each, evaluation.device(asked), opened) for each in judged]
    )
    path = evaluation.write(asked, found, alone)
    plain = evaluation.plain(asked, found)
    if as_json:
        print_json(plain)
        return
    print_evaluation(plain)
    print(path)


def evaluate_models(
    recipe: "Recipe", names: Sequence[str], weights: str | None, stage: str | None, as_json: bool
) -> None:
    """Judge models by their names, and print the table."""
    from pipelines.evaluation import anybody, evaluate, tables
    from pipelines.release import models

    asked = [models.named(name, weights, stage) for name in names]
    found = anybody.evaluate(recipe, asked, evaluate.device(recipe))
    if as_json:
        print_json(found)
        return
    print_table(tables.encoder_rows(found))
    print(tables.table_line(found))
    for sentence in found["left_out"]:
        print(sentence)


@app.command("report")
def report(
    recipe: RecipeName = "demo",
    seconds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STEP=SECONDS",
            help="How long a step of the run took, to be shown; may be given many times.",
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Judge a finished run, each of its stages, and write summary.json and report.html.

    The last step of [b]eupe run[/b], for runs whose steps you started yourself. What is there
    already, of the same checkpoints and caches, is left as it is.
    """
    from pipelines.recipe import recipes

    asked, took = recipes.get(recipe, overrides or []), clocked(seconds or [])
    from pipelines.evaluation import report as reports

    found = reports.make(asked, took)
    if as_json:
        print_json(found)
    else:
        folder = copies.named(asked.directory)
        print(folder / reports.SUMMARY_FILE, folder / reports.REPORT_FILE)


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, one a seed.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare the final students of several runs with raw pixels and with their initialisations.

    Runs of one recipe under several seeds are pooled: mean, 95 % interval of the paired difference
    (bootstrap over images and runs), and the p-value of the exact paired test in which an image
    counts once, with all its runs. And how much of the way from raw pixels to the better expert
    they have gone, by every probe.
    """
    from dataclasses import asdict

    from pipelines.evaluation import pooled

    found = pooled.compare(runs)
    if as_json:
        print_json({probe: asdict(each) for probe, each in found.items()})
    else:
        print_table(pooled.rows(found))


@app.command("run")
def run(recipe: RecipeName = "demo", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a whole recipe: teacher caches, every stage, evaluation, report.

    As the Prefect flow [b]distill[/b], on the server that PREFECT_API_URL names and the Ray
    cluster that RAY_ADDRESS names; without them on temporary ones of this machine. Steps whose
    output is there already are not repeated; of those that are, it says what has changed.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])
    from pipelines.caching import beforehand

    beforehand.check(asked)  # refused before anything is started
    from pipelines.evaluation import finished, tables

    found = finished.summary(asked)
    if found is None:
        prefect_settings(recipes.home())
        check_prefect()
        from flows.distill import distill

        found = distill(recipe, overrides or [])
    else:
        print("nothing to do: all of it is there, of this recipe and these images", file=sys.stderr)
    if as_json:
        print_json(found)
        return
    print_evaluation(found)
    print(tables.steps_line(found))
    folder = copies.named(asked.directory)
    print(f"{folder / 'summary.json'}\n{folder / 'report.html'}")


def print_evaluation(found: Mapping[str, Any]) -> None:
    """Print what an evaluation found: encoders, cosines, and how the student stands."""
    from pipelines.evaluation import tables

    print_table(tables.encoder_rows(found))
    print(tables.table_line(found))
    print_table(tables.closing_rows(found))
    for sentence in tables.verdicts(found):
        print(sentence)


def prefect_settings(home: Path) -> None:
    """Settle what Prefect reads at import: a home of its own, patience, and no log beside ours.

    Raises:
        StoreError: that home cannot be made.
    """
    from cache.files import atomic
    from cache.files.refused import writing

    if not os.environ.get("PREFECT_API_URL"):
        private = home / "runs" / "prefect"
        with writing(private):
            atomic.make_directories(private)  # Prefect makes the last folder only
        os.environ["PREFECT_HOME"] = str(private)
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # two busy cores take 30
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are shown once, by us
    }.items():
        os.environ.setdefault(name, value)


def check_prefect() -> None:
    """Ask the Prefect server that PREFECT_API_URL names something, if it names one.

    Prefect's own client asks one that says nothing six times, a minute each.

    Raises:
        BadInput: it does not answer, or does not take us.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        return
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    patience = {"timeout": (CONNECT_SECONDS, ANSWER_SECONDS, ANSWER_SECONDS, ANSWER_SECONDS)}
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(sync_client=True, httpx_settings=patience) as client,
        ):
            client.read_flows(limit=1)
    except Exception as error:  # whatever it is, no flow can be run there
        said = (str(error) or type(error).__name__).partition("\n")[0]
        raise BadInput(
            f"PREFECT_API_URL = {url}: no Prefect server answers us there ({said}); is it up, and "
            "is PREFECT_API_AUTH_STRING its secret? Unset both to run on one of this machine"
        ) from error


def clocked(words: Sequence[str]) -> dict[str, float]:
    """Read STEP=SECONDS words.

    Raises:
        BadInput: another form.
    """
    found = {}
    for word in words:
        step, equals, took = word.rpartition("=")
        if not equals or not took.replace(".", "", 1).isdecimal():
            raise BadInput(f"--seconds {word}: wants STEP=SECONDS, for instance stage2=81.5")
        found[step] = float(took)
    return found
