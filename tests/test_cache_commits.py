"""Committers that do not see each other's locks: nothing is lost, whoever is slow or killed."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock
from support.toy_stores import DATASET, ROWS_PER_SHARD, Toy, ids, sample_table

from cache import heads
from cache.errors import Busy, Corrupt, StoreError
from cache.files import atomic
from cache.format import layout
from cache.format.record_table import ShardRecord
from cache.heads import KEPT_HEADS, Head, commit, read_head
from cache.manifest import ManifestHead
from cache.reader import Reader
from cache.samples import Samples
from cache.store import Store, create_store, open_store
from cache.verify import verify

NUM_SHARDS = 12
WAIT_SECONDS = 120


@pytest.fixture
def no_locks(monkeypatch):
    """Take the locks away, as from processes on two machines."""
    monkeypatch.setattr(atomic, "only_writer", lambda directory, scratch: nullcontext())


@pytest.fixture
def built(tmp_path) -> tuple[Store, list[ShardRecord]]:
    """A store with shards that are written, but not committed."""
    toy = Toy(tmp_path)
    toy.add_samples(ids(NUM_SHARDS * ROWS_PER_SHARD))
    store = toy.store()
    return store, [toy.write(store, view, shard) for view, shard in store.todo(1)]


def head_version(store: Store) -> int:
    """Return the version that the file HEAD has, whatever is beside it."""
    said = json.loads((layout.manifest_directory(store.directory) / "HEAD").read_bytes())
    return int(said["version"])


def committed(store: Store) -> list[int]:
    """Return the shards that exist; each of them was committed once."""
    tables = list(store.manifest().tables())
    versions = [version for table in tables for version in table["version"].to_pylist()]
    assert store.manifest().version == len(versions) == len(set(versions))
    return [shard for table in tables for shard in table["shard"].to_pylist()]


def before(monkeypatch, owner, name, action):
    """Let `action` run once, before the next call of a function."""
    function, pending = getattr(owner, name), [action]

    def called(*args, **options):
        if pending:
            pending.pop()()
        return function(*args, **options)

    monkeypatch.setattr(owner, name, called)


# ------------------------------------------------------------------------------------ at one time

COMMITTING = """
import json, sys
from contextlib import nullcontext
from cache.files import atomic
atomic.only_writer = lambda directory, scratch: nullcontext()
from cache.format.record_table import ShardRecord
from cache.samples import Samples
from cache.store import open_store
from support.toy_stores import DATASET, ids, sample_table, store_spec
root, which = sys.argv[1], int(sys.argv[2])
store = open_store(root, store_spec())
sys.stdin.readline()
for shard in range(which, 12, 2):
    record = json.loads(sys.argv[3])[shard]
    store.commit([ShardRecord(**record)])
    Samples.append(root, DATASET, sample_table(ids(3, f"{which}-{shard}")))
