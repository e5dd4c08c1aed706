"""A disk that lies: what is damaged or exchanged is refused when it is read, or by verify."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from support.bucket_server import NAME
from support.toy_stores import DATASET, GRID, Toy, ids

from cache.errors import Corrupt, StoreError
from cache.files import bucket, place
from cache.format import layout, zarr_shard
from cache.format.rows_table import checksums
from cache.reader import Reader
from cache.samples import Samples, segment_files
from cache.store import Store, open_store
from cache.verify import verify

FLIPS_CHILD = Path(__file__).parent / "support" / "flip_child.py"
FLIPS = 40
"""Seeded bits of a file that are flipped, one at a time; in a child below, many more."""


@pytest.fixture(params=["float16", "rot4"])
def store(request, tmp_path: Path) -> Store:
    """Two views of seven samples in shards of four, one sample without features."""
    toy = Toy(tmp_path, codec=request.param, bad={"a/001": "no image"})
    toy.add_samples(ids(7))
    return toy.build(num_views=2)


def all_values(store: Store, access: str = "map") -> list[np.ndarray]:
    """Read everything that training reads of a store, opened anew."""
    opened = open_store(store.root, store.spec)
    reader = Reader(opened, range(2), access=access)
    found = []
    for view in (0, 1):
        selected = reader.select(np.arange(7), view)
        digests = np.array([str(digest) for digest in selected.digests])
        found += [selected.decoded(), selected.summaries, selected.valid, digests]
    return [
        *found,
        np.array(reader.sample_ids(np.arange(7))),
        np.array(opened.samples.table["digest"].to_list()),
    ]


def flipped(path: Path, bit: int) -> Callable[[], object]:
    """Flip one bit of a file in place; return what flips it back."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    content[bit // 8] ^= 1 << bit % 8
    return lambda: path.write_bytes(content)


def refused_or_equal(store: Store, wanted: list[np.ndarray], access: str = "map") -> bool:
    """Read everything: True if refused, False if every value is as before."""
    try:
        found = all_values(store, access)
    except StoreError:
        return True
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    return False


@pytest.mark.parametrize("access", ["map", "read"])
def test_a_flipped_bit_of_patches_is_refused_when_read(store, access):
    """What no reader of ours reads is what lies between two rows: it is for outside readers."""
    path = layout.patches_file(store.directory, 1, 0)
    wanted = all_values(store, access)
    row_bytes = store.row_bytes
    stored = zarr_shard.stored_bytes(row_bytes)
    rows_end = path.stat().st_size - zarr_shard.index_bytes(store.samples.rows_per_shard)
    rng = np.random.Generator(np.random.Philox(7))
    for bit in rng.integers(0, 8 * path.stat().st_size, FLIPS).tolist():
        between = bit // 8 < rows_end and bit // 8 % stored >= row_bytes
        back = flipped(path, bit)
        assert refused_or_equal(store, wanted, access) != between, bit
        back()
    assert not refused_or_equal(store, wanted, access)


def test_every_flipped_bit_of_patches_is_found_by_verify(store):
    path = layout.patches_file(store.directory, 0, 1)
    rng = np.random.Generator(np.random.Philox(8))
    for bit in rng.integers(0, 8 * path.stat().st_size, FLIPS // 4).tolist():
        back = flipped(path, bit)
        assert verify(open_store(store.root, store.spec)).problems
        back()
    assert verify(open_store(store.root, store.spec)).problems == []


def small_files(store: Store) -> list[Path]:
    """Files that say what the store holds: of each kind one."""
    manifest = layout.manifest_directory(store.directory)
    return [
        layout.rows_file(store.directory, 0, 0),
        segment_files(store.root, DATASET.name)[0][0],
        next(manifest.glob("*.arrow")),
        layout.spec_file(store.directory),
        layout.moments_file(store.directory),
    ]


@pytest.mark.parametrize("kind", range(5), ids=["rows", "samples", "manifest", "spec", "moments"])
def test_a_flipped_bit_of_a_table_changes_no_value(store, kind):
    path = small_files(store)[kind]
    wanted = all_values(store)
    rng = np.random.Generator(np.random.Philox(9))
    for bit in rng.integers(0, 8 * path.stat().st_size, FLIPS // 4).tolist():
        back = flipped(path, bit)
        if not refused_or_equal(store, wanted):  # moments: no value of a row depends on them
            with suppress(StoreError):
                assert verify(open_store(store.root, store.spec)).problems
        back()


def flip_in_a_child(folder: Path, codec: str, every: int, num_patches: int) -> dict[str, dict]:
    """Flip bits in a process of their own: what ends it fails here, and nothing else does."""
    memory = Path("/dev/shm")  # a file system in memory: no disk is waited for
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else folder) as root:
        run = subprocess.run(
            [sys.executable, FLIPS_CHILD, root, codec, str(every), str(num_patches)],
            capture_output=True,
            text=True,
            timeout=3000,
        )
    assert run.returncode == 0, run.stderr
    found: dict[str, dict] = json.loads(run.stdout)
    assert {kind: counts["unseen"] for kind, counts in found.items() if counts["unseen"]} == {}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "rot4", "grid2"])
