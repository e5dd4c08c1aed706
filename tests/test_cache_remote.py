"""A cache root in a bucket: what a local one gives, whatever the network and the disk do."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support import bucket_child, bucket_server
from support.bucket_server import Bucket
from support.toy_stores import ROWS_PER_SHARD, Toy, features, files_under, ids, store_spec

from cache.errors import Busy, Corrupt, NotBuilt, StoreError
from cache.files import bucket, mapped, mirror, place
from cache.files.bucket_path import BucketPath
from cache.files.mirror import Mirror, Wanted
from cache.reader import Reader
from cache.samples import Samples
from cache.store import find_stores, open_store
from cache.verify import verify

pytestmark = pytest.mark.slow

CHILD = Path(__file__).parent / "support" / "bucket_child.py"
WAIT_SECONDS = 240  # two busy cores may take a minute to start a child


@pytest.fixture
def root(s3: Bucket, request) -> BucketPath:
    """A prefix of its own in the bucket."""
    path = place.root(f"s3://{bucket_server.NAME}/{request.node.name}")
    assert isinstance(path, BucketPath)
    return path


def contents(root: BucketPath) -> dict[str, bytes]:
    """Every data file of a root in a bucket, the manifest left out, as `files_under` has them."""
    found = {str(path.relative_to(root)): path for path, _ in root.files_below()}
    return {name: path.read_bytes() for name, path in found.items() if "manifest" not in name}


def local_build(folder: Path) -> dict[str, bytes]:
    """Every data file of a root in a folder, but the numbered HEADs: a bucket needs none."""
    bucket_child.build(folder)
    return {name: data for name, data in files_under(folder).items() if "HEAD-" not in name}


def check_reads(root: BucketPath, store=None) -> None:
    """Every feature reads back as it was made."""
    store = store or open_store(root, store_spec())
    reader = Reader(store, views=range(2))
    rows = store.samples.rows_of([*ids(5), *ids(2, "b")])
    for view in range(2):
        valid = reader.select(rows, view).valid
        assert valid.tolist() == [True, False, True, True, True, True, True]
        names = reader.sample_ids(rows[valid])
        made = np.stack([features(name, view)[0] for name in names]).astype(np.float16)
        np.testing.assert_array_equal(reader.select(rows[valid], view).patches(), made)


# ------------------------------------------------------------------------------------------- names


def test_a_bucket_path_is_a_path_that_no_one_can_open_by_mistake():
    path = place.root("s3://name/a b/ü#?%.png")
    assert str(path) == "s3://name/a b/ü#?%.png"
    assert path.key == "a b/ü#?%.png"
    assert pickle.loads(pickle.dumps(path)) == path
    assert place.root("s3:/name/x") == place.root(Path("s3://name/x")) == place.root("s3://name/x")
    assert str((path.parent / "c").relative_to(path.parent)) == "c"
    with pytest.raises(TypeError, match="is no file"):
        os.stat(path)


@pytest.mark.parametrize(
    ("uri", "why"),
    [("ftp://x/y", "no place known here"), ("gs://b/../x", "a name in a bucket has no `..`")],
)
def test_a_uri_that_names_no_place_is_refused(uri, why):
    with pytest.raises(ValueError, match=f"'{uri}': {why}"):
        place.root(uri)


def test_objects_of_any_name(s3, root, tmp_path):
    name = root / "a b" / "ü#?%20 x+y&=~.png"
    (tmp_path / "f").write_bytes(b"123")
    bucket.send(tmp_path / "f", name)
    assert name.read_bytes() == b"123"
    assert root.files_below() == [(name, 3)]
    assert list(root.glob("a*/*.png")) == [name]
    assert not list(root.glob("b*/*.png"))
    assert place.using(name, Path.read_bytes) == b"123"


# --------------------------------------------------------------------------------- build and read


def test_a_build_in_a_bucket_is_that_of_a_folder_byte_for_byte(root, tmp_path):
    bucket_child.build(root)
    assert contents(root) == local_build(tmp_path / "local")
    store = open_store(root, store_spec())
    assert not verify(store).problems
    assert [info.directory for info in find_stores(root)] == [store.directory]
    assert not store.todo(2)
    check_reads(root)


def test_a_store_travels_to_other_processes(root):
    bucket_child.build(root)
    store = pickle.loads(pickle.dumps(open_store(root, store_spec())))
    check_reads(root, store)


def test_what_was_mirrored_once_is_not_fetched_again(s3, root):
    bucket_child.build(root)
    check_reads(root)
    s3.behave()
    check_reads(root)
    fetched = {request.key.rpartition("/")[2] for request in s3.requests if request.method == "GET"}
    assert fetched == {"HEAD", "spec.json"}


def test_hints_bring_shards_before_they_are_asked_for(s3, root):
    bucket_child.build(root)
    reader = Reader(open_store(root, store_spec()), views=range(2))
    rows = [0, 4, 8]
    s3.behave()
    reader.select(rows, 1).read_ahead()
    wait_until(lambda: not mirror.default()._hinted)
    shards = [request for request in s3.requests if "manifest" not in request.key]
    assert {request.method for request in shards} == {"GET"}  # of known size: nobody asks for it
    s3.behave()
    selected = reader.select(rows, 1)
    assert len(selected.patches()) == len(selected.summaries) == len(rows)
    assert s3.requests == []


def test_growth_in_a_bucket_only_adds(root):
    toy = Toy(root)
    toy.add_samples(ids(5))
    toy.build(num_views=1)
    before = contents(root)
    toy.add_samples(ids(2, "b"))
    store = toy.build(num_views=2)
    after = contents(root)
    changed = {name for name in before if after[name] != before[name]}
    assert {Path(name).name for name in changed} == {"zarr.json", "HEAD"}
    assert len(Reader(store, range(2))) == 7


# ------------------------------------------------------------------------------- killed, and again


def run_child(s3: Bucket, *arguments: str, **behaviour) -> int:
    """Run a builder that the proxy may kill; return its exit code."""
    child = subprocess.Popen(
        [sys.executable, str(CHILD), *arguments],
        stdin=subprocess.PIPE,
        env={**os.environ, "POLARS_MAX_THREADS": "1"},
    )
    s3.behave(victim=child.pid, **behaviour)
    try:
        child.communicate(b"go\n", timeout=WAIT_SECONDS)
    finally:
        child.kill()  # outlives no test; nothing where it has ended
        child.wait(WAIT_SECONDS)
    return child.returncode


def test_killed_in_the_middle_of_uploads_then_again_gives_the_same_bytes(s3, root, tmp_path):
    clean = local_build(tmp_path / "local")
    bucket_child.build(root)
    num_puts = s3.puts()
    shutil.rmtree(tmp_path / "mirror" / "scratch")
    for number, when in (
        (2, "kill_after"),
        (num_puts // 3, "kill_before"),
        (num_puts // 2, "kill_after"),
        (2 * num_puts // 3, "kill_before"),
        (num_puts, "kill_before"),
    ):
        place_of_run = root / f"killed-{number}"

        def it(request, number=number):
            return request.method == "PUT" and request.number == number

        died = run_child(s3, "build", str(place_of_run), **{when: it})
        s3.behave()
        assert died == -signal.SIGKILL
        bucket_child.build(place_of_run)
        assert contents(place_of_run) == clean
        assert not verify(open_store(place_of_run, store_spec())).problems
    left = [p for p in (tmp_path / "mirror").glob("scratch/*/*") if p.name != "LOCK"]
    assert left == []


def test_a_large_file_killed_between_its_parts_is_not_there(s3, root, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(bucket.PART_BYTES) * 3)
    parts = []

    def second_part(request):
        if request.method == "PUT":
            parts.append(request)
        return request.method == "PUT" and request.number == 2

    name = root / "shard"
    assert run_child(s3, "send", str(large), str(name), kill_after=second_part) == -signal.SIGKILL
    assert max(part.number for part in parts) >= 2  # it did go in parts, answered in any order
    s3.behave()
    assert not name.is_file()
    assert run_child(s3, "send", str(large), str(name)) == 0
    assert place.using(name, Path.read_bytes) == large.read_bytes()


# ---------------------------------------------------------------------------------- two committers


def test_two_machines_that_commit_at_once_lose_nothing(root, monkeypatch, tmp_path):
    """Two builders that share no lock (another mirror each) commit one shard after the other."""
    toy = Toy(root)
    toy.add_samples(ids(8 * ROWS_PER_SHARD))
    store = toy.store()
    todo = store.todo(2)
    records = [toy.write(store, view, shard) for view, shard in todo]
    mirrors = [Mirror(tmp_path / name, 1 << 26) for name in ("one", "two")]
    of_thread = threading.local()
    monkeypatch.setattr(mirror, "default", lambda: getattr(of_thread, "mirror", mirrors[0]))

    def commit(which: int) -> None:
        of_thread.mirror = mirrors[which]
        own = open_store(root, store_spec())
        for record in records[which::2]:
            own.commit([record])

    with ThreadPoolExecutor(2) as both:
        list(both.map(commit, range(2)))
    assert list(store.manifest().records()) == sorted(records, key=lambda r: (r.view, r.shard))
    assert store.manifest().version == len(records)
    assert not verify(store).problems


def test_a_head_that_moved_meanwhile_is_not_replaced(root, tmp_path):
    head = root / "HEAD"
    bucket.swap(head, b"1", None)
    with pytest.raises(Busy, match="another process has replaced it"):
        bucket.swap(head, b"2", None)
    first = bucket.read(head)
    bucket.swap(head, b"2", first)
    bucket.swap(head, b"2", first)  # an attempt whose answer was lost
    with pytest.raises(Busy, match="another process has replaced it"):
        bucket.swap(head, b"3", first)
    assert head.read_bytes() == b"2"
    head.unlink()
    with pytest.raises(Busy, match="another process has replaced it"):
        bucket.swap(head, b"3", first)


def test_heads_in_another_formatting_are_moved_too(root, tmp_path):
    """A file written by another version says the same in other bytes, and has their checksum."""
    bucket_child.build(root)
    store = open_store(root, store_spec())
    for head in (root / "toy/samples/HEAD", store.directory / "manifest/HEAD"):
        blank = json.dumps({**json.loads(head.read_bytes()), "head_sha256": "0" * 64})
        own = f'"head_sha256": "{hashlib.sha256(blank.encode()).hexdigest()}"'
        (tmp_path / "f").write_text(re.sub(r'"head_sha256": "0{64}"', own, blank))
        bucket.send(tmp_path / "f", head)
    toy = Toy(root)
    toy.add_samples(ids(1, "c"))
    assert not toy.build(num_views=2).todo(2)


# ---------------------------------------------------------------------------------------- faults


def test_a_missing_object_is_named(root):
    bucket_child.build(root)
    store = open_store(root, store_spec())
    reader = Reader(store, range(2))
    lost = store.directory / "view-0001" / "c.1.0.0"
    lost.unlink()
    with pytest.raises(Corrupt, match=f"{lost}: no such object, though the manifest has it"):
        reader.select([4], 1).patches()
    assert [str(problem) for problem in verify(store).problems] == [f"{lost}: missing"]
    assert [(view, shard.shard) for view, shard in store.todo(2)] == [(1, 1)]
    bucket_child.build(root)
    check_reads(root)


def test_a_changed_object_is_refused(root, tmp_path):
    bucket_child.build(root)
    store = open_store(root, store_spec())
    changed = store.directory / "view-0000" / "c.0.0.0"
    content = bytearray(changed.read_bytes())
    content[7] ^= 1
    (tmp_path / "f").write_bytes(content)
    bucket.send(tmp_path / "f", changed)
    with pytest.raises(Corrupt, match="contents do not match the recorded sha256"):
        Reader(store, range(2)).select([0], 0).patches()
    (problem,) = verify(store).problems
    assert problem.path == changed
    (tmp_path / "f").write_bytes(content[:-1])
    bucket.send(tmp_path / "f", changed)
    with pytest.raises(Corrupt, match="bytes, its record says"):
        Reader(store, range(2)).select([0], 0).patches()


def test_what_is_not_there_is_said(root):
    with pytest.raises(NotBuilt, match="dataset 'toy' has no samples here"):
        Samples.open(root, "toy")
    with pytest.raises(NotBuilt, match="no such store"):
        open_store(root, store_spec())
    with pytest.raises(NotBuilt, match="no cache root"):
        find_stores(root)
    with pytest.raises(StoreError, match="there is no bucket 'nobody'"):
        Samples.open("s3://nobody/x", "toy")


def test_throttling_for_a_while_is_waited_out(s3, root, tmp_path):
    s3.behave(throttle=lambda request: request.number % 3 == 1)
    bucket_child.build(root)
    check_reads(root)
    s3.behave()
    assert contents(root) == local_build(tmp_path / "local")


def test_throttling_without_end_is_one_sentence(s3, root, monkeypatch):
    bucket_child.build(root)
    monkeypatch.setenv("EUPE_BUCKET_RETRY_SECONDS", "0.3")
    s3.behave(throttle=lambda request: request.method == "GET")
    with pytest.raises(StoreError) as told:
        open_store(root, store_spec())
    sentence = str(told.value)
    assert sentence.startswith(f"{root}")
    assert "503 Service Unavailable, SlowDown, after" in sentence
    assert "the bucket throttles" in sentence
    assert "\n" not in sentence
    s3.behave(throttle=lambda request: request.method == "PUT")
    with pytest.raises(StoreError, match=r"cannot be written: 503 Service Unavailable, SlowDown"):
        Toy(root).add_samples(ids(3, "c"))


def test_a_cut_answer_leaves_no_half_file(s3, root, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1 << 20))
    bucket.send(large, root / "shard")
    s3.behave(cut=lambda request: request.method == "GET" and request.number == 1)
    with suppress(StoreError):  # where the library does not go on by itself
        place.using(root / "shard", Path.read_bytes)
    assert place.using(root / "shard", Path.read_bytes) == large.read_bytes()
    assert not list((tmp_path / "mirror" / "fill").iterdir())


def test_no_connection_is_one_sentence(s3, root, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("EUPE_BUCKET_RETRY_SECONDS", "0.3")
    with pytest.raises(StoreError) as told:
        (root / "x").read_bytes()
    assert str(told.value).startswith(f"{root / 'x'}: cannot be read: ")
    assert "\n" not in str(told.value)


# ---------------------------------------------------------------------------------- bounded mirror


def put_objects(root: BucketPath, folder: Path, count: int, num_bytes: int) -> list[BucketPath]:
    names = [root / f"{number}" for number in range(count)]
    for number, name in enumerate(names):
        (folder / "f").write_bytes(bytes([number]) * num_bytes)
        bucket.send(folder / "f", name)
    return names


def held(small: Mirror) -> int:
    """Bytes in a mirror's copies and fills."""
    return sum(copy.num_bytes for copy in small.space.search())


