"""How well `eupe plan --measure` foretells a build: planned and taken seconds, side by side.

    python -m benchmarks.plan [RECIPE] [--rounds 5] [--set FIELD=VALUE]

Each round plans the experts' caches of a recipe from a short build, then builds them, both from
nothing and with the recipe's own actors. On a machine with other work the two see different loads.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks import tables
from pipelines.caching import calibrate, indexing, plan, precompute
from pipelines.caching.rates import Rates
from pipelines.recipe import recipes
from pipelines.recipe.stores import job_groups

COLUMNS = {"round": ",", "planned_seconds": ".1f", "seconds": ".1f", "ratio": ".2f"}


def measure(name: str, overrides: Sequence[str], folder: Path) -> tables.Row:
    """Plan and build once, in an empty folder."""
    moved = [f"cache_root={folder / 'cache'}", f"run_directory={folder / 'run'}"]
    recipe = recipes.get(name, [*overrides, *moved])
    groups = job_groups(recipe)
    for job in precompute.datasets(groups):
        indexing.index_samples(job)
    planned = calibrate.build_seconds(plan.of_stores(recipe, groups, Rates()).passes.values())
    took = precompute.build(groups).seconds
    return {"planned_seconds": planned, "seconds": took, "ratio": planned / took}


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table and the median of the ratios."""
    parser = tables.parser("plan", __doc__)
    parser.add_argument("recipe", nargs="?", default="demo", help="its name, or a YAML file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="FIELD=VALUE of the recipe")
    said: argparse.Namespace = parser.parse_args(words)
    rows = list[tables.Row]()
    for number in range(said.rounds):
        with tempfile.TemporaryDirectory(prefix="eupe-plan-") as folder:
            rows.append({"round": number + 1, **measure(said.recipe, said.set, Path(folder))})
    out = tables.console()
    tables.show(rows, COLUMNS, f"a build of {said.recipe}, planned and done", out, said.json)
    print(f"median of the ratios {median(float(str(row['ratio'])) for row in rows):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
