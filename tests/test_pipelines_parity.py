"""Parity: training from a cache is training with the teacher in the loop (docs/design.md, law 8).

Stage 2 for 20 steps on real images with a real teacher: two views each, accumulation over two
micro-batches, four epochs. The cached run reads features that were computed beforehand, in other
batches, in another order; every loss must be the one of the run whose teacher computes live.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support import small_recipe
from support.small_caches import COMPUTE_BATCH, build, pictures, teacher, write_parquet
from support.stage_runs import from_cache, live, losses, training_job

from cache.errors import Corrupt, StoreError
from cache.format import layout, zarr_shard
from cache.reader import Reader
from cache.store import Store
from cache.writer import write_shard
from eupe.spec import AugmentedView, CodecName, EncoderSpec
from pipelines.features.sources import Fetched, Resolutions
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe.config import (
    DatasetConfig,
    ExtractionConfig,
    Recipe,
    SourceConfig,
    StudentConfig,
    WorkersConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig
from pipelines.recipe.stores import open_stores
from pipelines.training import inputs
from pipelines.training.feeds import Feed

pytestmark = pytest.mark.slow

STEPS, IMAGES, SIDE = 20, 40, 64
EPOCH = 5  # steps: the same images, so that their losses compare
OTHER_BATCH = 5
OTHER_BATCH_RTOL = 1e-4  # composed modules; kernels may sum in another order for another batch
FLOAT16_RTOL = 1e-3  # 11 bits: each feature within 4.9e-4 of itself
BFLOAT16_RTOL = 1e-2  # 8 bits: within 3.9e-3

NETWORK = EncoderSpec(
    architecture="vit_tiny_patch16_dinov3_qkvb",
    model_arguments={"embed_dim": 48, "depth": 2, "num_heads": 2},
)


@pytest.fixture(scope="module")
def images(tmp_path_factory, emoji) -> Path:
    path = tmp_path_factory.mktemp("images") / "emoji.parquet"
    write_parquet(path, pictures(emoji, IMAGES))
    return path


def recipe(root: Path, images: Path, codec: CodecName) -> Recipe:
    source = SourceConfig(kind="parquet", path=str(images), label_columns=("label",))
    stage = small_recipe.stage(
        {"lite0": (SIDE,)},
        (SIDE,),
        steps=STEPS,
        micro_batch=4,
        head_hidden=64,
        optimizer=OptimizerConfig(lr=1e-3),
        warmup_steps=2,
        checkpoint_every=STEPS,
    )
    return small_recipe.recipe(
        root,
        [teacher((SIDE,), codec)],
        [stage],
        canvas=SIDE,
        name="parity",
        cache_root=str(root),
        seed=3,
        train=by_name(DatasetConfig(name="emoji", source=source)),
        held_out=DatasetConfig(name="held-out", source=source),
        views=AugmentedView(seed=11, canvas=SIDE),
        num_views=2,
        student=StudentConfig(name="student", encoder=NETWORK),
        extraction=ExtractionConfig(
            rows_per_shard=12, moments_samples=IMAGES, compute_batch=COMPUTE_BATCH
        ),
        workers=WorkersConfig(loader_threads=2, prefetch_batches=3),
    )


def cached(root: Path, images: Path, codec: CodecName) -> Recipe:
    """Build a recipe's training cache in this process."""
    run = recipe(root, images, codec)
    build(training_job(run, run.stage("stage2")))
    return run


@pytest.fixture(scope="module")
def float32(tmp_path_factory, images) -> Recipe:
    return cached(tmp_path_factory.mktemp("float32"), images, "float32")


@pytest.fixture
def spoilt(tmp_path, images, float32) -> tuple[Recipe, Store]:
    """Give a copy of the float32 cache, to be damaged."""
    shutil.copytree(float32.cache_root, tmp_path, dirs_exist_ok=True)
    run = recipe(tmp_path, images, "float32")
    (store,) = open_stores(training_job(run, run.stage("stage2")))
    return run, store


@pytest.fixture(scope="module")
def live_losses(float32, tmp_path_factory) -> list[float]:
    stage = float32.stage("stage2")
    given = live(float32, stage, COMPUTE_BATCH)
    return losses(float32, stage, given, tmp_path_factory.mktemp("live"))


