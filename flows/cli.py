"""The `eupe` command line: caches, training, evaluation and the whole flow."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipelines.machines.errors import one_sentence

app = typer.Typer(
    name="eupe",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Relative paths of recipes are below $EUPE_HOME: the working folder unless set.",
)
cache_app = typer.Typer(
    no_args_is_help=True,
    help="Teacher features on disk: build them once, train from them ever after.",
)
app.add_typer(cache_app, name="cache")
recipes_app = typer.Typer(
    invoke_without_command=True,
    help="The recipes: their networks, sizes and costs, or one in full ([b]show[/b]).",
)
app.add_typer(recipes_app, name="recipes")

RecipeName = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe, for instance [b]demo[/b], or a YAML file that changes one, for "
        "instance [b]recipes/own_images.yaml[/b]."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field of the recipe; may be given many times. Stages, teachers and data "
        "sets are addressed by name: [b]stages.stage2.optimizer.lr=1e-4[/b], "
        "[b]teachers.efficientnet_lite0.codec=float32[/b].",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Root = Annotated[
    Path | None,
    typer.Argument(
        help="Cache root. Left out: that of the [b]demo[/b] recipe.", show_default=False
    ),
]


@cache_app.command("build")
def cache_build(
    recipe: RecipeName = "demo", overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Compute what is missing of a recipe's caches, the proxy's too once stage 1 is done.

    Kill it whenever you like: the same command goes on with the shards that are missing, and
    gives the same bytes.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])
    from pipelines.caching.precompute import build

    built = build(asked)
    if not as_json:
        print(built)
        return
    print_json(
        {
            "shards_computed": built.num_shards,
            "seconds": built.seconds,
            "datasets": [
                {
                    "name": each.dataset,
                    "samples": each.num_samples,
                    "new": each.num_new,
                    "left_out": each.failures.to_dicts(),
                }
                for each in built.indexed
            ],
            "stores": [str(store.directory) for store in built.stores],
        }
    )


@cache_app.command("ls")
def cache_ls(root: Root = None, as_json: AsJson = False) -> None:
    """List the feature stores of a cache root."""
    from cache.listing import store_lines

    lines = store_lines(root_of(root))
    if as_json:
        print_json(lines)
    elif lines:
        print_table(lines)
    else:
        print(f"{root_of(root)}: no stores yet; `eupe cache build` makes them")


@cache_app.command("inspect")
def cache_inspect(
    store: Annotated[Path, typer.Argument(help="Folder of a store, as `eupe cache ls` names it.")],
    as_json: AsJson = False,
) -> None:
    """Say what one store holds: its spec, moments, shards, invalid rows and provenance."""
    from cache.listing import describe

    description = describe(store)
    if as_json:
        print_json(description)
        return
    Console(width=None if sys.stdout.isatty() else 200).print_json(json.dumps(description))


@cache_app.command("verify")
def cache_verify(
    root: Root = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Sizes and indexes only; no checksum of every byte.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every committed file against its recorded checksum; exit code 1 if one is wrong."""
    from cache.store import find_stores, open_store
    from cache.verify import verify
    from pipelines.machines.progress import track

    base = root_of(root)
    stores = [open_store(base, info.spec) for info in find_stores(base)]
    lines, problems = [], list[str]()
    for store in stores:
        total = len(store.manifest().records())
        with track(total, f"Verifying {store.spec.directory()}", "shards") as progress:
            report = verify(store, not quick, lambda done, all_of_them: progress.advance())
        problems += [str(problem) for problem in report.problems]
        lines.append(
            {
                "store": str(store.spec.directory()),
                "shards": report.num_shards,
                "rows": report.num_rows,
                "invalid": report.num_invalid,
                "bytes_read": report.num_bytes,
                "problems": len(report.problems),
            }
        )
    if as_json:
        print_json({"stores": lines, "problems": problems})
    elif lines:
        print_table(lines)
    else:
        print(f"{base}: no stores to verify")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise typer.Exit(1)