def test_the_least_recently_opened_copies_go(s3, root, tmp_path):
    names = put_objects(root, tmp_path, 4, 1000)
    small = Mirror(tmp_path / "small", 3200)
    copies = [small.local(Wanted(name)) for name in names[:3]]
    small.local(Wanted(names[0]))
    small.local(Wanted(names[3]))
    assert [copy.exists() for copy in copies] == [True, False, True]
    assert held(small) <= 3200


@pytest.mark.parametrize(
    ("call", "why"),
    [("posix_fallocate", "its disk is full"), ("fsync", "No space left on device")],
)
def test_a_full_disk_below_a_mirror_is_one_sentence_and_nothing_is_left(
    s3, root, tmp_path, monkeypatch, call, why
):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (name,) = put_objects(root, tmp_path, 1, 1000)
    small = Mirror(tmp_path / "small", 1 << 20)
    with monkeypatch.context() as full:
        full.setattr(os, call, refuse)
        with pytest.raises(StoreError) as told:
            small.local(Wanted(name))
    sentence = str(told.value)
    wanted = f"{small.folder}: the mirror has no room for 1000 more bytes of {name} ({why}, "
    assert sentence.startswith(wanted)
    assert "\n" not in sentence
    assert held(small) == 0
    assert small.local(Wanted(name)).read_bytes() == name.read_bytes()


