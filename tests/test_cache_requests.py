"""What a store in a bucket asks for: requests are counted, since each takes 30 ms and money."""

from collections import Counter

import pytest
from support import bucket_server, small_caches
from support.bucket_server import Bucket
from support.toy_stores import ROWS_PER_SHARD, Toy, ids

from cache import verified
from cache.files import place
from cache.verify import verify
from eupe.pixels import RGB
from pipelines.caching import indexing, precompute
from pipelines.caching.extractor import Extractor
from pipelines.machines.in_process import InProcess
from pipelines.recipe.config import TeacherConfig

pytestmark = pytest.mark.slow

NUM_SHARDS = 60
COMMIT = 8  # requests of a commit, if it merges no runs
MOST_IDLE = 50


@pytest.fixture
def root(s3: Bucket, request):
    """A prefix of its own in the bucket."""
    return place.root(f"s3://{bucket_server.NAME}/{request.node.name}")


@pytest.fixture
def toy(root) -> Toy:
    made = Toy(root)
    made.add_samples(ids(NUM_SHARDS * ROWS_PER_SHARD))
    return made


def counted(s3: Bucket) -> Counter[str]:
    """Requests since the last counting, by method; those for files of shards apart, too."""
    found: Counter[str] = Counter()
    for request in s3.requests:
        name = request.key.rpartition("/")[2]
        of_shard = "view-" in request.key and name != "zarr.json"
        found[request.method] += 1
        found[f"{request.method} shard"] += of_shard
    s3.behave()
    return found


def total(requests: Counter[str]) -> int:
    return sum(count for name, count in requests.items() if "shard" not in name)


def test_many_shards_are_committed_and_verified_by_few_requests(s3, toy):
    store = toy.store()
    records = [toy.write(store, view, shard) for view, shard in store.todo(1)]
    assert counted(s3)["PUT shard"] == 2 * NUM_SHARDS
    store.commit(records[:1])
    counted(s3)
    store.commit(records[1:-1])
    assert total(counted(s3)) <= COMMIT
    assert not store.todo(1).missing[0, :-1].any()
    asked = counted(s3)
    assert asked["HEAD shard"] == asked["GET shard"] == 0
    assert total(asked) <= 7  # the two runs of the manifest, and a listing of all files

    first = verify(store, deep=False)
    assert (first.problems, first.num_shards) == ([], NUM_SHARDS - 1)
    asked = counted(s3)
    assert asked["HEAD shard"] == 0
    assert asked["GET shard"] <= 3 * NUM_SHARDS  # index, two checksums at once, and rows
    verified.note(store, first.version)
    store.commit(records[-1:])
    counted(s3)
    second = verify(store, deep=False, since=verified.version(store))
    assert (second.problems, second.num_shards) == ([], NUM_SHARDS)
    asked = counted(s3)
    assert asked["GET shard"] + asked["HEAD shard"] <= 5
    verified.note(store, second.version)
    counted(s3)
    verify(store, deep=False, since=verified.version(store))
    assert total(counted(s3)) == 2  # HEAD and VERIFIED


def test_a_shard_that_is_damaged_after_it_was_verified_is_found_by_a_deep_look(toy, tmp_path):
    store = toy.store()
    for view, shard in list(store.todo(1))[:3]:
        store.commit([toy.write(store, view, shard)])
    precompute.verify_stores([store], deep=False)
    lost = store.directory / "view-0000" / "c.1.0.0"
    lost.unlink()
    precompute.verify_stores([store], deep=False)  # todo looks at sizes, at every build
    assert (0, 1) in [(view, each.shard) for view, each in store.todo(1)]
    with pytest.raises(precompute.Corrupt, match="missing"):
        precompute.verify_stores([store], deep=True)


class Together(InProcess):
    """Yields all results at once, as many actors do."""

    def run(self, method, tasks):
        yield [result for results in super().run(method, tasks) for result in results]


def test_a_build_commits_what_has_arrived_at_once_and_asks_little_when_all_is_there(
    s3, root, tmp_path, emoji
):
    """Two stores of eight shards: with a request or more a shard, nothing to do would ask 250."""
    pictures = small_caches.pictures(emoji, 24)
    source = small_caches.write_folder(tmp_path / "images", pictures)
    teacher = TeacherConfig(
        name="pixels", encoder=RGB, weights="random:0", resolutions=(32, 64), codec="uint8"
    )
    work = small_caches.job(root, source, teachers=(teacher,), rows_per_shard=3)
    for run in range(3):
        counted(s3)
        indexing.index_samples(work)
        pool = Together(Extractor(work.teachers, decode_threads=1))
        stores = precompute.resolve_stores(work, pool)
        done = precompute.extract_missing(work, stores, pool)
        precompute.verify_stores(stores, deep=False)
        assert done.num_shards == (0 if run else 16)
        assert [store.manifest().version for store in stores] == [1, 1]
    assert total(counted(s3)) <= MOST_IDLE
