"""Images lost or changed after indexing: rows without features, within max_failure_share."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.small_caches import POLICY, build, in_process, job, pictures, write_folder

from cache.reader import Reader
from eupe.normalise import Normaliser
from pipelines.caching import indexing, precompute
from pipelines.features.cached import CachedSource
from pipelines.features.sources import Normalisers
from pipelines.images.reader import ImageReader
from pipelines.recipe.config import WorkersConfig
from pipelines.recipe.draws import Sweep
from pipelines.recipe.resolutions import Resolutions
from pipelines.training.batches import Batches, Loader
from pipelines.training.feeds import Feed


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 24)


def another_picture() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "PNG")
    return out.getvalue()


def named(path: str) -> str:
    """The sample id of an image's path."""
    return str(Path(path).with_suffix(""))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (Path.unlink, "the image cannot be read again: .*: No such file or directory"),
        (
            lambda path: path.write_bytes(another_picture()),
            "no longer holds the image that was indexed",
        ),
    ],
)
def test_an_image_lost_or_changed_after_indexing_is_an_invalid_row(
    tmp_path, images, change, reason
):
    first, *others = images
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images), max_failure_share=0.1)
    indexing.index_samples(work)
    change(tmp_path / "images" / first)
    assert indexing.index_samples(work).num_new == 0
    pool = in_process(work)
    (store,) = precompute.resolve_stores(work, pool)
    done = precompute.extract_missing(work, [store], pool)
    assert done.num_invalid == 1
    (said,) = done.reasons
    assert re.match(f"{named(first)}: .*{reason}", said)
    reader = Reader(store)
    bad = store.samples.rows_of([named(first)])
    rows = store.samples.rows_of([named(path) for path in others])
    assert not reader.select(bad).valid.any()
    assert reader.select(rows).valid.all()


def test_images_that_are_all_out_of_reach_leave_no_shard(tmp_path, images):
    """A disk that is not mounted for a minute must not cost its pictures their rows for ever."""
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images), max_failure_share=1)
    indexing.index_samples(work)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    pool = in_process(work)
    with pytest.raises(ValueError, match="all 8 images of a batch are lost; is their source in"):
        precompute.resolve_stores(work, pool)
    (tmp_path / "elsewhere").rename(tmp_path / "images")
    (store,) = precompute.resolve_stores(work, pool)
    assert precompute.extract_missing(work, [store], pool).num_invalid == 0


def test_training_leaves_lost_images_out_within_the_share(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    (store,) = build(work)
    first, second, *_ = images
    (tmp_path / "images" / first).unlink()
    identity = Normaliser(torch.zeros(1280), torch.ones(1280))
    source = CachedSource({("lite0", 64): Reader(store)}, {"lite0": Normalisers(*[identity] * 2)})

    def batches() -> Batches:
        return Batches(
            {"emoji": Feed(source, ImageReader(tmp_path / "images", max_lost=1), POLICY)},
            Sweep("emoji", np.arange(24), 8),
            lambda step: Resolutions(32, {"lite0": 64}),
            lambda resolution, rows: rows,
            range(3),
            Loader(WorkersConfig()),
        )

    seen = list(batches())
    invalid = [b.sample_ids[place] for b in seen for place in np.flatnonzero(~b.valid)]
    assert invalid == [named(first)]
    (tmp_path / "images" / second).unlink()
    with pytest.raises(ValueError, match=r"2 images are lost .* max_failure_share .*even/"):
        list(batches())
