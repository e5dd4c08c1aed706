"""What a process keeps mapped and open is bounded, whatever opens it, and makes room at need."""

import os
import resource
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from support.toy_stores import ROWS_PER_SHARD, Toy, ids

from cache.errors import StoreError
from cache.files import mapped
from cache.files.mapped import MappedFile, Recent
from cache.format import rows_table, zarr_shard
from cache.reader import Reader
from cache.shard_rows import MappedRows, TableRows, copy_all

NUM_SHARDS = 12
LARGE = 1 << 40  # of address space, of a sparse file: no memory, no disk


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Shards with and without an invalid row, and a short last one."""
    bad = {f"a/{number:03d}": "no image" for number in range(1, NUM_SHARDS * 2, ROWS_PER_SHARD)}
    toy = Toy(tmp_path_factory.mktemp("store"), bad=bad)
    toy.add_samples(ids(NUM_SHARDS * ROWS_PER_SHARD - 1))
    return toy.build(num_views=1)


def maps_below(folder: Path) -> int:
    return sum(f"{folder}/view-" in line for line in Path("/proc/self/maps").open())


def open_below(folder: Path) -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith(f"{folder}/view-")
        except FileNotFoundError:  # the listing's own
            continue
    return found


@contextmanager
def limited(what: int, to: int):
    """Lower a limit of this process for a while."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (to, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.mark.parametrize(
    ("access", "limit", "count"),
    [("map", "MAX_MAPS", maps_below), ("read", "MAX_OPEN", open_below)],
)
def test_readers_share_one_bound(store, monkeypatch, access, limit, count):
    monkeypatch.setattr(mapped, limit, 8)
    rows = np.flatnonzero(np.arange(len(store.samples)) % ROWS_PER_SHARD == 0)
    readers = [Reader(store, access=access) for _ in range(3)]
    wanted = Reader(store).select(rows).patches()
    for _ in range(2):
        for row, patches in zip(rows, wanted, strict=True):
            for reader in readers:  # one shard a batch: a batch holds what it reads
                selected = reader.select([row])
                np.testing.assert_array_equal(selected.patches()[0], patches)
                assert selected.summaries.shape[0] == 1
                assert count(store.directory) <= 8


@pytest.mark.parametrize(("hard", "kept"), [(1 << 14, 1050), (1024, 256)])
def test_as_many_files_stay_open_as_a_shuffle_buffer_waits_in(hard, kept, monkeypatch):
    """Three stores of 350 shards in work; where descriptors are few, a quarter of them."""
    limits = [1024, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, to: limits.__setitem__(0, to[0]))
    mapped._most_open.cache_clear()
    opened = Counter()
    stores = [
        Recent(lambda view, shard, store=store: opened.update([(store, shard)]), "descriptor")
        for store in range(3)
    ]
    for _ in range(2):
        for shard in range(350):
            for store in stores:
                store.get(0, shard)
    # Readers of other tests may keep a few.
    assert kept - 16 <= sum(map(len, stores)) <= kept
    assert (set(opened.values()) == {1}) == (kept == 1050)
    mapped._most_open.cache_clear()


def large_file(path: Path) -> Path:
    with path.open("wb") as file:
        file.truncate(LARGE)
    return path


def test_maps_make_room_for_each_other_where_the_kernel_has_none(tmp_path):
    paths = [large_file(tmp_path / str(number)) for number in range(3)]
    kept = Recent(lambda _, shard: MappedFile(paths[shard]), "map")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limited(resource.RLIMIT_AS, used + LARGE + LARGE // 2):
        for shard in range(3):
            assert not kept.get(0, shard).bytes[0]
        with pytest.raises(StoreError, match=r"1: cannot be mapped: Cannot allocate memory"):
            [MappedFile(path) for path in paths]


def test_descriptors_make_room_for_each_other_where_there_are_no_more(store):
    rows = range(0, NUM_SHARDS * ROWS_PER_SHARD, ROWS_PER_SHARD)
    mapped._most_open()  # a process raises its limit once, and not within this test
    readers = [Reader(store, access="read") for _ in range(2)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    wanted = Reader(store).select(list(rows)).patches()
    spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(highest)]  # whatever lies below
    with limited(resource.RLIMIT_NOFILE, max(spare) + 6):
        for row, patches in zip(rows, wanted, strict=True):
            for reader in readers:
                np.testing.assert_array_equal(reader.select([row]).patches()[0], patches)
        with pytest.raises(StoreError, match=r"cannot be opened: Too many open files"):
            readers[0].select(list(rows)).patches()
    for handle in spare:
        os.close(handle)


def test_opening_a_shard_reads_its_index_alone(tmp_path):
    rows = np.zeros((64, 1, 32_768), np.uint8)
    path = tmp_path / "shard"
    with path.open("wb") as file:
        flat = zarr_shard.as_bytes(rows)
        sums = zarr_shard.checksums(flat)
        file.writelines(zarr_shard.pack(flat, np.ones(64, bool), sums, 64))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if MappedFile(path).is_resident(0):
        pytest.skip("this file system keeps its files in memory")
    names, summary = [str(row) for row in range(64)], np.zeros((64, 2), np.float32)
    told = rows_table.make(names, [None] * 64, names, ["{}"] * 64, summary)
    table = TableRows(rows_table.with_checksums(told, sums))
    shard = MappedRows(path, path.stat().st_size, 64, table, rows[0].reshape(-1))
    assert not any(shard.is_resident(row) for row in range(64))


def test_asking_for_many_shards_makes_what_is_missing_and_says_which_were_used():
    made = []
    recent = Recent(lambda view, shard: made.append((view, shard)) or (view, shard), "map")
    keys = [(0, 2), (0, 1), (0, 2), (1, 1)]
    assert recent.all(keys) == recent.all(keys) == keys
    assert made == [(0, 2), (0, 1), (1, 1)]
    recent.all([(0, 1)])
    assert recent.forget(2)
    assert (0, 1) in recent  # the others were used less recently
    assert len(recent) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_fails_in_a_copying_thread_is_raised_where_the_batch_was_asked_for(threads):
    rows = [np.full(8, number, np.uint8) for number in range(13)]
    into = np.empty(13 * 8, np.uint8)
    copy_all(rows, into, threads)
    assert into.tolist() == np.repeat(np.arange(13), 8).tolist()
    with pytest.raises(ValueError, match="shape"):
        copy_all([*rows, np.zeros(9, np.uint8)], np.empty(14 * 8, np.uint8), threads)
