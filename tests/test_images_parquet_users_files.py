"""Parquet files as Hugging Face writes them: classes, nested columns, nulls, large row groups."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.small_caches import job, reader

from cache.format.sample_table import frame
from eupe.errors import BadInput
from pipelines.caching import indexing
from pipelines.images import index
from pipelines.images.aside import Aside
from pipelines.images.parquet import RowGroups
from pipelines.recipe.config import SourceConfig

NAMES = ["cat", "dog", "owl"]


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def source(path: Path, **asked: Any) -> SourceConfig:
    return SourceConfig(kind="parquet", path=str(path), **asked)


def looked(path: Path, **asked: Any) -> tuple[pl.DataFrame, dict[str, str]]:
    """Index Parquet files: samples, and the reason of each failure by its id."""
    config, aside = source(path, **asked), Aside()
    parts = list(index.look(config, index.pieces(config, aside), aside=aside))
    failures = [found for part in parts for found in index.failures(part.sources)]
    records = pl.concat([frame(part.records) for part in parts])
    return records, {each[0]: each[3] for each in failures}


def labels(path: Path, **asked: Any) -> dict[str, dict[str, str]]:
    return {
        each["sample_id"]: json.loads(each["labels"])
        for each in looked(path, **asked)[0].iter_rows(named=True)
    }


@pytest.fixture
def published(tmp_path):
    """A data set as `datasets` publishes one: two files, class names, nested columns, nulls."""
    paths = []
    for number in range(6):
        path = tmp_path / "files" / NAMES[number % 3] / f"{number // 3}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        paths.append(str(path))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "caption": datasets.Value("string"),
            "meta": {
                "wnid": datasets.Value("string"),
                "fine": datasets.ClassLabel(names=["a", "b"]),
            },
            "boxes": [datasets.Value("float32")],
        }
    )
    made = datasets.Dataset.from_dict(
        {
            "image": paths,
            "label": [0, 1, 2, 0, -1, None],
            "caption": ["a", None, "c", "d", "e", "f"],
            "meta": [{"wnid": f"n{n}", "fine": n % 2} for n in range(5)] + [None],
            "boxes": [[0.5]] * 6,
        },
        features=features,
    )
    folder = tmp_path / "hub/data"
    folder.mkdir(parents=True)
    for number in range(2):
        part = made.shard(2, number, contiguous=True)
        # What `push_to_hub` does before it writes: pictures inside, of their paths the last part.
        part = part.map(lambda row: row, features=features)
        table = part.with_format("arrow")[:]
        embedded = datasets.table.embed_table_storage(table)
        pq.write_table(embedded, folder / f"train-0000{number}-of-00002.parquet")
    return folder


def test_base_names_that_are_not_unique_are_refused_with_what_helps(published, tmp_path):
    with pytest.raises(BadInput, match=r"source\.key_column=__row__ takes a Parquet file's name"):
        indexing.index_samples(job(tmp_path / "caches", source(published)))
    found = looked(published, key_column="__row__")[0]
    assert found["sample_id"].to_list() == [
        f"train-0000{number}-of-00002/{row}" for number in range(2) for row in range(3)
    ]
    images = reader(source(published))
    read = [images.read(each, verify=True) for each in found.iter_rows(named=True)]
    assert read == [png(number) for number in range(6)]


def test_classes_have_their_names_and_nulls_are_no_labels(published):
    asked = ("label", "caption", "meta.wnid", "meta.fine")
    found = labels(published, key_column="__row__", label_columns=asked)
    assert list(found.values()) == [
        {"label": "cat", "caption": "a", "meta.wnid": "n0", "meta.fine": "a"},
        {"label": "dog", "meta.wnid": "n1", "meta.fine": "b"},
        {"label": "owl", "caption": "c", "meta.wnid": "n2", "meta.fine": "a"},
        {"label": "cat", "caption": "d", "meta.wnid": "n3", "meta.fine": "b"},
        {"caption": "e", "meta.wnid": "n4", "meta.fine": "a"},
        {"caption": "f"},
    ]
    assert len(labels(published, key_column="__row__", where={"label": "cat"})) == 2
    assert len(labels(published, key_column="__row__", where={"meta.wnid": "n4"})) == 1


def test_a_nested_column_may_be_the_key(published, tmp_path):
    with pytest.raises(BadInput, match=r"row 2 has no meta\.wnid; name in source\.key_column anot"):
        looked(published, key_column="meta.wnid")
    found = labels(published / "train-00000-of-00002.parquet", key_column="meta.wnid")
    assert sorted(found) == ["n0", "n1", "n2"]


@pytest.mark.parametrize("paths", [[None, None], ["a.png", None]])
def test_a_null_path_is_refused_with_what_helps(tmp_path, paths):
    rows = [{"bytes": png(n), "path": path} for n, path in enumerate(paths)]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
    missing = paths.index(None)
    wanted = rf"x\.parquet: row {missing} has no image\.path; .*__row__ \(file and row number\)"
    with pytest.raises(BadInput, match=wanted):
        looked(tmp_path / "x.parquet")
    found = looked(tmp_path / "x.parquet", key_column="__row__")[0]
    assert found["sample_id"].to_list() == ["x/0", "x/1"]


def test_a_column_of_another_type_is_refused_by_schema(published):
    file = published / "train-00000-of-00002.parquet"
    for asked, wanted in (
        (
            {"label_columns": ("boxes",)},
            r"column 'boxes' is list<.*; a label wants one plain value",
        ),
        (
            {"label_columns": ("meta",)},
            r"column 'meta' is struct<.*; name a field of it: meta\.wnid, meta\.fine",
        ),
        ({"label_columns": ("image.bytes",)}, r"column 'image\.bytes' is binary; a label wants"),
        ({"image_column": "caption"}, "column 'caption' is string; source.image_column wants the"),
        ({"image_column": "meta"}, "column 'meta' is struct<.*; source.image_column wants the"),
        ({"key_column": "boxes"}, "column 'boxes' is list<.*; source.key_column wants text or int"),
        ({"label_columns": ("meta.absent",)}, r"no column 'meta\.absent'; there are .*meta\.wnid"),
    ):
        with pytest.raises(BadInput, match=rf"train-00000-of-00002\.parquet: {wanted}"):
            looked(file, **{"key_column": "__row__", **asked})


def test_a_large_string_key_and_a_column_with_a_dot_in_its_name(tmp_path):
    columns = {
        "image": pa.array([png()], pa.large_binary()),
        "a.b": pa.array(["one"], pa.large_string()),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert labels(tmp_path, key_column="a.b", label_columns=("a.b",)) == {"one": {"a.b": "one"}}


def test_a_damaged_page_is_refused_with_its_file(published):
    file = published / "train-00000-of-00002.parquet"
    content = bytearray(file.read_bytes())
    content[4:400] = bytes(396)
    file.write_bytes(content)
    with pytest.raises(BadInput, match=r"train-00000-of-00002\.parquet: no whole Parquet file \("):
        looked(published, key_column="__row__", label_columns=("label",))


def test_text_that_is_not_utf8_is_refused_with_its_file(tmp_path):
    broken = pa.Array.from_buffers(
        pa.string(), 1, [None, *pa.array([b"caf\xe9"], pa.binary()).buffers()[1:]]
    )
    table = pa.table({"image": [png()], "name": broken})
    pq.write_table(table, tmp_path / "x.parquet")
    for asked in ({"key_column": "name"}, {"key_column": "__row__", "label_columns": ("name",)}):
        with pytest.raises(BadInput, match=r"x\.parquet: a key or label is no UTF-8"):
            looked(tmp_path, **asked)


@pytest.mark.slow
def test_a_row_group_above_two_gigabytes(tmp_path):
    """One array of Arrow's has room for 2 GiB; of a nested column it cannot have several."""
    large, rows = png() + bytes(96 << 20), 23  # what follows the end of a PNG is not looked at
    image = pa.array([{"bytes": large, "path": "x"}])
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": pa.chunked_array([image] * rows)}), path)
    assert pq.read_metadata(path).num_row_groups == 1
    found, failures = looked(path, key_column="__row__")
    assert (len(found), failures) == (rows, {})
    assert RowGroups(0).read(path, "image", rows - 1) == large
