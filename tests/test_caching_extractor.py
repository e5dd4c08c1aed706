"""The extractor: one decode serves all that is wanted of an image, and decoding never pauses."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.small_caches import (
    COMPUTE_BATCH,
    build,
    data_files,
    in_process,
    job,
    pictures,
    teacher,
    write_folder,
)

from eupe import views
from eupe.teachers import Teacher
from pipelines.caching import extractor, indexing, precompute
from pipelines.machines.pool import IN_FLIGHT

pytestmark = pytest.mark.slow

DECODE_SECONDS = 60.0  # 16 emoji on a busy machine


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 24)


@pytest.mark.parametrize(("num_views", "times"), [(2, 1), (5, 2)])
def test_one_decode_serves_all_resolutions_and_up_to_four_views(
    tmp_path, images, monkeypatch, num_views, times
):
    source = write_folder(tmp_path / "images", images)
    teachers = (teacher((64, 96)),)
    for count in range(1, num_views + 1):  # one view at a time
        build(job(tmp_path / "apart", source, num_views=count, teachers=teachers))
    work = job(tmp_path / "together", source, num_views=num_views, teachers=teachers)
    indexing.index_samples(work)
    pool = in_process(work)
    stores = precompute.resolve_stores(work, pool)
    decoded, decode = [], views.decode

    def counted(data, *rest):
        decoded.append(data)
        return decode(data, *rest)

    monkeypatch.setattr(views, "decode", counted)
    done = precompute.extract_missing(work, stores, pool)
    assert list(Counter(decoded).values()) == [times] * len(images)
    assert (done.num_shards, done.num_images) == (3 * 2 * num_views, 24 * num_views)
    assert data_files(tmp_path / "together") == data_files(tmp_path / "apart")


def test_the_next_shard_is_decoded_while_this_one_computes(tmp_path, images, monkeypatch):
    work = job(
        tmp_path / "root", write_folder(tmp_path / "images", images), rows_per_shard=COMPUTE_BATCH
    )
    indexing.index_samples(work)
    stores = precompute.resolve_stores(work, in_process(work))
    shards = [shard for _, shard in stores[0].todo(1)[:IN_FLIGHT]]
    decoded, both_decoded, decode = [], threading.Event(), views.decode

    def counted(data, *rest):
        decoded.append(data)
        if len(decoded) == len(shards) * COMPUTE_BATCH:
            both_decoded.set()
        return decode(data, *rest)

    features = Teacher.features

    def late(*arguments):
        assert both_decoded.wait(DECODE_SECONDS), "the second shard waits for the first"
        return features(*arguments)

    monkeypatch.setattr(views, "decode", counted)
    monkeypatch.setattr(Teacher, "features", late)
    working = extractor.Extractor(work.teachers)
    with ThreadPoolExecutor(len(shards)) as calls:
        extracted = calls.map(
            lambda shard: working.extract(str(tmp_path / "images"), {0: stores}, shard), shards
        )
        assert [record.shard for (record,) in extracted] == [0, 1]
