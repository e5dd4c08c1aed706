"""Measuring: moments of a teacher's tokens on a fixed sample of a dataset."""

from collections.abc import Sequence
from functools import reduce

from cache.codec import Moments as StoredMoments
from cache.samples import Samples
from eupe.moments import Moments, merge
from eupe.spec import StoreSpec
from pipelines.actors import Measured, Output
from pipelines.jobs import CacheJob
from pipelines.pool import Pool
from pipelines.progress import track

_KINDS = ("summary", "patches")


def measure(
    job: CacheJob, specs: Sequence[StoreSpec], compute_batch: int, pool: Pool
) -> dict[Output, dict[str, StoredMoments]]:
    """Measure what new stores are created with: moments of both token kinds, in view 0.

    The sample is spread evenly over the dataset and its parts are merged in a fixed order, so the
    figures depend on the dataset alone, not on which actor did what.

    Args:
        job: whose dataset, views and teachers.
        specs: the stores to measure for.
        compute_batch: pictures a forward pass.
        pool: of extractors.

    Returns:
        (teacher, resolution) -> "summary" and "patches" -> (count, mean [D], scatter [D, D]).

    Raises:
        ValueError: a teacher that gives no finite features.
    """
    samples = Samples.open(job.root, job.dataset.name)
    count = min(job.extraction.moments_samples, len(samples))
    chosen = samples.table[[place * len(samples) // count for place in range(count)]]
    outputs = [(spec.teacher.name, spec.resolution) for spec in specs]
    chunks = [chosen.slice(start, compute_batch) for start in range(0, count, compute_batch)]
    measured: dict[int, dict[Output, Measured]] = {}
    tasks = [(job.views, chunk, outputs, compute_batch) for chunk in chunks]
    with track(count, f"Measuring moments of {job}") as progress:
        for number, result in pool.run("measure", tasks):
            measured[number] = result
            progress.advance(len(chunks[number]))
    in_order = [measured[number] for number in range(len(chunks))]
    return {
        output: {
            kind: _merged([getattr(part[output], kind) for part in in_order], output, count)
            for kind in _KINDS
        }
        for output in outputs
    }


def _merged(parts: Sequence[Moments | None], output: Output, count: int) -> StoredMoments:
    found = [part for part in parts if part is not None]
    if not found:
        raise ValueError(
            f"teacher {output[0]} at {output[1]} px gave no finite features for any of {count} "
            "samples; check its weights, dtype and pixel_mean/pixel_std"
        )
    total = reduce(merge, found)
    return total.count, total.mean, total.scatter
