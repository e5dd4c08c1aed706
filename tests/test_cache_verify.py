"""Verify finds any flipped bit, any missing or cut file, and names it."""

import numpy as np
import pytest
from support.toy_stores import Toy, ids

from cache.errors import Corrupt
from cache.format import layout
from cache.reader import Reader
from cache.samples import segment_files
from cache.store import Store
from cache.verify import unseen, verify, verify_root

LENGTH = b'"shape": [\n    '


@pytest.fixture
def store(tmp_path):
    toy = Toy(tmp_path, bad={"a/001": "no image"})
    toy.add_samples(ids(6))
    return toy.build(num_views=2)


def test_a_sound_store_has_no_problems(store):
    seen = []
    report = verify(store, progress=lambda done, total: seen.append((done, total)))
    assert report.problems == []
    assert (report.num_shards, report.num_rows, report.num_invalid) == (4, 12, 2)
    assert seen == [(n, 4) for n in range(1, 5)]
    committed = [path for path in store.directory.rglob("*") if path.is_file()]
    unpinned = sum(
        p.stat().st_size
        for p in committed
        if p.name.startswith("HEAD") or p.name in ("zarr.json", "LOCK")
    )
    samples = sum(p.stat().st_size for p in store.samples.directory.glob("*.arrow"))
    total = sum(p.stat().st_size for p in committed)
    assert report.num_bytes == total - unpinned + samples


def test_a_flipped_bit_anywhere_is_found(store):
    rng = np.random.default_rng(0)
    files = [
        layout.patches_file(store.directory, 1, 0),
        layout.rows_file(store.directory, 0, 1),
        layout.moments_file(store.directory),
        layout.spec_file(store.directory),
        *(path for path, _ in store.manifest().segment_files[:1]),
        *(path for path, _ in segment_files(store.root, "toy")),
    ]
    for path in files:
        good = path.read_bytes()
        for place in rng.integers(0, len(good), 3).tolist():
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            problems = verify(Store(store.root, store.spec, store.manifest())).problems
            assert [problem.path for problem in problems] == [path], place
        path.write_bytes(good)
    assert verify(store).problems == []


def test_missing_and_cut_files_are_named(store):
    patches = layout.patches_file(store.directory, 0, 0)
    rows = layout.rows_file(store.directory, 1, 1)
    patches.unlink()
    rows.write_bytes(rows.read_bytes()[:-8])
    found = {str(problem.path): problem.what for problem in verify(store, deep=False).problems}
    assert found[str(patches)] == "missing"
    assert "its record says" in found[str(rows)]
    assert len(found) == 2


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda content: None, "missing"),
        (lambda content: content[:-9], "no metadata of an array"),
        (lambda content: content.replace(b'"float16"', b'"float32"'), "describes another array"),
        (lambda content: content.replace(LENGTH + b"6", LENGTH + b"5"), "5 rows; 6 are committed"),
        (lambda content: content.replace(LENGTH + b"6", LENGTH + b"7"), "the dataset has 6"),
    ],
)
def test_what_outside_readers_see_is_checked_and_mended(store, change, what):
    path = layout.zarr_file(store.directory, 1)
    good = path.read_bytes()
    changed = change(good)
    path.unlink()
    if changed is not None:
        assert changed != good
        path.write_bytes(changed)
    (problem,) = verify(store, deep=False).problems
    assert problem.path == path
    assert what in problem.what
    assert not store.todo(2)  # so a build commits nothing, and mends
    store.mend_metadata()
    assert path.read_bytes() == good
    assert verify(store).problems == []


def test_a_dataset_that_has_grown_leaves_its_stores_sound(store):
    Toy(store.root).add_samples(ids(3, "b"))
    assert verify(Toy(store.root).store()).problems == []


def test_a_swapped_shard_is_found_even_without_checksums(store):
    """Two shards exchanged: every file is whole, the ids are not those of the rows."""
    one, two = (layout.rows_file(store.directory, view, 0) for view in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert {problem.path for problem in verify(store).problems} == {one, two}


@pytest.mark.parametrize(
    ("file", "read"),
    [
        (layout.patches_file, lambda selected: selected.patches()),
        (layout.rows_file, lambda selected: selected.summaries),
    ],
)
def test_a_damaged_file_of_the_right_size_says_what_helps(tmp_path, file, read):
    """A build looks at sizes, so `build again` alone would find nothing to do, each time."""
    toy = Toy(tmp_path)
    toy.add_samples(ids(6))
    store = toy.build(num_views=1)
    path = file(store.directory, 0, 1)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Corrupt, match=rf"^{path}: .*; delete the file and build again$"):
        read(Reader(store).select([4]))
    (problem,) = verify(store).problems
    assert problem.what.endswith("; delete the file and build again")
    path.unlink()
    assert verify(toy.build(num_views=1)).problems == []


def test_a_damaged_manifest_is_refused_by_readers(store):
    path, _ = store.manifest().segment_files[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt, match="do not match the recorded sha256"):
        Reader(store)


def test_a_flipped_bit_in_the_index_is_found_without_reading_the_data(store):
    path = layout.patches_file(store.directory, 0, 0)
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    problems = verify(store, deep=False).problems
    assert [problem.path for problem in problems] == [path]
    assert "crc32c" in problems[0].what


def test_a_spec_that_is_none_any_more_keeps_no_other_store_from_being_checked(store):
    path = layout.spec_file(store.directory)
    path.write_bytes(path.read_bytes().replace(b'"patch_dim"', b'"patch_din"'))
    reports = dict(verify_root(store.root, True, unseen))
    (problem,) = reports.pop(str(store.spec.directory())).problems
    assert f"{path}: no store spec in it (" in problem.what
    assert [report.problems for report in reports.values()] == [[]]


def test_what_cannot_be_read_is_a_problem_of_its_file(store):
    path = layout.zarr_file(store.directory, 0)
    path.unlink()
    path.mkdir()
    (problem,) = verify(store, deep=False).problems
    assert str(problem) == f"{path}: cannot be read: Is a directory"
