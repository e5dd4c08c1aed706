"""Encoding: anybody's pictures through a model, to a table of embeddings and an array of patches.

The table (Parquet) has a row a picture: sample_id, its labels, embedding, x and y (the first two
principal components of the embeddings), neighbours (the nearest other pictures by cosine, as row
numbers, with their cosine distances). Its metadata says what made it.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from cache.files import atomic
from cache.format import sample_table
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.moments import Moments
from eupe.teachers import Teacher, load_teacher
from eupe.views import resize
from pipelines.images import index, walks
from pipelines.images.aside import Aside
from pipelines.images.reader import ImageReader
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig
from pipelines.records import made_by
from pipelines.release.models import Model
from pipelines.release.patches import PatchesWriter

NUM_NEIGHBOURS = 10
SIMILARITIES = 1 << 26
"""Held at once, float32: a quarter of a gibibyte."""
METADATA = b"eupe"
"""Key of the table's metadata."""


class Encoded(NamedTuple):
    """What was written.

    Attributes:
        file: the table.
        num_pictures: its rows.
        width: of an embedding.
        left_out: sample_id and reason of what is no usable picture.
        aside: lines about files that were not looked at.
        patches: the array's folder; None if none was asked for.
    """

    file: Path
    num_pictures: int
    width: int
    left_out: tuple[tuple[str, str], ...]
    aside: tuple[str, ...]
    patches: Path | None


class Shown(NamedTuple):
    """A batch of pictures that were read and shown to a model, usable ones only."""

    samples: pl.DataFrame
    features: Features


def encode(
    source: SourceConfig,
    model: Model,
    out: Path,
    patches: Path | None = None,
    *,
    batch: int = 32,
    device: str = "cpu",
    threads: int = 4,
) -> Encoded:
    """Encode every picture of a source; the table appears whole, at the end.

    Args:
        source: of the pictures.
        model: to show them to.
        out: the table's file.
        patches: folder for the patches, new or empty; None: they are not kept.
        batch: pictures a forward pass, always as many: an embedding depends on no other picture.
        device: to compute on.
        threads: that decode pictures.

    Raises:
        BadInput: no picture, weights that cannot be had, or something is at `patches`.
        StoreError: the disk refuses.
    """
    teacher = load_teacher("model", model.encoder, model.weights, device=device)
    teacher.encoder.check_resolution(model.resolution)
    kept, parts = list[pl.DataFrame](), list[npt.NDArray[np.float32]]()
    left_out, aside = list[tuple[str, str]](), Aside()
    rows, columns = teacher.encoder.grid(model.resolution)
    shape = (rows, columns, teacher.encoder.patch_dim)
    writing = PatchesWriter(patches, shape, batch, _said(model)) if patches else nullcontext()
    with writing as array:
        for part in shown(source, model, teacher, batch, threads, left_out, aside):
            kept.append(part.samples)
            parts.append(part.features.summary.cpu().numpy())
            if array is not None:
                array.append(part.features.patches.cpu().numpy())
    if not parts:
        raise BadInput(f"{source.path}: not one usable picture of {len(left_out)}; {left_out[:1]}")
    embeddings = np.concatenate(parts)
    samples = pl.concat(kept)
    table = _table(samples, embeddings, device)
    said = {**_said(model), "patches": None if patches is None else patches.name}
    table = table.replace_schema_metadata({METADATA: json.dumps(said).encode()})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    atomic.write(out, [memoryview(buffer.getvalue())], scratch=out.parent)
    return Encoded(
        out, len(samples), embeddings.shape[1], tuple(left_out), tuple(aside.lines()), patches
    )


