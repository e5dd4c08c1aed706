"""The index of an image source: its samples, each image's digest and header read once.

A source is a folder, WebDataset tars or Parquet files; the three forms of the same images give the
same sample ids. A sample is addressed by (`uri`, `offset`, `bytes`): for files and tars the span
of bytes in the file `uri`; for Parquet see `pipelines.images.parquet`. All of it is relative to the
source (`walks.base`), which may lie elsewhere tomorrow.

A source is walked piece by piece. A piece is recognised by its size and stamp: whoever has looked
at it needs not open it again.
"""

import hashlib
import json
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import PurePosixPath

import pyarrow as pa

from cache.format.sample_table import SOURCES
from eupe.errors import BadInput
from pipelines.images import folders, parquet
from pipelines.images.aside import Aside
from pipelines.images.classes import Classes
from pipelines.images.looker import WALKS, Failure, Looked, Looker, Part, inspect
from pipelines.images.walks import Piece
from pipelines.machines.pool import Workers
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig

PART_IMAGES = 100_000
"""Images that are looked at before what was found is handed on: what a kill can cost."""
TASK_BYTES = 64 << 20
"""Of pieces that are looked at together, about."""
ALONE_SECONDS = 10.0
"""In which one process looks at some 100,000 small images: others, which cost as long to start,
are asked for help only with what is left then."""
LATER_FIELDS = ("key", "image_member", "classes")
"""Of SourceConfig, added after format 1: at their defaults they change no stamp."""


def check_there(config: SourceConfig) -> None:
    """Refuse a source that is not there; no folder is listed for it.

    Raises:
        BadInput: naming it.
    """
    folders.check_there(config, WALKS[config.kind].suffix)


def check_readable(config: SourceConfig) -> None:
    """Read one picture of a source, the first that is found, whichever are asked for (`where`).

    Raises:
        BadInput: there is none, or why it cannot be read.
    """
    suffix, aside = WALKS[config.kind].suffix, Aside()
    if suffix is None:
        piece = folders.first_piece(config, aside)
    else:
        piece = folders.file_pieces(config, suffix, aside)[0]
    anything = config.model_copy(update={"where": {}})
    candidates = WALKS[config.kind].candidates(anything, piece, aside)
    first = next(candidates, None)
    found = "no picture in it" if first is None else inspect(first)
    if isinstance(found, str):
        raise BadInput(f"{config.path}: {piece.uri if first is None else first.uri}: {found}")


def pieces(config: SourceConfig, aside: Aside | None = None) -> list[Piece]:
    """List the pieces of a source, opening none.

    A stamp here is of the contents and of how they are read: asked for other labels, say, the
    same file is another piece.

    Args:
        config: where the images lie, and how they are named.
        aside: is told of what is no piece.

    Raises:
        BadInput: nothing is there.
    """
    suffix, aside = WALKS[config.kind].suffix, aside or Aside()
    if suffix is None:
        found = folders.pieces(config, aside)
    else:
        found = folders.file_pieces(config, suffix, aside)
    rule = _rule(config)
    return [
        piece._replace(stamp=hashlib.sha256(f"{rule}\n{piece.stamp}".encode()).hexdigest()[:32])
        for piece in found
    ]


