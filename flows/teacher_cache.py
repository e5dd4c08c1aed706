"""Flow `teacher-cache`: build or extend the caches of a recipe's teachers.

    images -> moments on a sample -> missing shards, committed as they come -> verify

What is done is asked of the stores at every start (never of Prefect's result cache), so running
the flow again computes what is missing, and nothing else.
"""

import sys
from collections.abc import Callable
from functools import partial

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from cache.listing import store_lines
from cache.store import Store
from cache.verify import Report
from flows import artifacts
from flows.parameters import Overrides, RecipeName
from pipelines.caching import beforehand, indexing, precompute
from pipelines.caching.indexing import Indexed
from pipelines.caching.precompute import Built, Extracted, Steps
from pipelines.machines.pool import Workers
from pipelines.recipe import recipes
from pipelines.recipe.stores import CacheJob, job_groups


@task(name="index samples", task_run_name="index {job.dataset.name}", cache_policy=NO_CACHE)
def index_samples(job: CacheJob, pool: Workers) -> Indexed:
    """Add the images that the dataset's sample table does not have yet."""
    with artifacts.progress("index-samples"):
        return indexing.index_samples(job, pool)


@task(name="resolve stores", task_run_name="resolve {job}", cache_policy=NO_CACHE)
def resolve_stores(job: CacheJob, pool: Workers) -> list[Store]:
    """Open the job's stores; create those that are not there with measured moments."""
    with artifacts.progress("measure-moments"):
        return precompute.resolve_stores(job, pool)


@task(name="extract missing", task_run_name="extract {job}", cache_policy=NO_CACHE)
def extract_missing(job: CacheJob, stores: list[Store], pool: Workers) -> Extracted:
    """Compute and commit the shards that are missing."""
    with artifacts.progress("extract-missing"):
        return precompute.extract_missing(job, stores, pool)


@task(name="verify stores", cache_policy=NO_CACHE)
def verify_stores(stores: list[Store], deep: bool) -> list[Report]:
    """Check the stores against their manifests."""
    with artifacts.progress("verify-stores"):
        return precompute.verify_stores(stores, deep)


@flow(name="teacher-cache", flow_run_name=artifacts.run_name("teacher-cache", "recipe"))
def teacher_cache(
    recipe: RecipeName = "demo",
    overrides: Overrides = [],  # noqa: B006 (Prefect shows it as the default; nobody changes it)
    deep_verify: bool = False,
) -> Built:
    """Build or extend the teacher caches of a recipe; the proxy's too, once stage 1 is done.

    Args:
        recipe: name of a recipe, or a YAML file that changes one.
        overrides: fields to change, path.to.field=value; a stage, teacher or train set is
            addressed by its name.
        deep_verify: also read every byte again and compare checksums.

    Raises:
        BadInput: bad input: recipe, override, images or weights.
        StoreError: a store that cannot be used or written.
    """
    asked = recipes.get(recipe, overrides)
    beforehand.check(asked)
    beforehand.check_cluster(asked)
    look_over = partial(beforehand.check_labels, asked)
    return build(job_groups(asked), f"Stores of recipe {recipe}", deep_verify, look_over)


def build(
    groups: list[list[CacheJob]],
    title: str,
    deep_verify: bool = False,
    look_over: Callable[[], None] | None = None,
) -> Built:
    """Build or extend the stores of some jobs, inside a flow: each step is a task.

    Args:
        groups: as for `precompute.build`.
        title: of the table that the flow run shows.
        deep_verify: also read every byte again and compare checksums.
        look_over: as for `precompute.build`.
    """
    tasks = Steps(index_samples, resolve_stores, extract_missing, verify_stores)
    built = precompute.build(groups, deep_verify, tasks, look_over)
    artifacts.table("teacher-cache-stores", store_lines(groups[0][0].root, built.stores), title)
    print(built, file=sys.stderr)
    return built
