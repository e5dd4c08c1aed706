"""Images and caches elsewhere (law 14): nothing is computed again, and training is equal."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from support.bucket_server import NAME
from support.small_caches import (
    POLICY,
    build,
    in_process,
    job,
    pictures,
    write_folder,
    write_parquet,
    write_tar,
)

from cache.files import bucket, place
from cache.files.bucket_path import BucketPath
from cache.reader import Reader
from cache.samples import Samples
from eupe.normalise import Normaliser
from pipelines.caching import indexing, precompute
from pipelines.features.cached import CachedSource
from pipelines.features.sources import Normalisers
from pipelines.images import looker
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe.config import SourceConfig, WorkersConfig
from pipelines.recipe.draws import Sweep
from pipelines.recipe.resolutions import Resolutions
from pipelines.recipe.stores import CacheJob, open_stores
from pipelines.training.batches import Batches, Loader
from pipelines.training.feeds import Feed

COUNT = 24
Move = Callable[[Path, Mapping[str, bytes]], SourceConfig]


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, COUNT)


def trained_on(work: CacheJob) -> list[tuple[object, ...]]:
    """Everything that training gets of a job's store and images, byte for byte."""
    (store,) = open_stores(work)
    identity = Normaliser(torch.zeros(1280), torch.ones(1280))
    source = CachedSource({("lite0", 64): Reader(store)}, {"lite0": Normalisers(*[identity] * 2)})
    feed = Feed(source, ImageReader(base(work.dataset.source), max_lost=0), POLICY)
    batches = Batches(
        {"emoji": feed},
        Sweep("emoji", np.arange(COUNT), 8),
        lambda step: Resolutions(32, {"lite0": 64}),
        lambda resolution, rows: rows,
        range(3),
        Loader(WorkersConfig()),
    )
    return [
        (
            batch.sample_ids,
            batch.pixels.numpy().tobytes(),
            batch.valid.tolist(),
            *(each.numpy().tobytes() for each in batch.targets()["lite0"]),
        )
        for batch in batches
    ]


def extended(work: CacheJob) -> int:
    """Build what is missing; return how many shards were computed."""
    indexed = indexing.index_samples(work)
    assert (indexed.num_samples, indexed.num_new) == (COUNT, 0)
    pool = in_process(work)
    stores = precompute.resolve_stores(work, pool)
    done = precompute.extract_missing(work, stores, pool)
    precompute.verify_stores(stores)
    return done.num_shards


