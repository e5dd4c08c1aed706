"""Image sources: three forms, one sample id, and every fault with its reason."""

import io
import json
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.small_caches import (
    index,
    pictures,
    reader,
    write_folder,
    write_parquet,
    write_tar,
)

from pipelines.images.parquet import RowGroups
from pipelines.images.reader import ImageReader
from pipelines.images.walks import IMAGE_SUFFIXES, base, sample_id
from pipelines.recipe.config import SourceConfig

SUFFIX = {write_folder: "", write_tar: ".tar", write_parquet: ".parquet"}


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 20)


@pytest.fixture(params=[write_folder, write_tar, write_parquet])
def write(request, tmp_path):
    return lambda images: request.param(tmp_path / f"images{SUFFIX[request.param]}", images)


@pytest.fixture
def source(write, images):
    return write(images)


def png(width: int = 4, height: int = 3, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG", **options)
    return out.getvalue()


def test_every_form_gives_the_same_samples(source, images):
    found = index(source).records
    wanted = {str(Path(path).with_suffix("")): data for path, data in images.items()}
    assert set(found["sample_id"]) == set(wanted)
    images_of = reader(source)
    for sample in found.iter_rows(named=True):
        assert images_of.read(sample, verify=True) == wanted[sample["sample_id"]]
        assert json.loads(sample["labels"])["label"] == sample["sample_id"].split("/")[0]


def test_where_keeps_samples_with_that_label(source):
    odd = source.model_copy(update={"where": {"label": "odd"}})
    assert {name.split("/")[0] for name in index(odd).records["sample_id"]} == {"odd"}
    none = source.model_copy(update={"where": {"label": "green"}})
    with pytest.raises(ValueError, match=r"no image with \{'label': 'green'\}"):
        index(none)


def test_one_reader_serves_many_threads(tmp_path, images):
    source = write_parquet(tmp_path / "images.parquet", images, row_group=3)
    samples = index(source).records.to_dicts() * 5
    for kept in (0, 1 << 30):
        images_of = ImageReader(base(source), RowGroups(kept))
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(images_of.read, samples))
        assert [len(data) for data in read] == [sample["bytes"] for sample in samples]
        assert read[0] == next(iter(images.values()))


def test_a_row_group_is_read_once_whoever_wants_it(tmp_path, images, monkeypatch):
    source = write_parquet(tmp_path / "images.parquet", images, row_group=3)
    samples = index(source).records.to_dicts()
    opened, iter_batches = [], pq.ParquetFile.iter_batches

    def counted(file, batch_size, row_groups, columns):
        opened.extend(row_groups)
        time.sleep(0.01)
        return iter_batches(file, batch_size, row_groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reader(source).read, samples * 3))
    assert sorted(opened) == list(range(-(-len(samples) // 3)))


def test_a_row_group_that_cannot_be_read_is_tried_again(tmp_path, images, monkeypatch):
    source = write_parquet(tmp_path / "images.parquet", images)
    sample, images_of = index(source).records.row(0, named=True), reader(source)
    moved = Path(source.path).rename(tmp_path / "elsewhere")
    images_of._row_groups._starts[Path(source.path)] = [0, len(images)]
    with pytest.raises(ValueError, match="cannot be read again"):
        images_of.read(sample)
    moved.rename(source.path)
    assert images_of.read(sample) == next(iter(images.values()))


def test_what_is_no_image_is_listed_with_its_reason(tmp_path):
    faults = {"a/text.png": b"no image at all", "a/empty.png": b"", "a/cut.png": png()[:20]}
    found = index(write_folder(tmp_path, {**faults, "a/good.png": png()}))
    assert found.records["sample_id"].to_list() == ["a/good"]
    reasons = dict(found.failures.select("sample_id", "reason").iter_rows())
    assert set(reasons) == {"a/text", "a/empty", "a/cut"}
    assert reasons["a/empty"] == "the image has no bytes"
    assert "no image format" in reasons["a/text"]


def test_a_parquet_row_without_bytes_is_listed(tmp_path):
    rows = [{"bytes": png(), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    found = index(SourceConfig(kind="parquet", path=str(tmp_path / "x.parquet")))
    failure = found.failures.row(0, named=True)
    assert (failure["sample_id"], failure["offset"]) == ("b", 1)
    assert failure["reason"] == "the row holds no image bytes"


def test_a_binary_column_wants_a_key_column(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"png": [png()], "key": ["one.png"]}), path)
    plain = SourceConfig(kind="parquet", path=str(path), image_column="png")
    with pytest.raises(ValueError, match=r"no column 'png\.path'; there are key, png"):
        index(plain)
    keyed = index(plain.model_copy(update={"key_column": "key"})).records
    assert keyed["sample_id"].to_list() == ["one.png"]
    images_of = reader(SourceConfig(kind="parquet", path=str(path)))
    assert images_of.read(keyed.row(0, named=True), verify=True) == png()


def test_labels_of_a_tar_lie_beside_the_image(tmp_path):
    path = tmp_path / "x.tar"
    members = {"n/1.jpg": png(), "n/1.cls": b"7\n", "n/1.json": b'{"caption": "red", "size": [1]}'}
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    labels = index(SourceConfig(kind="webdataset", path=str(path))).records["labels"][0]
    assert json.loads(labels) == {"label": "n", "cls": "7", "caption": "red"}


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_nothing_there_is_said(tmp_path, kind):
    (tmp_path / "notes.md").write_text("no image")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"^{path}: no"):
            index(SourceConfig(kind=kind, path=str(path)))


@pytest.mark.parametrize(("kind", "name"), [("webdataset", "x.tar"), ("parquet", "x.parquet")])
def test_a_file_of_another_kind_is_refused(tmp_path, kind, name):
    (tmp_path / name).write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="no whole"):
        index(SourceConfig(kind=kind, path=str(tmp_path)))


def test_a_cut_tar_is_refused(tmp_path, images):
    path = tmp_path / "x.tar"
    source = write_tar(path, images)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"x\.tar: no whole uncompressed tar file"):
        index(source)


def test_a_changed_or_lost_image_is_refused(write, images):
    source = write(images)
    sample = index(source).records.row(0, named=True)
    first = next(iter(images))
    write({**images, first: images[first][:-1] + b"x"})
    with pytest.raises(ValueError, match="no longer holds the image that was indexed"):
        reader(source).read(sample, verify=True)
    (base(source) / sample["uri"].removeprefix("parquet:image:")).unlink()
    with pytest.raises(ValueError, match="cannot be read again"):
        reader(source).read(sample)


SEGMENT = st.text(
    st.characters(codec="ascii", exclude_characters="/\\\0", categories="LN"), min_size=1
)


@given(st.lists(SEGMENT, min_size=1, max_size=3), st.sampled_from(sorted(IMAGE_SUFFIXES)))
def test_the_id_is_the_path_without_image_extension(parts, suffix):
    path = "/".join(parts)
    assert sample_id(f"./{path}{suffix.upper()}") == path
    assert sample_id(f"{path}.v2{suffix}") == f"{path}.v2"
    assert sample_id(f"{path}.v2") == f"{path}.v2"