def test_what_is_mapped_stays_and_a_full_mirror_says_so(s3, root, tmp_path):
    names = put_objects(root, tmp_path, 3, 1000)
    small = Mirror(tmp_path / "small", 2500)
    copies = [small.local(Wanted(name)) for name in names[:2]]
    maps = [mapped.MappedFile(copy) for copy in copies]
    with pytest.raises(StoreError, match=r"no room for 1000 more bytes .*raise EUPE_MIRROR_BYTES"):
        small.local(Wanted(names[2]))
    assert all(copy.exists() for copy in copies)
    maps.pop(0)
    assert small.local(Wanted(names[2])).read_bytes() == bytes([2]) * 1000
    assert [copy.exists() for copy in copies] == [False, True]
    assert not list((tmp_path / "small" / "fill").iterdir())
    with pytest.raises(StoreError, match="no room for 1000 more bytes"):
        Mirror(tmp_path / "tiny", 999).local(Wanted(names[0]))


def test_an_epoch_through_a_mirror_smaller_than_the_store(root, monkeypatch, tmp_path):
    num_shards = 64
    toy = Toy(root)
    toy.add_samples(ids(num_shards * ROWS_PER_SHARD))
    store = toy.store()
    store.commit([toy.write(store, view, shard) for view, shard in store.todo(1)])
    sizes = dict(root.files_below())
    of_shards = sum(size for path, size in sizes.items() if "view-0000" in path.parts)
    bound = sum(sizes.values()) - of_shards + of_shards // 8
    monkeypatch.setenv("EUPE_MIRROR", str(tmp_path / "small"))
    monkeypatch.setenv("EUPE_MIRROR_BYTES", str(bound))
    store = open_store(root, store_spec())
    reader = Reader(store)
    order = np.random.default_rng(0).permutation(num_shards * ROWS_PER_SHARD)
    for start in range(0, len(order), 2):
        batch = order[start : start + 2]
        reader.select(order[start + 2 : start + 4]).read_ahead()
        made = [features(name, 0)[0] for name in reader.sample_ids(batch)]
        np.testing.assert_array_equal(
            reader.select(batch).patches(), np.stack(made).astype(np.float16)
        )
        assert held(mirror.default()) <= bound