def folder_renamed(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    return SourceConfig(kind="folder", path=str((where / "images").rename(where / "elsewhere")))


def packed(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    shutil.rmtree(where / "images")
    return write_tar(where / "images.tar", images)


def repacked(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    shutil.rmtree(where / "images")
    where = where / "parquet" / "of" / "images"
    where.mkdir(parents=True)
    backwards = list(images.items())[::-1]
    write_parquet(where / "a.parquet", dict(backwards[:9]))
    source = write_parquet(where / "b.parquet", dict(backwards[9:]))
    return source.model_copy(update={"path": str(where / "*.parquet")})


def linked(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    (where / "mount").symlink_to(where / "images")
    return SourceConfig(kind="folder", path=str(where / "mount"))


def slow(move: Move) -> object:
    return pytest.param(move, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "move", [folder_renamed, *(slow(each) for each in (linked, packed, repacked))]
)
def test_images_moved_or_packed_anew_are_the_same_samples(tmp_path, images, move: Move):
    source = write_folder(tmp_path / "images", images)
    before = job(tmp_path / "root", source)
    build(before)
    wanted = trained_on(before)
    after = job(tmp_path / "root", move(tmp_path, images))
    assert extended(after) == 0
    assert trained_on(after) == wanted


@pytest.mark.slow
def test_a_tar_in_another_order_is_read_where_its_images_are_now(tmp_path, images):
    work = job(tmp_path / "root", write_tar(tmp_path / "images.tar", images))
    build(work)
    wanted = trained_on(work)
    write_tar(tmp_path / "images.tar", dict(reversed(images.items())))
    assert extended(work) == 0
    assert trained_on(work) == wanted


@pytest.mark.slow
def test_what_moved_alone_is_opened(tmp_path, images, monkeypatch):
    """Renamed, a folder keeps its times; of two tars one is packed anew."""
    parts = [dict(list(images.items())[:10]), dict(list(images.items())[10:])]
    (tmp_path / "tars").mkdir()
    for number, part in enumerate(parts):
        write_tar(tmp_path / f"tars/{number}.tar", part)
    work = job(tmp_path / "root", SourceConfig(kind="webdataset", path=str(tmp_path / "tars")))
    build(work)
    wanted, inspect, seen = trained_on(work), looker.inspect, []

    def counted(candidate):
        seen.append(candidate.uri)
        return inspect(candidate)

    monkeypatch.setattr(looker, "inspect", counted)
    (tmp_path / "tars").rename(tmp_path / "disk")
    moved = job(
        tmp_path / "root", SourceConfig(kind="webdataset", path=str(tmp_path / "disk/*.tar"))
    )
    assert extended(moved) == 0
    assert seen == []
    write_tar(tmp_path / "disk/1.tar", dict(reversed(parts[1].items())))
    assert extended(moved) == 0
    assert set(seen) == {"1.tar"}
    assert trained_on(moved) == wanted


@pytest.mark.slow
def test_a_root_copied_to_a_bucket_and_back_is_the_same_cache(tmp_path, images, s3):
    source = write_folder(tmp_path / "images", images)
    here = job(tmp_path / "root", source)
    build(here)
    wanted = trained_on(here)
    there = place.root(f"s3://{NAME}/{tmp_path.name}")
    assert isinstance(there, BucketPath)
    upload(tmp_path / "root", there / "root")
    upload(tmp_path / "images", there / "images")
    in_bucket = SourceConfig(kind="folder", path=str(there / "images"))
    for work in (job(there / "root", source), job(there / "root", in_bucket)):
        assert extended(work) == 0
        assert trained_on(work) == wanted
    for path, _ in (there / "root").files_below():
        file = tmp_path / "back" / path.relative_to(there / "root")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.read_bytes())
    back = job(tmp_path / "back", source)
    assert extended(back) == 0
    assert trained_on(back) == wanted


def test_no_file_of_a_cache_names_a_path_of_this_machine(tmp_path, images):
    first = next(iter(images))
    source = write_folder(tmp_path / "images", images)
    work = job(tmp_path / "root", source, max_failure_share=0.1)
    indexing.index_samples(work)
    (tmp_path / "images" / first).unlink()
    pool = in_process(work)
    precompute.extract_missing(work, precompute.resolve_stores(work, pool), pool)
    named = os.fsencode(tmp_path.name)
    files = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if named in path.read_bytes()] == []


def test_the_base_of_a_source_is_its_folder_or_the_fixed_part_of_its_pattern(tmp_path):
    (tmp_path / "a.parquet").mkdir()
    (tmp_path / "[c]").mkdir()
    for name in ("b.tar", "[c]/b.tar"):
        (tmp_path / name).touch()
    for kind, path, wanted in (
        ("folder", "images", "images"),
        ("parquet", "a.parquet", "a.parquet"),
        ("webdataset", "b.tar", "."),
        ("webdataset", "[c]/b.tar", "[c]"),
        ("webdataset", "x/train-*/[ab].tar", "x"),
        ("parquet", "gone.parquet", "."),
    ):
        source = SourceConfig(kind=kind, path=str(tmp_path / path))
        assert base(source) == tmp_path / wanted
    remote = SourceConfig(kind="folder", path="s3://bucket/images")
    assert str(base(remote)) == "s3://bucket/images"


def upload(folder: Path, to: BucketPath) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and ".tmp" not in file.parts:
            bucket.send(file, to / file.relative_to(folder).as_posix())


def test_a_sample_that_lies_elsewhere_keeps_row_and_digest(tmp_path, images):
    indexing.index_samples(job(tmp_path / "root", write_folder(tmp_path / "images", images)))
    before = Samples.open(tmp_path / "root", "emoji").table
    indexing.index_samples(job(tmp_path / "root", write_tar(tmp_path / "images.tar", images)))
    after = Samples.open(tmp_path / "root", "emoji").table
    kept = ["row", "sample_id", "bytes", "digest"]
    assert after.select(kept).equals(before.select(kept))
    assert set(after["uri"]) == {"images.tar"}
    assert '"name": ' in after["labels"][0]  # the tar says more of an image than its folder
