"""The views' own pixels, cached: training reads them and is the same as without, bit by bit."""

import numpy as np
import pytest
import torch
from support import small_caches, stage_runs

from cache.codec.known import default_codec, make_codec
from cache.errors import StoreError
from cache.reader import Reader
from eupe import views
from eupe.encoders import Encoder
from eupe.pixels import RGB
from pipelines.features.codec_torch import encode
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import cache_jobs, open_stores, pixel_jobs
from pipelines.training import inputs


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji) -> Recipe:
    """Three stages' teacher caches, with the proxy's student scale among the cached pixels."""
    recipe = stage_runs.three_stages(tmp_path_factory.mktemp("pixels"), emoji)
    recipe = recipe.model_copy(update={"pixels": (48,)})
    for job in cache_jobs(recipe):
        small_caches.build(job)
    return recipe


@pytest.mark.slow
def test_pixels_are_those_of_the_view_resized(run):
    stage = run.stage("stage1")
    job = next(job for job in pixel_jobs(run, stage) if job.views == run.views)
    (store,) = open_stores(job)
    reader, images = Reader(store, range(run.num_views)), small_caches.reader(job.dataset.source)
    sample = store.samples.table.row(3, named=True)
    view = views.make_view(images.read(sample), run.views, sample["sample_id"], 1)
    kept = reader.select([3], 1).patches()
    assert kept.dtype == np.uint8
    np.testing.assert_array_equal(kept.reshape(48, 48, 3), views.resize(view.canvas, 48))
    assert reader.select([3], 1).digests == [view.digest]
    mean = views.resize(view.canvas, 48).mean((0, 1))
    np.testing.assert_allclose(reader.select([3], 1).summaries[0], mean, rtol=1e-5)


def test_training_on_cached_pixels_is_training_on_drawn_views(run, monkeypatch):
    stage = run.stage("stage1")
    drawn = list(inputs.from_caches(run.model_copy(update={"pixels": ()}), stage).batches(range(3)))
    monkeypatch.setattr(views, "make_view", lambda *_: pytest.fail("an image was decoded"))
    read = list(inputs.from_caches(run, stage).batches(range(3)))
    for ours, theirs in zip(read, drawn, strict=True):
        assert ours.sample_ids == theirs.sample_ids
        assert torch.equal(ours.pixels, theirs.pixels)
        np.testing.assert_array_equal(ours.valid, theirs.valid)
        for name, targets in ours.targets().items():
            for a, b in zip(targets, theirs.targets()[name], strict=True):
                assert torch.equal(a, b)


def test_what_is_read_is_pinned_with_the_rest(run):
    stage = run.stage("stage1")
    pins = inputs.from_caches(run, stage).pins
    assert any("/pixels-" in name for name in pins)
    assert len(pins) == len(stage.teachers) + 2  # and how many rows are drawn from


def test_pixels_that_are_wanted_and_not_built_are_named(run):
    stage = run.stage("stage1").model_copy(update={"student_resolutions": (32,)})
    wanted = run.model_copy(update={"pixels": (32,)})
    with pytest.raises(StoreError, match=r"pixels.*/32"):
        inputs.from_caches(wanted, stage)


@pytest.mark.parametrize(
    ("pixels", "sentence"), [((47,), "no stage has a student"), ((48, 31), "at \\[31\\]")]
)
def test_pixels_at_a_scale_no_student_has_are_refused(run, pixels, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe.model_validate({**run.model_dump(), "pixels": pixels})


def test_a_picture_is_its_own_tokens():
    picture = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    summary, patches = Encoder(RGB)(picture)
    codec = make_codec(default_codec("uint8"))
    encoded = encode(codec, patches.flatten(1, 2))
    assert encoded.data.reshape(2, 8, 8, 3).tolist() == picture.permute(0, 2, 3, 1).tolist()
    torch.testing.assert_close(summary, picture.float().mean((2, 3)))


def test_uint8_refuses_what_is_no_byte():
    patches = np.array([[[0.0, 255.0]], [[0.0, 256.0]], [[-1.0, 3.0]], [[np.nan, 0.0]]], np.float32)
    codec = make_codec(default_codec("uint8"))
    here, there = codec.encode(patches), encode(codec, torch.from_numpy(patches))
    assert here.valid.tolist() == there.valid.tolist() == [True, False, False, False]
    assert here.reasons == there.reasons
    np.testing.assert_array_equal(here.data, there.data)
    assert "overflow uint8" in (here.reasons[1] or "")
