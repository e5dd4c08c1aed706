"""Measuring: moments of a teacher's tokens, and some of them, on a fixed sample of a dataset."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np

from cache.codec.encoded import Moments as StoredMoments
from cache.codec.known import kind
from cache.samples import Samples
from eupe.errors import BadInput
from eupe.moments import Moments, merge
from eupe.spec import StoreSpec
from pipelines.caching.extractor import Measured, Output
from pipelines.images.walks import base
from pipelines.machines.pool import Workers
from pipelines.machines.progress import track
from pipelines.recipe.stores import CacheJob

_KINDS = ("summary", "patches")
SAMPLE_TOKENS = 8192
"""Tokens that lossy codecs are tried on: their mean cosine is then known to about 0.0005."""
SAMPLE_ROWS = 64
"""Pictures that codecs of whole rows are fitted to: with 300, they gain 0.03 dB at 1 bit."""


class Sample(NamedTuple):
    """What was measured of one output.

    Attributes:
        moments: "summary" and "patches" -> (count, mean [D], scatter [D, D]).
        tokens: float32 [k, D], patch tokens spread over the sample; none for plain codecs.
        rows: float32 [r, N, D], patches of some samples; None where no codec is fitted to them.
    """

    moments: dict[str, StoredMoments]
    tokens: np.ndarray
    rows: np.ndarray | None = None


def measure(
    job: CacheJob, specs: Sequence[StoreSpec], compute_batch: int, pool: Workers
) -> dict[Output, Sample]:
    """Measure what new stores are created with: moments of both token kinds, in view 0.

    The sample is spread evenly over the dataset and its parts are merged in a fixed order, so the
    figures depend on the dataset alone, not on which actor did what.

    Args:
        job: whose dataset, views and teachers.
        specs: the stores to measure for.
        compute_batch: pictures a forward pass.
        pool: of extractors.

    Returns:
        (teacher, resolution) -> moments and tokens.

    Raises:
        BadInput: a teacher that gives no finite features.
    """
    samples = Samples.open(job.root, job.dataset.name)
    count = min(job.extraction.moments_samples, len(samples))
    chosen = samples.at(np.arange(count) * len(samples) // count)
    outputs = [(spec.teacher.name, spec.resolution) for spec in specs]
    chunks = [chosen.slice(start, compute_batch) for start in range(0, count, compute_batch)]
    measured: dict[int, dict[Output, Measured]] = {}
    lossy = any(kind(spec.codec.name).lossy for spec in specs)
    of_rows = any(kind(spec.codec.name).of_rows for spec in specs)
    per_chunk = -(-SAMPLE_TOKENS // len(chunks)) if lossy else 0
    rows_per_chunk = -(-SAMPLE_ROWS // len(chunks)) if of_rows else 0
    where = str(base(job.dataset.source))
    wanted = compute_batch, per_chunk, rows_per_chunk
    tasks = [(where, job.views, chunk, outputs, *wanted) for chunk in chunks]
    with track(count, f"Measuring moments of {job}") as progress:
        for results in pool.run("measure", tasks):
            measured.update(results)
            progress.advance(sum(len(chunks[number]) for number, _ in results))
    in_order = [measured[number] for number in range(len(chunks))]
    return {
        output: Sample(
            {
                kind: _merged([getattr(part[output], kind) for part in in_order], output, count)
                for kind in _KINDS
            },
            np.concatenate([part[output].tokens for part in in_order]),
            _joined([part[output].rows for part in in_order]),
        )
        for output in outputs
    }


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    found = [part for part in parts if part is not None]
    return np.concatenate(found) if found else None


def _merged(parts: Sequence[Moments | None], output: Output, count: int) -> StoredMoments:
    found = [part for part in parts if part is not None]
    if not found:
        raise BadInput(
            f"teacher {output[0]} at {output[1]} px gave no finite features for any of {count} "
            "samples; check its weights, dtype and pixel_mean/pixel_std"
        )
    total = reduce(merge, found)
    return total.count, total.mean, total.scatter