@recipes_app.callback()
def recipes_list(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes: parameters and FLOPs of what each trains, the paper's figures beside."""
    if context.invoked_subcommand is not None:
        return
    from pipelines.recipe import catalogue

    found = catalogue.entries()
    if as_json:
        print_json([catalogue.plain(each) for each in found])
    else:
        print_table(catalogue.table(found))


@recipes_app.command("show")
def recipes_show(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe; [b]eupe recipes[/b] lists them.")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print every field of a recipe, its value, and where the value comes from.

    [b]paper[/b]: stated there. [b]paper: X[/b]: stated there as X, and changed here.
    [b]assumed[/b]: ours, since the paper does not say. [b]execution[/b]: where and how fast the
    run works, never what it learns.
    """
    from pipelines.recipe import paper, recipes

    settings = paper.settings(recipes.get(recipe, overrides or []))
    if as_json:
        print_json([setting._asdict() for setting in settings])
        return
    print_table(
        [
            {"field": each.path, "value": json.dumps(each.value), "origin": each.origin}
            for each in settings
        ]
    )


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
    from pipelines.evaluation import evaluate
    from pipelines.stage_command import describe
    from pipelines.training import launch

    done = launch.train(asked, trained, make_evaluate=evaluate.hook)
    if as_json:
        print_json(describe(done))
    else:
        print_table([describe(done)])


@app.command("evaluate")
def evaluate(
    recipe: RecipeName = "demo",
    stage: Annotated[
        str | None, typer.Option(help="Stage whose student is judged. Left out: the last.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Judge the newest checkpoint of a stage on the held-out images.

    kNN by a label, and cosine to the cached teachers, beside the student before training and the
    best prediction that ignores the image. Written to evaluation.json in the run directory.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])
    judged = asked.stage(stage) if stage else asked.stages[-1]
    from pipelines.evaluation import evaluate as evaluation

    found = evaluation.evaluate(asked, judged, evaluation.device(asked))
    path = evaluation.write(asked.directory, found)
    if as_json:
        print_json(asdict(found))
    else:
        print(path.read_text(), end="")


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
        print(asked.directory / reports.SUMMARY_FILE, asked.directory / reports.REPORT_FILE)


@app.command("run")
def run(recipe: RecipeName = "demo", overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a whole recipe: teacher caches, every stage, evaluation, report.

    As the Prefect flow [b]distill[/b], on the server that PREFECT_API_URL names and the Ray
    cluster that RAY_ADDRESS names; without them on temporary ones of this machine. Steps whose
    output is there already are not repeated.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])  # refused before anything is started
    prefect_settings(recipes.home())
    from flows import summary
    from flows.distill import distill

    found = distill(recipe, overrides or [])
    if as_json:
        print_json(found)
        return
    print_table(summary.rows(found))
    print(summary.steps(found))
    print(f"{asked.directory / 'summary.json'}\n{asked.directory / 'report.html'}")


def prefect_settings(home: Path) -> None:
    """Settle what Prefect reads at import: a home of its own, patience, and no log beside ours."""
    if "PREFECT_API_URL" not in os.environ:
        private = home / "runs" / "prefect"
        private.mkdir(parents=True, exist_ok=True)  # Prefect makes the last folder only
        os.environ["PREFECT_HOME"] = str(private)
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",  # two busy cores take 30
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",  # errors are shown once, by us
    }.items():
        os.environ.setdefault(name, value)


def root_of(root: Path | None) -> Path:
    """Return the cache root the user named, or that of the demo."""
    from cache.format import layout

    if root is not None:
        return layout.cache_root(root).resolve()
    from pipelines.recipe import recipes

    return layout.cache_root(recipes.get("demo").cache_root)


def clocked(words: Sequence[str]) -> dict[str, float]:
    """Read STEP=SECONDS words.

    Raises:
        ValueError: another form.
    """
    found = {}
    for word in words:
        step, equals, took = word.rpartition("=")
        if not equals or not took.replace(".", "", 1).isdecimal():
            raise ValueError(f"--seconds {word}: wants STEP=SECONDS, for instance stage2=81.5")
        found[step] = float(took)
    return found


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print plain rows, all with the same columns, as a table on stdout."""
    table = Table()
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    """Run the command line: 0 done, 2 bad input (one sentence), 1 anything else (traceback)."""
    with one_sentence():
        app()


if __name__ == "__main__":
    main()