def device(asked: str | None) -> str:
    """Return the device that is asked for; None: the GPU if there is one.

    Raises:
        BadInput: this machine has no such device.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {asked}: {str(error).splitlines()[0]}") from error
    return asked


def _said(model: Model) -> dict[str, object]:
    """Return what made a table, as plain data."""
    return {**model.model_dump(mode="json"), "made_by": made_by.this_code()}


def shown(
    source: SourceConfig,
    model: Model,
    teacher: Teacher,
    batch: int,
    threads: int,
    left_out: list[tuple[str, str]],
    aside: Aside,
) -> Iterator[Shown]:
    """Show a source's pictures to a model, batch after batch.

    Args:
        source: of the pictures.
        model: whose views and resolution they are shown in.
        teacher: its network.
        batch: pictures a forward pass, always as many.
        threads: that decode pictures.
        left_out: is given sample_id and reason of what is no usable picture.
        aside: is told of files that are not looked at.

    Raises:
        BadInput: no picture is there.
    """
    reader = ImageReader(walks.base(source))
    with ThreadPoolExecutor(threads) as pool:
        for part in index.look(source, index.pieces(source, aside), threads, aside=aside):
            left_out += [(name, why) for name, _, _, why in index.failures(part.sources)]
            samples = sample_table.frame(part.records)
            with track(len(samples), f"Encoding {source.path}") as progress:
                for start in range(0, len(samples), batch):
                    some = samples[start : start + batch]
                    numbers = np.zeros(len(some), np.int64)
                    drawn, digests = reader.canvases(some, model.views, numbers, pool)
                    usable = np.array([digest is not None for digest in digests])
                    left_out += [
                        (name, "the image cannot be decoded")
                        for name in some.filter(~pl.Series(usable))["sample_id"]
                    ]
                    if usable.any():
                        pixels = list(
                            pool.map(lambda c: resize(c, model.resolution), drawn[usable])
                        )
                        features = teacher.features(np.stack(pixels), batch)
                        yield Shown(some.filter(pl.Series(usable)), features)
                    progress.advance(len(some))


def _table(samples: pl.DataFrame, embeddings: npt.NDArray[np.float32], device: str) -> pa.Table:
    """Return the table of samples and their embeddings [n, D]."""
    if not np.isfinite(embeddings).all():
        bad = samples["sample_id"][int(np.flatnonzero(~np.isfinite(embeddings).all(1))[0])]
        raise BadInput(f"the model gives values that are not finite, first of {bad!r}")
    places = principal(embeddings)
    ids, distances = neighbours(embeddings, NUM_NEIGHBOURS, device)
    width, near = embeddings.shape[1], ids.shape[1]
    columns: dict[str, pa.Array] = {"sample_id": samples["sample_id"].to_arrow()}
    columns |= {name: values for name, values in _labels(samples).items() if name not in RESERVED}
    columns |= {
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width),
        "x": pa.array(places[:, 0]),
        "y": pa.array(places[:, 1]),
        "neighbours": pa.StructArray.from_arrays(
            [_lists(ids, near), _lists(distances, near)], ["ids", "distances"]
        ),
    }
    return pa.table(columns)


RESERVED = ("sample_id", "embedding", "x", "y", "neighbours")
"""Columns of the table that no label may replace."""


def _lists(values: npt.NDArray[np.generic], width: int) -> pa.Array:
    """Return rows [n, width] as lists."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))


def _labels(samples: pl.DataFrame) -> dict[str, pa.Array]:
    """Return label -> its value for each sample, null where it has none."""
    texts = samples["labels"]
    names = sorted({name for text in texts.unique().to_list() for name in json.loads(text)})
    if not names:
        return {}
    dtype = pl.Struct(dict.fromkeys(names, pl.String))
    found = texts.str.json_decode(dtype).struct.unnest()
    return {name: found[name].to_arrow() for name in names}


def principal(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the first two principal components of vectors [n, D], [n, 2]; zeros where none are.

    Each is signed so that its largest loading is positive: a map does not flip between runs.
    """
    moments = Moments.of(vectors)
    _, basis = np.linalg.eigh(moments.scatter)
    axes = basis[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    found = (vectors - moments.mean) @ axes
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1]))).astype(np.float32)


def neighbours(
    vectors: npt.NDArray[np.float32], count: int, device: str = "cpu"
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Return the nearest others of each of vectors [n, D] by cosine, nearest first.

    Args:
        vectors: [n, D].
        count: neighbours; fewer where there are not as many others.
        device: to compute on.

    Returns:
        row numbers [n, count] and cosine distances (1 - cosine) [n, count].
    """
    units = F.normalize(torch.from_numpy(vectors).to(device), dim=1)
    count = min(count, len(units) - 1)
    ids = np.empty((len(units), count), np.int64)
    distances = np.empty((len(units), count), np.float32)
    step = max(1, SIMILARITIES // len(units))
    with track(len(units), "Finding neighbours") as progress:
        for start in range(0, len(units), step):
            some = units[start : start + step]
            cosines = some @ units.T
            own = torch.arange(len(some), device=units.device)
            cosines[own, own + start] = -torch.inf
            best = cosines.topk(count, dim=1)
            ids[start : start + step] = best.indices.cpu().numpy()
            distances[start : start + step] = (1 - best.values).cpu().numpy()
            progress.advance(len(some))
    return ids, distances