def test_threads_that_want_one_object_fetch_it_once(s3, root, tmp_path):
    (name,) = put_objects(root, tmp_path, 1, 1 << 20)
    small = Mirror(tmp_path / "small", 1 << 22)
    s3.behave()
    with ThreadPoolExecutor(8) as pool:
        copies = set(pool.map(small.local, [Wanted(name)] * 8))
    assert len(copies) == 1
    assert [request.method for request in s3.requests].count("GET") == 1


def test_hints_leave_what_other_hints_brought(s3, root, tmp_path):
    names = put_objects(root, tmp_path, 4, 1000)
    small = Mirror(tmp_path / "small", 2500)
    digests = [hashlib.sha256(bytes([n]) * 1000).hexdigest() for n in range(4)]
    wanted = [Wanted(*each) for each in zip(names, [1000] * 4, digests, strict=True)]
    s3.behave()
    for asked in (wanted[:2], wanted):  # the first two first: hints given at once race for room
        small.will_need(asked)
        wait_until(lambda: not small._hinted)
        assert len(s3.requests) == 2
        assert held(small) == 2000
    for number, each in enumerate(wanted):  # what was asked for may go, the rest is fetched
        assert small.local(each).read_bytes() == bytes([number]) * 1000
    assert len(s3.requests) == 4


