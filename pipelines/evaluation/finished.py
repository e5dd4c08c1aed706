"""Whether a run has anything left to do: told in seconds, without Ray, Prefect or a network."""

from cache.errors import StoreError
from pipelines.caching import precompute
from pipelines.caching.indexing import index_samples
from pipelines.evaluation import report
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import Opened, cache_jobs
from pipelines.training import outputs


def summary(recipe: Recipe) -> dict[str, object] | None:
    """Return the summary of a run that has nothing left to do; None if something is.

    Pictures that are new are indexed, as a run does it first.

    Raises:
        BadInput: a source or weights that cannot be read.
        Corrupt: a store is not what its manifest says.
    """
    outputs.bring(recipe.directory)
    if not (recipe.directory / report.SUMMARY_FILE).is_file():
        return None
    opened = Opened()
    try:
        for job in {job.dataset.name: job for job in cache_jobs(recipe)}.values():
            if index_samples(job).num_new:
                return None
        standing = outputs.standing(recipe)
        if any(each.old or not each.output.judged() for each in standing):
            return None
        found = report.current(recipe, opened)
        stores = report.stores(recipe, opened)
    except StoreError:  # not built, or half: the run says so, and builds it
        return None
    if found is not None:
        precompute.verify_stores(stores, deep=False)
    return found