"""


@pytest.mark.slow
def test_two_processes_without_a_lock_lose_nothing(built, tmp_path):
    store, records = built
    given = json.dumps([asdict(record) for record in records])
    command = [sys.executable, "-c", COMMITTING, str(tmp_path)]
    children = [
        subprocess.Popen([*command, str(n), given], stdin=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait(WAIT_SECONDS) for child in children] == [0, 0]
    assert committed(store) == list(range(NUM_SHARDS))
    assert head_version(store) == NUM_SHARDS
    added = {f"{n % 2}-{n}/{k:03d}" for n in range(NUM_SHARDS) for k in range(3)}
    table = Samples.open(tmp_path, "toy").table
    assert sorted(table["sample_id"]) == sorted([*added, *ids(NUM_SHARDS * ROWS_PER_SHARD)])
    assert table["row"].n_unique() == len(table)
    assert not verify(open_store(tmp_path, store.spec)).problems


def test_two_threads_without_a_lock_lose_nothing(built, no_locks):
    store, records = built

    def commit_half(which: int) -> None:
        for record in records[which::2]:
            store.commit([record])

    with ThreadPoolExecutor(2) as both:
        list(both.map(commit_half, range(2)))
    assert committed(store) == list(range(NUM_SHARDS))


def test_builders_that_create_a_store_at_once_without_a_lock_agree(tmp_path, no_locks):
    Toy(tmp_path).add_samples(ids(5))
    start = threading.Barrier(4)

    def create(_: int) -> tuple[str, str]:
        start.wait(WAIT_SECONDS)
        made = Toy(tmp_path).store()
        return made.moments_sha256, made.codec.name

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(create, range(4)))) == 1
    assert not verify(Toy(tmp_path).build()).problems


# ------------------------------------------------------------------------------------------- slow


@pytest.mark.parametrize("others", [1, KEPT_HEADS, NUM_SHARDS - 1])
def test_a_committer_that_was_overtaken_before_it_claims_tries_again(
    built, no_locks, monkeypatch, others
):
    store, records = built

    def overtake():
        for record in records[1 : 1 + others]:
            store.commit([record])

    before(monkeypatch, heads, "_put", overtake)
    store.commit(records[:1])
    assert committed(store) == list(range(1 + others))
    assert head_version(store) == 1 + others


def test_a_head_of_before_does_not_make_an_old_version_free(built, no_locks, monkeypatch):
    store, records = built
    head = layout.manifest_directory(store.directory) / "HEAD"

    def overtake_and_restore():
        backup = head.read_bytes()
        for record in records[1:]:
            store.commit([record])
        head.write_bytes(backup)

    before(monkeypatch, heads, "_put", overtake_and_restore)
    store.commit(records[:1])
    assert committed(store) == list(range(NUM_SHARDS))


@pytest.mark.parametrize("others", [1, NUM_SHARDS - 1])
def test_a_committer_that_is_late_with_its_head_takes_nothing_back(
    built, no_locks, monkeypatch, others
):
    store, records = built

    def overtake():
        for record in records[1 : 1 + others]:
            store.commit([record])

    before(monkeypatch, heads, "_copy_newest", overtake)
    store.commit(records[:1])
    assert committed(store) == list(range(1 + others))
    assert head_version(store) == 1 + others


def test_a_committer_gives_up_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "COMMIT_SECONDS", 0.2)
    commit(tmp_path, Head, lambda there: Head(), tmp_path)

    def taken(path, buffers, scratch, new):
        raise FileExistsError(path)

    monkeypatch.setattr(atomic, "write", taken)
    with pytest.raises(Busy, match="another process was faster; run the same again"):
        commit(tmp_path, Head, lambda there: Head(version=1), tmp_path)


# ----------------------------------------------------------------------------------------- killed


KILLED = """
import json, os, sys
from cache import heads
from cache.format.record_table import ShardRecord
from cache.store import open_store
from support.toy_stores import store_spec
store = open_store(sys.argv[1], store_spec())
heads._copy_newest = lambda *_: os._exit(9)
store.commit([ShardRecord(**json.loads(sys.argv[2]))])
"""


def killed_before_its_head(root: Path, record: ShardRecord) -> None:
    """Commit one shard in a process that is killed before it copies its HEAD."""
    command = [sys.executable, "-c", KILLED, str(root), json.dumps(asdict(record))]
    assert subprocess.run(command, check=False, timeout=WAIT_SECONDS).returncode == 9


def test_what_a_killed_committer_has_claimed_is_committed(built, tmp_path):
    store, records = built
    store.commit(records[:1])
    killed_before_its_head(tmp_path, records[1])
    assert head_version(store) == 1  # older than what is committed
    assert store.manifest().version == 2
    assert [shard.shard for _, shard in store.todo(1)] == list(range(2, NUM_SHARDS))
    assert len(Reader(store)) == 2 * ROWS_PER_SHARD
    store.commit(records[2:3])
    assert committed(store) == [0, 1, 2]
    assert head_version(store) == 3


def test_a_creator_killed_before_its_head_has_created(tmp_path, monkeypatch):
    toy = Toy(tmp_path)
    toy.add_samples(ids(5))
    monkeypatch.setattr(heads, "_copy_newest", lambda *_: None)
    store = toy.store()
    assert not (store.directory / "manifest" / "HEAD").exists()
    monkeypatch.undo()
    assert toy.store().moments_sha256 == store.moments_sha256
    assert head_version(store) == 0


def test_old_heads_and_segments_are_cleared_away(built):
    store, records = built
    for record in records:
        store.commit([record])
    directory = layout.manifest_directory(store.directory)
    assert len(list(directory.glob("HEAD-*"))) == KEPT_HEADS
    named = {path.name for path, _ in store.manifest().segment_files}
    assert {path.name for path in directory.glob("*.arrow")} == named


# --------------------------------------------------------------------------------------- restored


def test_a_head_from_a_backup_is_followed_or_refused(built):
    store, records = built
    head = layout.manifest_directory(store.directory) / "HEAD"
    store.commit(records[:1])
    backup = head.read_bytes()
    for record in records[1:5]:
        store.commit([record])
    head.write_bytes(backup)
    assert committed(store) == list(range(5))
    for later in head.parent.glob("HEAD-*"):
        later.unlink()
    with pytest.raises(Corrupt, match=r"HEAD is of version 1, older than its segments \(version 5"):
        store.manifest()
    with pytest.raises(Corrupt, match="eupe cache repair"):
        store.commit(records[5:6])


def test_a_store_made_anew_takes_no_shards_of_the_old_one(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(2 * ROWS_PER_SHARD))
    store = toy.store()
    records = [toy.write(store, view, shard) for view, shard in store.todo(1)]
    store.commit(records[:1])
    manifest, spec, old_moments = store.manifest(), store.spec, store.moments()
    for path in sorted(store.directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    measured = {
        kind: (count, mean + 1.0, scatter) for kind, (count, mean, scatter) in old_moments.items()
    }
    anew = create_store(tmp_path, spec, measured, {})
    for late in (store.commit, manifest.commit):
        with pytest.raises(StoreError, match="made anew since this process opened it"):
            late(records[1:])
    with pytest.raises(StoreError, match="made anew since this process opened it"):
        store.todo(1)
    assert anew.manifest().version == 0
    assert read_head(layout.manifest_directory(store.directory), ManifestHead).head.segments == ()


def test_a_store_deleted_at_the_moment_of_a_commit_gets_no_claim_of_the_old_one(
    built, no_locks, monkeypatch, tmp_path
):
    store, records = built
    for record in records[:3]:
        store.commit([record])
    old = layout.manifest_directory(store.directory)

    def made_anew():
        old.rename(tmp_path / "old")
        Toy(tmp_path).store()

    before(monkeypatch, heads, "_put", made_anew)
    store.commit(records[3:4])  # the same moments: it may
    assert committed(store) == [3]


def test_a_pinned_reader_of_a_shard_that_was_built_anew(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(2 * ROWS_PER_SHARD))
    store = toy.build(1)
    pinned = store.manifest().version
    shard = store.samples.shard_range(1)
    store.commit([toy.write(store, 0, shard)])  # equal bytes
    assert Reader(store, version=pinned).select([5]).valid.all()
    toy.bad = {"a/006": "another library"}
    record = toy.write(store, 0, shard)
    open_before = Reader(store, version=pinned)
    store.commit([record])
    for reader in (open_before, Reader(store, version=pinned)):
        assert reader.select([1]).valid.all()
        for ask in (lambda found: found.valid, lambda found: found.patches()):
            with pytest.raises(StoreError, match=r"shard 1 was built anew, .* Start a new run"):
                ask(reader.select([5]))
    assert Reader(store).select([5]).valid.all()


# ------------------------------------------------------------------------------------ file systems


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_worked_on_without(tmp_path, monkeypatch, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    toy = Toy(tmp_path)
    toy.add_samples(ids(5))
    assert len(Reader(toy.build())) == 5


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreError, match="this file system has no hard links"):
        Samples.append(tmp_path, DATASET, sample_table(ids(5)), ROWS_PER_SHARD)
    assert not list(Path(tmp_path).glob("toy/samples/HEAD*"))


def test_the_lock_is_asked_for_no_soft_lock(tmp_path, monkeypatch):
    """A lock file that a killed process leaves would stop every commit."""
    seen = []
    monkeypatch.setattr(FileLock, "acquire", lambda lock, **_: seen.append(lock.fallback_to_soft))
    with atomic.only_writer(tmp_path, tmp_path):
        pass
    assert seen == [False]