def look(
    config: SourceConfig,
    wanted: Sequence[Piece],
    threads: int = 4,
    num_others: int = 0,
    aside: Aside | None = None,
    workers: Workers | None = None,
) -> Generator[Part, None, None]:
    """List the samples of some pieces, reading every image's bytes once for digest and header.

    Args:
        config: where the images lie, and which of them are wanted (`where`).
        wanted: of `pieces`.
        threads: that read images which are files of their own.
        num_others: pieces of the source that were looked at before.
        aside: is told of what is no image.
        workers: `Looker`s that help with what takes longer than ALONE_SECONDS.

    Yields:
        whole pieces, at least PART_IMAGES images together but for the last; with the same pieces
        the same samples in all, however many workers found them.

    Raises:
        BadInput: nothing in it is an image or is wanted, a file is not of its kind or cannot be
            read, or a column is missing.
    """
    walk, aside = WALKS[config.kind], aside or Aside()
    counts = [] if config.where else [walk.num_images(piece) for piece in wanted]
    total = None if config.where or None in counts else sum(filter(None, counts))
    waiting: list[Part] = []
    classes, num_seen, num_waiting = Classes(), 0, 0
    with track(total, f"Indexing {config.path}") as progress:
        for part, num_images, left_aside in _looked(Looker(config, threads), wanted, workers):
            aside.merge(left_aside)
            classes.add(part.records["sample_id"])
            progress.advance(num_images)
            waiting.append(part)
            del part  # which would outlive what is handed on
            num_waiting += num_images
            if num_waiting >= PART_IMAGES:
                yield joined(waiting)
                num_seen, num_waiting, waiting = num_seen + num_waiting, 0, []
    if not num_seen + num_waiting + num_others:
        kept = f" with {dict(config.where)}" if config.where else ""
        others = "".join(f"; {line}" for line in aside.lines())
        raise BadInput(f"{config.path}: no image{kept} in this {config.kind} source{others}")
    if not num_others:
        classes.doubt(config, aside)
    if waiting:
        yield joined(waiting)


def joined(parts: Sequence[Part]) -> Part:
    """Return parts as one."""
    tables = [part.records for part in parts], [part.sources for part in parts]
    return Part(*map(pa.concat_tables, tables))


def _looked(looker: Looker, wanted: Sequence[Piece], workers: Workers | None) -> Iterator[Looked]:
    """Look at pieces here, and once that has taken a while, at the others abreast."""
    started, tasks = time.monotonic(), list(_tasks(wanted))
    for number, task in enumerate(tasks):
        long = time.monotonic() - started >= ALONE_SECONDS
        if workers is not None and long and len(tasks) - number > 1:
            rest = [(each,) for each in tasks[number:]]
            for results in workers.run("look", rest):
                yield from (found for _, found in results)
            return
        yield looker.look(task)


def _tasks(wanted: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Group pieces, in their order, until they are worth a call."""
    task, num_bytes = list[Piece](), 0
    for piece in wanted:
        task.append(piece)
        num_bytes += piece.bytes
        if num_bytes >= TASK_BYTES:
            yield task
            task, num_bytes = [], 0
    if task:
        yield task


def whole(config: SourceConfig) -> Part:
    """List the samples of a source at once.

    Raises:
        BadInput: as `look`.
    """
    aside = Aside()
    return joined(list(look(config, pieces(config, aside), aside=aside)))


def failures(sources: pa.Table) -> list[Failure]:
    """Return what was left out of pieces (SOURCES), by sample id."""
    texts = filter(None, sources["failures"].to_pylist())
    return sorted((*failure,) for text in texts for failure in json.loads(text))


def with_failures(sources: pa.Table, more: Sequence[Failure]) -> pa.Table:
    """Return pieces (SOURCES) with more that was left out of them."""
    if not more:
        return sources
    rows = {row["uri"]: row for row in sources.to_pylist()}
    for failure in more:
        uri = failure[1]
        file = parquet.file_name(uri) if parquet.is_row(uri) else uri
        folder = f"{PurePosixPath(file).parent}/"
        row = rows[file if file in rows else folder]
        there = json.loads(row["failures"]) if row["failures"] else []
        row["failures"] = json.dumps([*there, failure], ensure_ascii=False)
    return pa.Table.from_pylist(list(rows.values()), SOURCES)


def _rule(config: SourceConfig) -> str:
    """Return how a source is read, as text; what was not asked in earlier versions is left out."""
    later = {name for name in LATER_FIELDS if getattr(config, name) == _default(name)}
    return config.model_dump_json(exclude={"path", *later})


def _default(name: str) -> object:
    return SourceConfig.model_fields[name].default
