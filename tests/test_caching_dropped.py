"""A sample that was taken out is not looked at again: not by builds to come, nor by training."""

from pathlib import Path

import numpy as np
import pytest
from support.small_caches import POLICY, build, job, pictures, teacher, write_folder

from cache import dropping
from cache.reader import Reader
from cache.verify import verify
from pipelines.caching import indexing
from pipelines.images.reader import ImageReader


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 12)


def test_a_dropped_sample_stays_out_of_what_is_built_later(tmp_path, images):
    source = write_folder(tmp_path / "images", images)
    work = job(tmp_path / "root", source, max_failure_share=0)
    (store,) = build(work)
    first, other = list(images)[:2]
    gone = str(Path(first).with_suffix(""))
    assert dropping.drop(work.root, "emoji", [gone]).num_rows == 1
    assert indexing.index_samples(work).num_new == 0
    (tmp_path / "images" / first).write_bytes(images[other])  # nobody compares it
    later = job(tmp_path / "root", source, max_failure_share=0, teachers=(teacher((64, 96)),))
    stores = build(later)  # a dropped sample is no failure
    assert len(stores) == 2
    (row,) = store.samples.rows_of([gone])
    for each in stores:
        assert verify(each).problems == []
        selected = Reader(each).select(np.arange(len(images)))
        assert np.flatnonzero(~selected.valid).tolist() == [row]
        assert selected.reasons[row] == "dropped"
    samples = stores[0].samples.take(np.arange(len(images)))
    reader = ImageReader(source.path, max_lost=0)
    canvases, digests = reader.canvases(samples, POLICY, np.zeros(len(images), np.int64))
    assert [n for n, digest in enumerate(digests) if digest is None] == [row]
    assert not canvases[row].any()
