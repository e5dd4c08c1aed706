"""Indexing: samples in the order of their hashes, sources recognised, killed or not."""

import errno
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_caches import (
    data_files,
    job,
    pictures,
    write_folder,
    write_parquet,
    write_tar,
)

from cache.errors import StoreError
from cache.format import on_disk
from cache.order import EpochOrder
from cache.samples import Samples
from pipelines.caching import indexing, listing
from pipelines.images import index, looker
from pipelines.recipe.config import SourceConfig


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 24)


def png(colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("L", (1, 1), colour).save(out, "PNG")
    return out.getvalue()


def named(path: str) -> str:
    """The sample id of an image's path."""
    return str(Path(path).with_suffix(""))


def opened(monkeypatch) -> list[str]:
    """Return the list of what indexing looks at from now on: uris of images."""
    inspect, seen = looker.inspect, list[str]()

    def counted(candidate):
        seen.append(candidate.uri)
        return inspect(candidate)

    monkeypatch.setattr(looker, "inspect", counted)
    return seen


@pytest.mark.parametrize("write", [write_folder, write_tar, write_parquet])
def test_a_source_that_is_the_same_is_not_opened_again(tmp_path, images, monkeypatch, write):
    suffix = {write_folder: "", write_tar: ".tar", write_parquet: ".parquet"}[write]
    work = job(tmp_path / "root", write(tmp_path / f"images{suffix}", images))
    seen = opened(monkeypatch)
    assert indexing.index_samples(work).num_new == len(seen) == 24
    before = data_files(tmp_path / "root")
    for opens in ("tarfile.open", "pyarrow.parquet.ParquetFile", "pyarrow.parquet.read_metadata"):
        monkeypatch.setattr(opens, lambda *_, **__: pytest.fail("a file was opened"))
    assert indexing.index_samples(work).num_new == 0
    assert len(seen) == 24
    assert data_files(tmp_path / "root") == before


def test_a_folder_that_has_changed_is_looked_at_again_and_no_other(tmp_path, images, monkeypatch):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    indexing.index_samples(work)
    seen = opened(monkeypatch)
    write_folder(tmp_path / "images", {"even/new.png": png()})
    assert indexing.index_samples(work).num_new == 1
    assert {Path(uri).parts[0] for uri in seen} == {"even"}
    Path(tmp_path / "images/odd").rename(tmp_path / "images/uneven")  # other ids, so other samples
    assert indexing.index_samples(work).num_new == 12


def test_what_is_no_image_is_listed_though_its_source_is_not_opened(tmp_path, images):
    source = write_folder(tmp_path / "images", {**images, "even/empty.png": b""})
    work = job(tmp_path / "root", source, max_failure_share=0.5)
    for _ in range(2):
        found = indexing.index_samples(work)
        assert found.failures.select("sample_id", "uri").rows() == [
            ("even/empty", "even/empty.png")
        ]
    strict = job(tmp_path / "root", source)
    with pytest.raises(ValueError, match=r"1 of 25 .*the image has no bytes"):
        indexing.index_samples(strict)


def test_other_labels_asked_of_the_same_file_reach_the_samples(tmp_path, images):
    source = write_parquet(tmp_path / "images.parquet", images)
    plain = job(tmp_path / "root", source.model_copy(update={"label_columns": ()}))
    indexing.index_samples(plain)
    before = Samples.open(tmp_path / "root", "emoji").table
    assert set(before["labels"]) == {"{}"}
    assert indexing.index_samples(job(tmp_path / "root", source)).num_new == 0
    after = Samples.open(tmp_path / "root", "emoji").table
    assert after.drop("labels").equals(before.drop("labels"))
    for name, labels in after.select("sample_id", "labels").rows():
        assert json.loads(labels) == {"label": name.split("/")[0]}


@pytest.mark.parametrize("merged", [5, 500_000])
def test_indexing_that_was_killed_goes_on_with_what_is_listed(
    tmp_path, images, monkeypatch, merged
):
    """Four folders of 6 images, one of them none; killed in the third."""
    laid_out = {f"{n % 4}/{named(path)}.png": data for n, (path, data) in enumerate(images.items())}
    first = next(iter(laid_out))
    source = write_folder(tmp_path / "images", {**laid_out, first: b"no image"})
    settings = {"rows_per_shard": 4, "max_failure_share": 0.1}
    undisturbed = job(tmp_path / "undisturbed", source, **settings)
    indexing.index_samples(undisturbed)
    monkeypatch.setattr(index, "PART_IMAGES", 2)
    monkeypatch.setattr(index, "TASK_BYTES", 1)
    monkeypatch.setattr(looker, "WINDOW", 4)
    monkeypatch.setattr(listing, "MERGED_ROWS", merged)
    inspect, looked_at = looker.inspect, []

    def killed(candidate):
        looked_at.append(candidate.sample_id)
        if len(looked_at) > 15:
            raise KeyboardInterrupt
        return inspect(candidate)

    monkeypatch.setattr(looker, "inspect", killed)
    work = job(tmp_path / "killed", source, **settings)
    with pytest.raises(KeyboardInterrupt):
        indexing.index_samples(work)
    assert not list((tmp_path / "killed/emoji").glob("samples/HEAD"))  # nothing is a sample yet
    monkeypatch.setattr(looker, "inspect", inspect)
    seen = opened(monkeypatch)
    indexed = indexing.index_samples(work)
    assert len(seen) == 12  # of the third folder and the fourth
    assert (indexed.num_samples, indexed.num_new) == (23, 23)
    assert indexed.failures["sample_id"].to_list() == [named(first)]
    assert data_files(tmp_path / "killed") == data_files(tmp_path / "undisturbed")


def test_no_room_for_samples_in_order_is_a_sentence_and_what_was_listed_stays(
    tmp_path, images, monkeypatch
):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as there:
        there.setattr(on_disk, "open", full, raising=False)
        with pytest.raises(StoreError, match="cannot be written"):
            indexing.index_samples(work)
    seen = opened(monkeypatch)
    assert indexing.index_samples(work).num_new == 24
    assert not seen  # listed before


def test_another_builder_that_indexes_at_once_is_in_nobodys_way(tmp_path, images, monkeypatch):
    """It begins and is done while a part of the first one has not got its name yet."""
    source = write_folder(tmp_path / "images", images)
    alone, work = (job(tmp_path / name, source) for name in ("alone", "root"))
    indexing.index_samples(alone)
    replace, others = os.replace, []

    def interrupted(path, target):
        if not others and "listing" in str(target):
            others.append(None)
            others.append(indexing.index_samples(work))
        replace(path, target)

    monkeypatch.setattr(os, "replace", interrupted)
    assert indexing.index_samples(work).num_samples == others[1].num_samples == 24
    assert data_files(tmp_path / "root") == data_files(tmp_path / "alone")
    assert not list((tmp_path / "root").rglob("listing/*"))


def test_samples_that_are_added_in_steps_are_those_of_one_step(tmp_path, images, monkeypatch):
    source = write_folder(tmp_path / "images", images)
    at_once = job(tmp_path / "at-once", source, rows_per_shard=3)
    indexing.index_samples(at_once)
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 7)
    monkeypatch.setattr(listing, "MERGED_ROWS", 5)
    in_steps = job(tmp_path / "in-steps", source, rows_per_shard=3)
    indexing.index_samples(in_steps)
    ours, theirs = (Samples.open(each.root, "emoji") for each in (in_steps, at_once))
    assert ours.table.equals(theirs.table)
    assert ours.shards() == theirs.shards()


