"""Images and caches in a bucket: the same features and the same training as from a local disk."""

from pathlib import Path

import pytest
import torch
from support import small_caches, small_run
from support.bucket_server import NAME
from support.stage_runs import from_cache
from support.toy_stores import files_under

from cache.files import bucket, place
from cache.files.bucket_path import BucketPath
from pipelines.recipe.config import SourceConfig
from pipelines.recipe.named import by_name
from pipelines.recipe.stores import cache_jobs
from pipelines.training import inputs

NUM_IMAGES = 20
STEPS = range(3)


@pytest.fixture
def root(s3, request) -> BucketPath:
    path = place.root(f"s3://{NAME}/{request.node.name}")
    assert isinstance(path, BucketPath)
    return path


def upload(folder: Path, to: BucketPath) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            bucket.send(file, to / file.relative_to(folder).as_posix())


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_images_in_a_bucket_are_those_on_disk(root, tmp_path, emoji, kind):
    pictures = small_caches.pictures(emoji, NUM_IMAGES)
    local = tmp_path / "images"
    local.mkdir()
    if kind == "folder":
        source = small_caches.write_folder(local, pictures)
    elif kind == "webdataset":
        source = small_caches.write_tar(local / "a.tar", pictures)
    else:
        source = small_caches.write_parquet(local / "a.parquet", pictures)
    upload(local, root)
    inside = Path(source.path).relative_to(local)
    remote = source.model_copy(update={"path": str(root / inside)})
    ours, theirs = small_caches.index(remote), small_caches.index(source)
    assert ours.records.equals(theirs.records)
    reader, samples = small_caches.reader(remote), ours.records.to_dicts()
    assert reader.mirrored
    reader.will_need(samples)
    assert [reader.read(sample, verify=True) for sample in samples] == [
        small_caches.reader(source).read(sample) for sample in theirs.records.iter_rows(named=True)
    ]


@pytest.mark.parametrize("count", [3, place.FEW + 4])  # asked for one by one, and by listing
def test_a_list_in_braces_names_tars_in_a_bucket(root, tmp_path, emoji, count):
    pictures = list(small_caches.pictures(emoji, count).items())
    for number, (name, data) in enumerate(pictures):
        small_caches.write_tar(tmp_path / f"{number:03}.tar", {name: data})
    upload(tmp_path, root)
    path = f"{root}/{{000..{count - 1:03}}}.tar"
    found = small_caches.index(SourceConfig(kind="webdataset", path=path))
    assert len(found.records) == count
    more = SourceConfig(kind="webdataset", path=f"{root}/{{000..{count:03}}}.tar")
    with pytest.raises(
        ValueError, match=rf"1 of its {count + 1} names are not there, the first is"
    ):
        small_caches.index(more)


def test_a_pattern_names_files_in_a_bucket(root, tmp_path, emoji):
    pictures = list(small_caches.pictures(emoji, 6).items())
    for name, part in (("x-0", pictures[:3]), ("x-1", pictures[3:5]), ("y-0", pictures[5:])):
        small_caches.write_tar(tmp_path / f"{name}.tar", dict(part))
    upload(tmp_path, root)
    found = small_caches.index(SourceConfig(kind="webdataset", path=str(root / "x-*.tar")))
    assert found.records.height == 5
    with pytest.raises(ValueError, match=r"no \.tar file there"):
        small_caches.index(SourceConfig(kind="webdataset", path=str(root / "z-*.tar")))


def test_an_image_that_is_gone_is_named(root, tmp_path, emoji):
    small_caches.write_folder(tmp_path, small_caches.pictures(emoji, 2))
    upload(tmp_path, root)
    source = SourceConfig(kind="folder", path=str(root))
    sample = small_caches.index(source).records.row(0, named=True)
    (BucketPath(root) / sample["uri"]).unlink()
    with pytest.raises(ValueError, match=r"the image cannot be read again: .*no such object"):
        small_caches.reader(source).read(sample)


@pytest.mark.slow
def test_a_run_from_a_bucket_is_that_from_a_disk(root, tmp_path, emoji):
    """Features byte for byte, equal targets, and equal losses of a training from either."""
    pictures = small_caches.pictures(emoji, NUM_IMAGES)
    small_caches.write_parquet(tmp_path / "train.parquet", pictures)
    bucket.send(tmp_path / "train.parquet", root / "train.parquet")
    local = small_run.recipe(tmp_path).model_copy(update={"num_views": 1})
    (train,) = local.train.values()
    source = train.source.model_copy(update={"path": str(root / "train.parquet")})
    moved = train.model_copy(update={"source": source})
    remote = local.model_copy(update={"cache_root": str(root / "cache"), "train": by_name(moved)})
    for run in (local, remote):
        (job,) = (each for each in cache_jobs(run) if each.views == run.views)
        small_caches.build(job)
    cache = root / "cache"
    there = {str(path.relative_to(cache)): path for path, _ in cache.files_below()}
    here = files_under(tmp_path / "cache")
    features = {name for name in here if "samples" not in Path(name).parts}
    assert features == {n for n in there if not {"samples", "manifest"} & set(Path(n).parts)}
    assert all(there[name].read_bytes() == here[name] for name in features)

    (stage,) = local.stages.values()
    both = [inputs.from_caches(run, stage).batches(STEPS) for run in (local, remote)]
    for ours, theirs in zip(*both, strict=True):
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.pixels, theirs.pixels)
        for a, b in zip(ours.targets()["lite0"], theirs.targets()["lite0"], strict=True):
            assert torch.equal(a, b)
    every = stage.model_copy(update={"log_every": 1})
    assert from_cache(remote, every, tmp_path / "remote") == from_cache(
        local, every, tmp_path / "local"
    )
