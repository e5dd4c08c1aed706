"""A build's time told from a short one: about what it takes, and nothing is left of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.small_caches import in_process, job, pictures, write_folder

from pipelines.caching import calibrate, indexing, precompute
from pipelines.caching.plan import Pass
from pipelines.images import reader as image_reader
from pipelines.machines.in_process import InProcess
from pipelines.recipe.stores import CacheJob

NUM_IMAGES = 96
TIMES = 3
"""Seconds of a core that has other work are not all alike either."""

pytestmark = pytest.mark.slow


@contextmanager
def here(work: CacheJob) -> Iterator[InProcess]:
    yield in_process(work)


@pytest.fixture
def work(tmp_path, emoji, monkeypatch) -> CacheJob:
    monkeypatch.setattr(precompute, "extractors", here)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(time, "monotonic", time.process_time)  # other work counts for nothing
    (tmp_path / "tmp").mkdir()
    source = write_folder(tmp_path / "images", pictures(emoji, NUM_IMAGES))
    return job(tmp_path / "root", source, num_views=2)


def left(work: CacheJob) -> list[Path]:
    """Return what lies where nothing shall be left."""
    return [*(Path(work.root).parent / "tmp").iterdir()]


def test_a_build_takes_about_as_long_as_was_told(work):
    indexing.index_samples(work)
    planned = calibrate.build_seconds([Pass(work, 2 * NUM_IMAGES)])
    before = {*Path(work.root).rglob("*")}
    started = time.monotonic()
    precompute.build([[work]])
    took = time.monotonic() - started
    assert took / TIMES < planned < took * TIMES
    assert before < {*Path(work.root).rglob("*")}
    assert left(work) == []


def test_it_is_the_sets_own_pictures_that_are_timed_where_it_is_indexed(work, monkeypatch):
    indexing.index_samples(work)
    seen, read = set(), image_reader.ImageReader.read

    def told(self, sample, *rest):
        seen.add(sample["sample_id"])
        return read(self, sample, *rest)

    monkeypatch.setattr(image_reader.ImageReader, "read", told)
    assert len(calibrate._own(work, 10)) == len(seen) == 10
    again = work.model_copy(update={"root": work.root + "-not-there"})
    assert calibrate._own(again, 10) == []


def test_more_pictures_take_longer_in_proportion_and_a_set_need_not_be_there(work, monkeypatch):
    one = calibrate._one
    kept = dict[int, float]()

    def told(planned, *rest, **more):
        kept[planned.images] = one(planned, *rest, **more)
        return kept[planned.images]

    monkeypatch.setattr(calibrate, "_one", told)
    few, many = Pass(work, 1_000), Pass(work, 1_000_000)
    assert calibrate.build_seconds([few, many]) == sum(kept.values())
    assert kept[many.images] / kept[few.images] > 1_000 / TIMES / TIMES
