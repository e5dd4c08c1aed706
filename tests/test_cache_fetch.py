"""Filling a node's mirror: each byte once, by as many streams as a link wants."""

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
from support import link_server
from support.link_server import Link
from support.toy_stores import ROWS_PER_SHARD, Toy, ids, store_spec

from cache.errors import Corrupt, NotBuilt, StoreError
from cache.files import bucket, place
from cache.files.bucket_path import BucketPath
from cache.files.mirror import HINT_THREADS, Mirror, Wanted
from cache.format import layout, zarr_shard
from cache.reader import Reader
from cache.store import Store, open_store

FAST = Link(bytes_per_second=1e9, stream_bytes_per_second=1e9, delay_seconds=0.0)
PART = 1000
WAIT_SECONDS = 20


@pytest.fixture
def far(monkeypatch):
    """Return what serves objects over a link, as the environment names it."""

    @contextmanager
    def serving(objects, link=FAST):
        with link_server.serve(objects, link) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
            yield server

    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(bucket, "READ_BYTES", PART)
    return serving


def contents(count: int, num_bytes: int) -> dict[str, bytes]:
    return {f"bucket/{n}": random.Random(n).randbytes(num_bytes) for n in range(count)}


def wanted(objects: dict[str, bytes]) -> list[Wanted]:
    return [
        Wanted(BucketPath(f"s3://{n}"), len(data), hashlib.sha256(data).hexdigest())
        for n, data in objects.items()
    ]