def test_bits_of_every_kind_of_file_are_refused_or_found_by_verify(tmp_path, codec):
    found = flip_in_a_child(tmp_path, codec, 101, 200)
    assert all(counts["bits"] >= 5 for counts in found.values())
    tables = ("samples", "hashes", "sources", "dropped", "samples HEAD", "manifest", "rows")
    assert ("codec" in found) == (codec == "grid2")
    for kind in (*tables, "manifest HEAD", "spec", "index", *({"codec"} & found.keys())):
        assert found[kind]["refused"] == found[kind]["bits"], kind  # no verify is needed


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_bits_of_small_files_and_of_patches_are(tmp_path):
    """EUPE_FLIP_EVERY=1 takes every bit of the small files and 10,000 of patches, ten minutes."""
    every = int(os.environ.get("EUPE_FLIP_EVERY", "17"))
    found = flip_in_a_child(tmp_path, "rot4", every, 10_000 // every)
    assert found["patches"]["bits"] == 10_000 // every
    assert sum(counts["bits"] for counts in found.values()) > 100_000 // every


def test_two_shards_that_changed_places_are_refused(store):
    paths = [layout.patches_file(store.directory, view, 0) for view in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    assert len(contents[0]) == len(contents[1])
    assert contents[0] != contents[1]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content)
    opened = open_store(store.root, store.spec)
    with pytest.raises(Corrupt, match=r"c\.0\.0\.0: row 0 of the shard .* exchanged"):
        Reader(opened, range(2)).select([0]).patches()
    for deep in (True, False):
        problems = verify(opened, deep).problems
        assert {problem.path for problem in problems} == set(paths)


@pytest.mark.parametrize("access", ["map", "read"])
def test_a_shard_of_other_valid_rows_is_refused_whichever_row_is_read(tmp_path, access):
    """The row read is absent in the file that is there: it holds nothing to be compared."""
    toys = [Toy(tmp_path / bad, bad={f"a/{bad}": "no image"}) for bad in ("001", "002")]
    for toy in toys:
        toy.add_samples(ids(4))
    one, two = (toy.build(num_views=1) for toy in toys)
    path = layout.patches_file(one.directory, 0, 0)
    content = layout.patches_file(two.directory, 0, 0).read_bytes()
    assert len(content) == path.stat().st_size
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="not the valid rows of its table: the file was exchanged"):
        Reader(one, access=access).select([2]).patches()


def test_two_tables_of_rows_that_changed_places_are_refused(store):
    paths = [layout.rows_file(store.directory, view, 0) for view in (0, 1)]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, reversed(contents), strict=True):
        path.write_bytes(content.ljust(len(contents[0]), b"\0"))
    with pytest.raises(Corrupt, match="rows-00000000"):
        _ = Reader(open_store(store.root, store.spec), range(2)).select([0]).summaries


def test_a_row_is_checked_when_it_is_first_touched_and_then_no_more(store):
    reader = Reader(open_store(store.root, store.spec), range(2))
    reader.select([0, 2]).patches()
    path = layout.patches_file(store.directory, 0, 0)
    row_bytes = store.row_bytes
    with path.open("r+b") as file:  # in place: the map sees it
        for slot in (0, 2):  # rows 0 and 3; row 1 is not stored
            file.seek(slot * zarr_shard.stored_bytes(row_bytes))
            file.write(b"\xff\xfe")
    reader.select([0]).patches()
    with pytest.raises(Corrupt, match="row 3 of the shard"):
        reader.select([3]).patches()


def test_a_shard_that_is_checked_whole_reads_the_plain_way(store):
    reader = Reader(open_store(store.root, store.spec), range(2))
    shard = reader._patches.get(0, 0)
    first = shard.row
    reader.select(np.arange(4)).patches()
    assert shard.row is not first