def test_what_was_just_filled_is_not_the_next_to_go(s3, root, tmp_path):
    """It counts as used when it is there, not when its fetching began."""
    names = put_objects(root, tmp_path, 4, 1000)
    digests = [hashlib.sha256(bytes([n]) * 1000).hexdigest() for n in range(4)]
    wanted = [Wanted(*each) for each in zip(names, [1000] * 4, digests, strict=True)]
    small = Mirror(tmp_path / "small", 3200)
    copies = [small.local(each) for each in wanted[:2]]

    def meanwhile(request) -> bool:
        for each in wanted[:2]:
            small.local(each)
        return False

    s3.behave(throttle=meanwhile)
    small.will_need([wanted[2]])
    wait_until(lambda: not small._hinted)
    s3.behave()
    Mirror(tmp_path / "small", 3200).local(wanted[3])  # as another process does
    assert [copy.exists() for copy in copies] == [False, True]
    small.local(wanted[2])
    assert len(s3.requests) == 1


class Robbed(Mirror):
    """A mirror from which another process evicts what was filled, so many times."""

    robberies = 0

    def _fill(self, wanted, copy, hint):
        super()._fill(wanted, copy, hint)
        if self.robberies:
            self.robberies -= 1
            copy.unlink()


def test_a_copy_evicted_before_it_is_used_is_filled_again(s3, root, tmp_path):
    names = put_objects(root, tmp_path, 2, 1000)
    robbed = Robbed(tmp_path / "small", 3200)
    robbed.robberies = mirror.FILL_TRIES - 1
    assert robbed.local(Wanted(names[1])).read_bytes() == bytes([1]) * 1000
    robbed.robberies = mirror.FILL_TRIES
    with pytest.raises(StoreError, match=r"0 was evicted 3 times .*raise EUPE_MIRROR_BYTES"):
        robbed.local(Wanted(names[0]))


