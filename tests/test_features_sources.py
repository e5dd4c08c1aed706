"""Feature sources: cached and live give the same tokens, and refuse what they do not have."""

import numpy as np
import pytest
import torch
from support.small_caches import COMPUTE_BATCH, POLICY, build, job, pictures, teacher, write_folder

from cache.errors import MissingSamples, StoreError
from cache.reader import Reader
from eupe.moments import Moments
from eupe.normalise import zscore
from eupe.teachers import load_teacher
from pipelines.features.cached import CachedSource
from pipelines.features.live import LiveSource
from pipelines.features.sources import Normalisers
from pipelines.images.reader import ImageReader

COUNT = 24
ZSCORE_ATOL = 1e-4  # composed modules: float64 moments applied in float32
PADDING_RTOL = 1e-5  # float32 parity: what pads a batch must not reach its other rows


@pytest.fixture(scope="module")
def stores(tmp_path_factory, emoji):
    """Two views at two resolutions; the first image is cut in the middle."""
    images = pictures(emoji, COUNT)
    first = next(iter(images))
    images[first] = images[first][: len(images[first]) // 2]
    where = tmp_path_factory.mktemp("sources")
    source = write_folder(where / "images", images)
    return build(
        job(
            where / "root",
            source,
            num_views=2,
            teachers=(teacher((64, 96)),),
            max_failure_share=0.5,
            moments_samples=COUNT,
        )
    )


@pytest.fixture(scope="module")
def normalisers(stores):
    moments = stores[0].moments()
    return {"lite0": Normalisers(*(zscore(Moments(*moments[k])) for k in Normalisers._fields))}


@pytest.fixture(scope="module")
def cached(stores, normalisers):
    return CachedSource(
        {("lite0", store.spec.resolution): Reader(store, range(2)) for store in stores}, normalisers
    )


@pytest.fixture(scope="module")
def live(stores, normalisers):
    config = teacher()
    return LiveSource(
        {"lite0": load_teacher("lite0", config.encoder, config.weights)},
        stores[0].samples,
        ImageReader(stores[0].root.parent / "images"),
        POLICY,
        normalisers,
        COMPUTE_BATCH,
    )


def asked(source, count: int = COUNT):
    """All samples, backwards, in alternating views."""
    ids = source.samples.table["sample_id"].to_list()[:count][::-1]
    return ids, np.arange(len(ids)) % 2


@pytest.mark.slow
@pytest.mark.parametrize("resolution", [64, 96])
def test_cached_and_live_tokens_are_equal(cached, live, resolution):
    ids, views = asked(cached)
    ours = cached.targets(ids, views, {"lite0": resolution})["lite0"]
    theirs = live.targets(ids, views, {"lite0": resolution})["lite0"]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    side = resolution // 32
    assert ours.patches.shape == (COUNT, side, side, 1280)
    assert ours.summary.shape == (COUNT, 1280)
    assert ours.summary.dtype == ours.patches.dtype == torch.float32


def test_an_undecodable_image_is_masked_in_both(cached, live):
    ids, views = asked(cached)
    for source in (cached, live):
        targets = source.targets(ids, views, {"lite0": 64})["lite0"]
        assert [ids[n] for n in torch.nonzero(~targets.valid)] == ["even/1f600"]
        assert not targets.summary[~targets.valid].any()
        assert not targets.patches[~targets.valid].any()
        assert torch.isfinite(targets.patches).all()


def test_both_say_how_wide_their_tokens_are(cached, live):
    assert cached.dims() == live.dims() == {"lite0": (1280, 1280)}
    assert cached.shards() == live.shards()


def test_tokens_are_normalised(cached):
    """Over the samples and the view that moments were measured on, each coordinate is a z-score."""
    ids, views = asked(cached)
    targets = cached.targets(ids, np.zeros_like(views), {"lite0": 64})["lite0"]
    for tokens in (targets.summary[targets.valid], targets.patches[targets.valid].flatten(0, 2)):
        assert tokens.mean(0).abs().max() < ZSCORE_ATOL
        alive = tokens.std(0) > 0
        spread = tokens.std(0, correction=0)[alive]
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=ZSCORE_ATOL, atol=0)


def test_what_is_not_there_is_refused(cached, normalisers, stores):
    with pytest.raises(MissingSamples, match="no sample 'nobody'"):
        cached.targets(["nobody"], np.zeros(1, np.int64), {"lite0": 64})
    ids, views = asked(cached, 2)
    with pytest.raises(StoreError, match="lite0 at 128 px was not opened; there are: lite0 at 64"):
        cached.targets(ids, views, {"lite0": 128})
    with pytest.raises(StoreError, match="view 7 was not opened"):
        cached.targets(ids, views + 7, {"lite0": 64})
    with pytest.raises(ValueError, match="no normalisers of teacher lite0"):
        CachedSource({("lite0", 64): Reader(stores[0], range(2))}, {})
    with pytest.raises(ValueError, match="at least one store"):
        CachedSource({}, normalisers)


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_padding_reaches_no_other_row(count):
    config = teacher(weights="random:0")
    network = load_teacher("lite0", config.encoder, config.weights)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    alone = network.features(pixels[:count], COMPUTE_BATCH)
    together = network.features(pixels, len(pixels))
    torch.testing.assert_close(
        alone.patches, together.patches[:count], rtol=PADDING_RTOL, atol=PADDING_RTOL
    )
    assert alone.summary.shape == (count, 1280)


def test_an_image_that_is_gone_is_not_valid_live(live, stores, tmp_path):
    sample = stores[0].samples.table.row(3, named=True)
    file = stores[0].root.parent / "images" / sample["uri"]
    moved = file.rename(tmp_path / file.name)
    try:
        found = live.targets([sample["sample_id"]], np.zeros(1, np.int64), {"lite0": 64})
        assert found["lite0"].valid.tolist() == [False]
    finally:
        moved.rename(file)