@pytest.mark.parametrize("num_bytes", [1, PART, PART + 1, 40 * PART - 1, 40 * PART])
def test_a_large_object_comes_in_ranges_and_each_byte_once(far, tmp_path, num_bytes):
    objects = contents(1, num_bytes)
    with far(objects) as server:
        (asked,) = wanted(objects)
        copy = Mirror(tmp_path, 1 << 20).local(asked)
        assert copy.read_bytes() == objects["bucket/0"]
        assert server.sent == {"bucket/0": num_bytes}
        assert server.num_requests == -(-num_bytes // PART)


def test_one_object_has_as_many_streams_as_there_are(far, tmp_path):
    objects = contents(1, 60 * PART)
    slow = Link(bytes_per_second=1e9, stream_bytes_per_second=1e6, delay_seconds=0.2)
    with far(objects, slow) as server:
        Mirror(tmp_path, 1 << 20).local(wanted(objects)[0])
        assert bucket.STREAMS / 2 < server.most_streams <= bucket.STREAMS + 1


@pytest.mark.parametrize("there", [0, 999, 5 * PART - 1, 9 * PART])
def test_an_object_of_another_size_is_refused(far, tmp_path, there):
    objects = contents(1, there)
    with far(objects):
        asked = Wanted(BucketPath("s3://bucket/0"), 5 * PART, "0" * 64)
        with pytest.raises(Corrupt, match=f"{there} bytes, its record says {5 * PART}"):
            Mirror(tmp_path, 1 << 20).local(asked)
    assert not list(tmp_path.glob("fill/*"))


def test_an_object_that_is_replaced_meanwhile_is_not_mixed(far, tmp_path):
    """Of an object without a recorded sha256 nothing else would notice."""

    class Replaced(dict):
        asked = 0

        def get(self, key):
            self.asked += 1
            return super().get(key)[:: 1 if self.asked < 9 else -1]

    objects = Replaced({"bucket/0": random.Random(0).randbytes(40 * PART)})
    with far(objects), pytest.raises(StoreError, match="cannot be read: 412"):
        Mirror(tmp_path, 1 << 20).local(Wanted(BucketPath("s3://bucket/0")))


def test_a_missing_object_is_named(far, tmp_path):
    asked = Wanted(BucketPath("s3://bucket/0"), 5 * PART, "0" * 64)
    with far({}), pytest.raises(NotBuilt, match="no such object"):
        Mirror(tmp_path, 1 << 20).local(asked)


def test_eight_ranks_of_a_node_fetch_each_byte_once(far, tmp_path):
    """Every rank wants its own shards, in the order of its need, and one that others want too."""
    ranks, each = 8, 4
    objects = contents(ranks * each + 1, 10 * PART)
    *own, shared = wanted(objects)
    start = threading.Barrier(ranks)

    def rank(number: int) -> None:
        mirror = Mirror(tmp_path, 1 << 24)
        mine = [own[number * each + n] for n in range(each)]
        mine.insert(number % each, shared)
        start.wait(WAIT_SECONDS)
        mirror.will_need(mine)
        for file in mine:
            assert mirror.local(file).read_bytes() == objects[f"bucket/{file.path.name}"]

    with far(objects) as server, ThreadPoolExecutor(ranks) as pool:
        list(pool.map(rank, range(ranks)))
        assert server.sent == {name: len(data) for name, data in objects.items()}


def test_hints_do_not_wait_for_another_process_that_brings_the_objects(far, tmp_path):
    objects = contents(HINT_THREADS + 1, 10 * PART)
    *busy, free = wanted(objects)
    ours, theirs = Mirror(tmp_path, 1 << 20), Mirror(tmp_path, 1 << 20)
    with far(objects) as server:
        with ExitStack() as bringing:
            for each in busy:
                bringing.enter_context(theirs._one_filler(theirs._copy(each)))
            ours.will_need([*busy, free])
            end = time.monotonic() + WAIT_SECONDS
            while not ours.has(free) and time.monotonic() < end:
                time.sleep(0.01)
            assert ours.has(free)
        assert set(server.sent) == {str(free.path).removeprefix("s3://")}
        for each in busy:  # and what they did not bring is brought when it is asked for
            assert ours.local(each).read_bytes() == objects[str(each.path).removeprefix("s3://")]


def built(toy: Toy, num_shards: int) -> Store:
    """Build one view of a store with full shards."""
    toy.add_samples(ids(ROWS_PER_SHARD * num_shards))
    store = toy.store()
    store.commit([toy.write(store, *missing) for missing in store.todo(1)])
    return store


def objects_of(toy: Toy) -> dict[str, bytes]:
    """Return a store's files as objects of a bucket."""
    files = [path for path in toy.root.rglob("*") if path.is_file()]
    return {f"bucket/{path.relative_to(toy.root)}": path.read_bytes() for path in files}


def test_few_rows_are_fetched_by_range_and_many_by_the_shard(far, tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_MIRROR", str(tmp_path / "mirror"))
    toy = Toy(tmp_path / "root", bad={"a/001": "no image"})
    store = built(toy, 24)
    local, files = Reader(store), objects_of(toy)
    few, many = np.array([1, 21, 64, 66, 95]), np.arange(ROWS_PER_SHARD * 24)
    row_bytes, tail_bytes = local.store.row_bytes, zarr_shard.index_bytes(ROWS_PER_SHARD)
    with far(files) as server:
        reader = Reader(open_store(place.root("s3://bucket"), store_spec()))
        assert reader.for_rows(len(many) // 10 + 1) is reader
        sparse = reader.for_rows(len(few))
        selected = sparse.select(few)
        selected.read_ahead()
        np.testing.assert_array_equal(selected.patches(), local.select(few).patches())
        assert selected.valid.tolist() == [False, True, True, True, True]
        patches = {key: sent for key, sent in server.sent.items() if "/c." in key}
        # An index of each of four shards, and four rows: the fifth is not valid.
        assert sum(patches.values()) == 4 * (tail_bytes + row_bytes)
        np.testing.assert_array_equal(reader.select(many).patches(), local.select(many).patches())
        whole = {key: len(data) for key, data in files.items() if "/c." in key}
        asked = server.sent.copy()
        # What is mirrored is read there, and what is not there is named.
        again = reader.for_rows(len(few)).select(few).patches()
        np.testing.assert_array_equal(again, local.select(few).patches())
        assert {key: asked[key] - patches.get(key, 0) for key in whole} == whole
        assert {key: server.sent[key] for key in whole} == {key: asked[key] for key in whole}


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone"])
def test_a_row_by_range_is_checked_as_any_other(far, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("EUPE_MIRROR", str(tmp_path / "mirror"))
    toy = Toy(tmp_path / "root")
    store = built(toy, 12)
    patches = layout.patches_file(store.directory, 0, 2)
    if fault == "gone":
        patches.unlink()
    else:
        data = bytearray(patches.read_bytes())
        data[5] ^= 4
        patches.write_bytes(data if fault == "flipped" else data[:-3])
    with far(objects_of(toy)):
        reader = Reader(open_store(place.root("s3://bucket"), store_spec())).for_rows(1)
        with pytest.raises(StoreError, match=patches.name):
            reader.select([2 * ROWS_PER_SHARD]).patches()