@pytest.mark.parametrize(("times", "enough"), [(place.OPEN_TRIES - 1, True), (99, False)])
def test_a_copy_evicted_before_it_is_opened_is_filled_again(s3, root, tmp_path, times, enough):
    (name,) = put_objects(root, tmp_path, 1, 1000)
    robberies = iter(range(times))

    def use(copy: Path) -> bytes:
        if next(robberies, None) is not None:
            copy.unlink()
        return copy.read_bytes()

    if enough:
        assert place.using(name, use) == bytes(1000)
    else:
        with pytest.raises(StoreError, match="was evicted 8 times before it was opened"):
            place.using(name, use)


def small_disk(folder: Path, kibibytes: int) -> None:
    """Mount a file system of that size, where this user may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(command, capture_output=True, timeout=WAIT_SECONDS).returncode
    ):
        pytest.skip("this user may not mount a small file system")


def test_a_full_disk_evicts_and_then_says_so(s3, root, tmp_path):
    names = put_objects(root, tmp_path, 3, 1 << 20)
    disk = tmp_path / "disk"
    small_disk(disk, 2560)
    try:
        small = Mirror(disk / "mirror", 1 << 30)
        copies = [small.local(Wanted(name)) for name in names]  # the third needs the first to go
        assert [copy.exists() for copy in copies] == [False, True, True]
        (disk / "someone else's").write_bytes(bytes(1 << 18))
        maps = [mapped.MappedFile(copy) for copy in copies[1:]]
        with pytest.raises(StoreError, match=r"no room for 1048576 more bytes .*disk is full"):
            small.local(Wanted(names[0]))
        del maps
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=WAIT_SECONDS)


def wait_until(reached) -> None:
    """Wait for background threads, without end only where they hang."""
    given = time.monotonic() + WAIT_SECONDS
    while not reached():
        assert time.monotonic() < given
        time.sleep(0.01)
