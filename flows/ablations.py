"""Flow `ablations`: a sweep of runs from one set of caches.

    index -> caches -> stages -> evaluations -> results.parquet, results.html

Each node of the sweep's graph is a task. Whether it is there is asked of its address, never of
Prefect's result cache, and several flow runs may work the same sweep at once.
"""

import sys
from pathlib import Path
from typing import Annotated

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from flows import artifacts
from flows.parameters import Overrides
from pipelines.recipe import recipes
from pipelines.sweeps import describe, page, results
from pipelines.sweeps import work as sweeps
from pipelines.sweeps.file import read, runs
from pipelines.sweeps.graph import Node

TINY = "recipes/ablations/table2_tiny.yaml"
SweepFile = Annotated[
    str, Field(description="a sweep file, YAML; relative to EUPE_HOME", examples=[TINY])
]


@task(name="compute", task_run_name="{node}", cache_policy=NO_CACHE)
def compute(node: Node) -> bool:
    """Compute one node of a sweep, if no other process does; return False if one has."""
    with artifacts.progress("ablations"):
        return sweeps.compute(node)


@flow(name="ablations", flow_run_name=artifacts.run_name("ablations", "sweep"))
def ablations(
    sweep: SweepFile = TINY,
    overrides: Overrides = [],  # noqa: B006 (Prefect shows it as the default; nobody changes it)
) -> list[dict[str, str]]:
    """Work a sweep: caches, stages and evaluations of all its runs, equal ones once.

    Args:
        sweep: a sweep file.
        overrides: fields to change in every run, path.to.field=value.

    Returns:
        each setting beside the base, by every probe.

    Raises:
        BadInput: bad input: sweep, recipe, override, images or weights.
        StoreError: a store that cannot be used or written.
        RuntimeError: a node failed; what does not need it was computed.
    """
    done = sweeps.work(sweeps.prepare(runs(read(recipes.home() / sweep), overrides)), compute)
    said = describe.ended(done)
    print("\n".join([str(results.write(done.graph)), *said]), file=sys.stderr)
    found = list[dict[str, str]]()
    if results.has_base(done.graph):
        compared = results.compare(done.graph)
        print(page.write(done.graph, compared), file=sys.stderr)
        found = results.rows(compared, results.rivals(done.graph))
    artifacts.table("ablations-results", found, "\n\n".join([Path(sweep).stem, *said]))
    if done.failed:
        raise RuntimeError("; ".join(f"{node}: {why}" for node, why in done.failed.items()))
    return found