def test_samples_of_a_source_sorted_by_class_are_mixed(tmp_path, monkeypatch):
    """64 classes of 40 images in tars of one class each; the shuffle buffer holds a tenth."""
    directory = tmp_path / "tars"
    directory.mkdir()
    data = png()
    for label in range(64):
        write_tar(
            directory / f"{label:02d}.tar", {f"{label:02d}/{n:02d}.png": data for n in range(40)}
        )
    work = job(tmp_path / "root", SourceConfig(kind="webdataset", path=str(directory)))
    indexing.index_samples(work)
    samples = Samples.open(tmp_path / "root", "emoji")
    rng = np.random.default_rng(0)
    labels = np.array([json.loads(text)["label"] for text in samples.table["labels"]])
    order = EpochOrder.of(samples.shards(), seed=0, buffer_rows=256)
    assert len(samples) == order.num_rows == 2560

    def classes(labels: np.ndarray) -> float:
        """Classes in a batch of 64, on average over an epoch."""
        starts = range(0, 2560, 64)
        return float(np.mean([len(set(labels[order.rows(0, at, at + 64)])) for at in starts]))

    at_random = [len(set(batch)) for batch in rng.permuted(labels).reshape(-1, 64)]
    assert abs(classes(labels) - np.mean(at_random)) < 1
    assert classes(np.sort(labels)) < np.mean(at_random) - 10  # in the order of the source


