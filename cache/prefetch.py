"""Batches of rows read ahead by one thread into a ring of buffers that are used again."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache.encoded import Escapes
from cache.reader import Reader
from cache.samples import Rows


class Batch(NamedTuple):
    """What was read of one batch.

    rows: int64 [n].
    views: int64 [n].
    patches: [n, *row_shape] in storage dtype, in a buffer that is filled again as soon as
        the next batch is asked for: copy or decode it before that.
    summaries: float32 [n, D].
    valid: bool [n].
    escapes: of the batch; empty for plain codecs.
    """

    rows: Rows
    views: Rows
    patches: npt.NDArray[np.generic]
    summaries: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    escapes: Escapes


@contextmanager
def prefetch(
    reader: Reader,
    addresses: Iterable[tuple[Rows, Rows]],
    depth: int = 2,
    buffers: list[npt.NDArray[np.generic]] | None = None,
) -> Iterator[Iterator[Batch]]:
    """Keep `depth` batches ready while the caller works on one.

    Args:
        reader: of the store.
        addresses: rows and views of each batch, int64 [n] each; drawn as batches are wanted, in
            the caller's thread.
        depth: batches read ahead.
        buffers: `depth + 1` buffers [max n, *row_shape], pinned ones perhaps; made if None, of the
            first batch's size.

    Yields:
        An iterator of batches, in order. An error of a batch is raised when that batch is asked
        for; leaving the context stops the thread.

    Raises:
        ValueError: no depth, too few buffers, or a batch larger than a buffer.
    """
    if depth < 1 or (buffers is not None and len(buffers) < depth + 1):
        raise ValueError(f"depth = {depth}: wants at least 1, and depth + 1 buffers if any")
    with ThreadPoolExecutor(1, "cache-prefetch") as thread:
        waiting: list[Future[Batch]] = []

        def batches() -> Iterator[Batch]:
            ring = buffers
            source = iter(addresses)
            for number, (rows, views) in enumerate(source):
                if ring is None:
                    shape = (len(rows), *reader.row_shape)
                    ring = [np.empty(shape, reader.dtype) for _ in range(depth + 1)]
                buffer = ring[number % (depth + 1)]
                if len(rows) > len(buffer):
                    raise ValueError(f"batch of {len(rows)} rows: the buffers hold {len(buffer)}")
                waiting.append(thread.submit(_read, reader, rows, views, buffer[: len(rows)]))
                if len(waiting) > depth:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()

        try:
            yield batches()
        finally:
            for future in waiting:
                future.cancel()


def _read(reader: Reader, rows: Rows, views: Rows, buffer: npt.NDArray[np.generic]) -> Batch:
    return Batch(
        rows,
        views,
        reader.take(rows, views, buffer),
        reader.summaries(rows, views),
        reader.valid(rows, views),
        reader.escapes(rows, views),
    )