def check_equal(ours: Sequence[float], theirs: Sequence[float]) -> None:
    assert list(ours) == list(theirs)


def test_a_float32_cache_gives_the_losses_of_the_live_teacher(float32, live_losses, tmp_path):
    check_equal(from_cache(float32, float32.stage("stage2"), tmp_path), live_losses)
    first, last = np.mean(live_losses[:EPOCH]), np.mean(live_losses[-EPOCH:])
    assert last < 0.98 * first  # something was learnt, so something is compared


def test_another_compute_batch_agrees(float32, live_losses, tmp_path):
    stage = float32.stage("stage2")
    other = losses(float32, stage, live(float32, stage, OTHER_BATCH), tmp_path)
    np.testing.assert_allclose(other, live_losses, rtol=OTHER_BATCH_RTOL, atol=0)


@pytest.mark.parametrize(
    ("codec", "rtol"), [("float16", FLOAT16_RTOL), ("bfloat16", BFLOAT16_RTOL)]
)
def test_a_narrower_codec_stays_within_its_bound(codec, rtol, images, live_losses, tmp_path):
    run = cached(tmp_path, images, codec)
    narrow = from_cache(run, run.stage("stage2"), tmp_path / "run")
    np.testing.assert_allclose(narrow, live_losses, rtol=rtol, atol=0)
    with pytest.raises(AssertionError):  # it is narrower: the comparison can tell
        check_equal(narrow, live_losses)


def test_two_swapped_rows_are_refused(spoilt, tmp_path):
    run, store = spoilt
    path = layout.patches_file(store.directory, 0, 0)
    size = zarr_shard.stored_bytes(store.row_bytes)
    whole = path.read_bytes()
    path.write_bytes(whole[size : 2 * size] + whole[:size] + whole[2 * size :])
    with pytest.raises(Corrupt, match="does not match its crc32c"):
        from_cache(run, run.stage("stage2"), tmp_path / "run")


def test_one_view_in_the_place_of_another_is_refused(spoilt, tmp_path):
    run, store = spoilt
    first, second = (layout.patches_file(store.directory, view, 1) for view in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(Corrupt, match="does not match its crc32c"):
        from_cache(run, run.stage("stage2"), tmp_path / "run")


def test_other_tokens_than_the_teachers_are_noticed(spoilt, live_losses, tmp_path):
    """A store that is sound in itself, made of rows in another order."""
    run, store = spoilt
    reader = Reader(store, range(2))
    shard = store.samples.shard_range(0)
    rows = np.arange(shard.start, shard.stop)
    selected = reader.select(rows)
    patches = selected.patches()
    patches[[0, 1]] = patches[[1, 0]]
    told = reader.table(0, 0).table.drop_columns(["crc32c"])
    store.commit([write_shard(store, 0, shard, patches, told, {})])
    with pytest.raises(AssertionError):
        check_equal(from_cache(run, run.stage("stage2"), tmp_path / "run"), live_losses)


def test_one_wrong_view_number_is_refused(float32, tmp_path):
    class OffByOne:
        """A source that reads the wrong view of one sample."""

        def __init__(self, source: object) -> None:
            self._source = source

        def __getattr__(self, name: str) -> object:
            return getattr(self._source, name)

        def fetch(
            self,
            sample_ids: Sequence[str],
            view_numbers: np.ndarray,
            resolutions: Resolutions,
            canvases: np.ndarray | None = None,
        ) -> Fetched:
            wrong = np.where(np.array(sample_ids) == sample_ids[0], 1 - view_numbers, view_numbers)
            return self._source.fetch(sample_ids, wrong, resolutions, canvases)  # type: ignore[attr-defined]

    stage = float32.stage("stage2")
    (store,) = open_stores(training_job(float32, stage))
    normalisers = inputs.normalisers_of(stage, [(1.0, [store])])
    feed = inputs.CachedSource({("lite0", SIDE): Reader(store, range(2))}, normalisers)
    right = Feed(feed, ImageReader(base(float32.train["emoji"].source)), float32.views)
    wrong = dataclasses.replace(right, source=OffByOne(feed))
    given = inputs.of_feeds(float32, stage, {"emoji": wrong}, normalisers, {})
    with pytest.raises(StoreError, match=r"view \d of sample '.*' renders as .* when cached"):
        losses(float32, stage, given, tmp_path)