def test_two_images_of_one_id_are_refused_and_nothing_is_added(tmp_path):
    source = write_folder(tmp_path / "images", {"a/1.png": png(), "a/1.jpg": png(), "b.png": png()})
    work = job(tmp_path / "root", source)
    with pytest.raises(ValueError, match=r"sample_id 'a/1' is both a/1\.jpg .* and a/1\.png"):
        indexing.index_samples(work)
    assert not list(tmp_path.glob("root/emoji/samples/HEAD"))
    (tmp_path / "images/a/1.jpg").unlink()
    assert indexing.index_samples(work).num_new == 2


def test_another_image_under_a_known_id_is_left_out_with_both(tmp_path):
    """Within max_failure_share the others are indexed; it stays so while its folder is the same."""
    source = write_folder(tmp_path / "images", {"a.png": png(1), "b.png": png(2)})
    indexing.index_samples(job(tmp_path / "root", source))
    before = data_files(tmp_path / "root")
    write_folder(tmp_path / "images", {"a.png": png(3), "c.png": png(4)})
    with pytest.raises(
        ValueError, match=r"a: is there .* a\.png at 0 has sha256 \w+, .*\(a\.png at 0\) had \w+;"
    ):
        indexing.index_samples(job(tmp_path / "root", source))
    assert data_files(tmp_path / "root") == before
    lenient = job(tmp_path / "root", source, max_failure_share=0.5)
    for new in (1, 0):
        found = indexing.index_samples(lenient)
        assert found.num_new == new
        assert found.failures["sample_id"].to_list() == ["a"]
    samples = Samples.open(lenient.root, "emoji")
    assert Counter(samples.table["sample_id"]) == Counter("abc")
    (digest,) = samples.take(samples.rows_of(["a"]))["digest"]
    assert digest == hashlib.sha256(png(1)).digest()
    write_folder(tmp_path / "images", {"a.png": png(1)})  # it is back
    assert indexing.index_samples(job(tmp_path / "root", source)).failures.is_empty()


def test_a_file_of_the_same_size_changed_in_place_is_noticed(tmp_path, images):
    work = job(tmp_path / "root", write_tar(tmp_path / "images.tar", images))
    indexing.index_samples(work)
    first, *_ = images
    content = (tmp_path / "images.tar").read_bytes()
    at = content.index(images[first]) + len(images[first]) - 1
    (tmp_path / "images.tar").write_bytes(content[:at] + b"x" + content[at + 1 :])
    os.utime(tmp_path / "images.tar", ns=(0, 12345))
    with pytest.raises(ValueError, match=f"1 of 25 .*{named(first)}: is there with another image"):
        indexing.index_samples(work)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_images_with_other_times_are_no_reason_to_write_where_one_may_only_read(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    indexing.index_samples(work)
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path, ns=(0, 12345))
    for folder in (tmp_path, *tmp_path.parents[: len(tmp_path.parents) - 2]):
        folder.chmod(folder.stat().st_mode | 0o055)
    before = data_files(tmp_path / "root")
    os.seteuid(4001)
    try:
        assert indexing.index_samples(work).num_new == 0
    finally:
        os.seteuid(0)
    assert data_files(tmp_path / "root") == before