def test_outside_readers_check_rows_too(store):
    array = layout.view_directory(store.directory, 0)
    flipped(layout.patches_file(store.directory, 0, 0), 13)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_array(array, mode="r")[0]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
    with pytest.raises(ValueError, match="Digest mismatch"):
        tensorstore.open(spec).result()[0].read().result()


def test_the_table_of_rows_holds_what_the_shard_holds(store):
    reader = Reader(store, range(2))
    array = zarr.open_array(layout.view_directory(store.directory, 0), mode="r")
    raw = layout.patches_file(store.directory, 0, 0).read_bytes()
    row_bytes = store.row_bytes
    sums = checksums(reader.table(0, 0).table)
    assert array.shape[0] == 7
    assert GRID
    for slot, row in enumerate((0, 2, 3)):
        end = slot * zarr_shard.stored_bytes(row_bytes) + row_bytes
        assert int.from_bytes(raw[end : end + 4], "little") == sums[row]
    assert sums[1] == 0


def test_a_bit_of_the_sample_table_ends_no_process_and_changes_no_label(store):
    for path, _ in segment_files(store.root, DATASET.name):
        back = flipped(path, 8 * (path.stat().st_size // 2))
        samples = Samples.open(store.root, DATASET.name)
        with pytest.raises(Corrupt, match="do not match the recorded sha256"):
            samples.rows_of(["a/001"])
        back()
    assert Samples.open(store.root, DATASET.name).rows_of(["a/001"]).tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c.0.0.0", "rows-00000000", "-samples-"])
@pytest.mark.parametrize("damage", ["a bit", "cut"])
def test_a_damaged_copy_in_a_mirror_is_fetched_again(s3, tmp_path, kind, damage):
    root = f"s3://{NAME}/{tmp_path.name}"
    toy = Toy(root, bad={"a/001": "no image"})
    toy.add_samples(ids(7))
    store = toy.build()
    wanted = all_values(store)
    copies = [path for path in Path(os.environ["EUPE_MIRROR"]).rglob(f"*{kind}*") if path.is_file()]
    assert copies
    for copy in copies:
        if damage == "a bit":
            flipped(copy, 8 * 3)
        else:
            os.truncate(copy, copy.stat().st_size // 2)
    assert not refused_or_equal(store, wanted)


@pytest.mark.slow
def test_a_copy_that_somebody_else_has_mended_meanwhile_is_opened_again(s3, tmp_path):
    toy = Toy(f"s3://{NAME}/{tmp_path.name}")
    toy.add_samples(ids(7))
    store = toy.build()
    wanted = Reader(store, [0]).select([0]).patches()
    (copy,) = Path(os.environ["EUPE_MIRROR"]).rglob("*-c.0.0.0")
    sound = copy.read_bytes()
    flipped(copy, 8 * 3)
    reader = Reader(open_store(store.root, store.spec), [0])
    reader._patches.get(0, 0)  # maps the damaged copy
    (tmp_path / "sound").write_bytes(sound)
    os.replace(tmp_path / "sound", copy)
    np.testing.assert_array_equal(reader.select([0]).patches(), wanted)

    seen: list[Path] = []

    def use(local: Path) -> bytes:
        seen.append(local)
        if len(seen) == 1:
            raise Corrupt("as it was before")
        return local.read_bytes()

    path = layout.patches_file(store.directory, 0, 0)
    assert place.using(path, use, len(sound), hashlib.sha256(sound).hexdigest()) == sound
    assert len(seen) == 2


@pytest.mark.slow
def test_an_object_that_is_damaged_itself_is_refused(s3, tmp_path):
    root = f"s3://{NAME}/{tmp_path.name}"
    toy = Toy(root)
    toy.add_samples(ids(7))
    store = toy.build()
    path = layout.patches_file(store.directory, 0, 0)
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    changed = tmp_path / "changed"
    changed.write_bytes(content)
    bucket.send(changed, path)
    with pytest.raises(Corrupt, match=r"c\.0\.0\.0"):
        Reader(open_store(store.root, store.spec), range(2)).select([0]).patches()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    toy = Toy(tmp_path / "root")
    toy.add_samples(ids(7))
    scratch = layout.samples_directory(tmp_path / "root", DATASET.name) / ".tmp"
    (scratch / "LOCK").unlink()
    (scratch / "LOCK").mkdir()  # no file can be opened under that name, by root neither
    toy.add_samples([])  # nothing to add: no lock is wanted
    with pytest.raises(StoreError, match=r"samples: cannot be written: Is a directory"):
        toy.add_samples(ids(1, "b"))
