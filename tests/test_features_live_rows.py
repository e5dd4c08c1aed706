"""Rows that a store lacks, computed live: to the last bit what a build stores of them."""

import numpy as np
import pytest
import torch
from support import small_caches

from cache.codec.encoded import Escapes
from cache.reader import Reader
from eupe.errors import BadInput
from pipelines.features.cached import CachedSource
from pipelines.features.live_rows import LiveRows
from pipelines.features.sources import Normalisers
from pipelines.images.reader import ImageReader

pytestmark = pytest.mark.slow

COUNT, SIDE = 24, 64
BROKEN = 13


@pytest.fixture(scope="module", params=["float32", "float16", "int8", "rot4"])
def built(request, tmp_path_factory, emoji):
    """Return a job, its images and its store, built shard by shard; a picture of it is none."""
    directory = tmp_path_factory.mktemp(request.param)
    images = small_caches.pictures(emoji, COUNT)
    source = small_caches.write_folder(directory / "images", images)
    job = small_caches.job(
        directory / "root",
        source,
        teachers=(small_caches.teacher((SIDE,), request.param),),
        rows_per_shard=5,
        max_failure_share=0.5,
    )
    (store,) = small_caches.build(job)
    return job, ImageReader(directory / "images"), store


def source_of(store, version, live):
    normalisers = {"lite0": Normalisers(torch.nn.Identity(), torch.nn.Identity())}
    return CachedSource({("lite0", SIDE): Reader(store, [0], version)}, normalisers, None, live)


def fetched(source, rows):
    tokens = source.fetch(rows, np.zeros_like(rows), {"lite0": SIDE})
    return tokens.valid, tokens.decode()["lite0"]


@pytest.mark.parametrize("version", [1, 2, 4])
def test_half_a_store_and_its_teacher_give_what_the_store_gives(built, version):
    job, images, store = built
    live = LiveRows(job.teachers, images, job.views)
    rows = np.random.default_rng(version).permutation(COUNT)
    whole, ours = source_of(store, None, None), source_of(store, version, live)
    (valid, there), (own_valid, made) = fetched(whole, rows), fetched(ours, rows)
    assert Reader(store, [0], version).records.absent(rows).any()
    assert valid.tolist() == own_valid.tolist()
    torch.testing.assert_close(made.summary, there.summary, rtol=0, atol=0)
    torch.testing.assert_close(made.patches, there.patches, rtol=0, atol=0)


def test_an_image_that_is_none_is_invalid_as_in_the_store(built, tmp_path, monkeypatch):
    job, images, store = built
    lost = store.samples.sample_ids([BROKEN])[0]
    read = ImageReader.read

    def broken(self, sample, verify=False):
        return b"no picture" if sample["sample_id"] == lost else read(self, sample, verify)

    monkeypatch.setattr(ImageReader, "read", broken)
    rows = np.arange(COUNT)
    valid, tokens = fetched(source_of(store, 1, LiveRows(job.teachers, images, job.views)), rows)
    assert np.flatnonzero(~valid).tolist() == [BROKEN]
    assert not tokens.patches[BROKEN].any()


def test_another_teacher_of_that_name_is_refused(built):
    job, images, store = built
    others = [small_caches.teacher((SIDE,), weights="random:3")]
    with pytest.raises(BadInput, match="every machine wants the same weights file"):
        LiveRows(others, images, job.views).load(store)


def test_an_escape_of_a_live_row_stands_in_its_place(built):
    """No picture here has one: token 1 of the first row that is computed gets one."""
    job, images, store = built

    class Escaping(LiveRows):
        def compute(self, *asked):
            sevens = np.full((1, store.spec.patch_dim), 7, np.float32)
            escapes = Escapes(np.array([0]), np.array([1], np.int32), sevens)
            return super().compute(*asked)._replace(escapes=escapes)

    rows = np.array([2, 0, 21, 1, 22])  # of the first shard, which alone is there, and the last
    _, tokens = fetched(source_of(store, 1, Escaping(job.teachers, images, job.views)), rows)
    assert (tokens.patches[:, 0, 1] == 7).all(-1).tolist() == [False, False, True, False, False]
