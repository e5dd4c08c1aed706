"""What killed work has left is found and removed, and nothing else."""

import os
import time
from pathlib import Path

import pytest
from support.bucket_server import NAME
from support.toy_stores import DATASET, Toy, files_under, ids

from cache import orphans
from cache.files import atomic, place
from cache.format import layout
from cache.verify import verify

HOURS = 3600.0


@pytest.fixture(params=["disk", "bucket"])
def toy(request, tmp_path: Path) -> Toy:
    """A store of two views, with a part of a third shard in work."""
    if request.param == "bucket":
        request.getfixturevalue("s3")
        toy = Toy(place.root(f"s3://{NAME}/{tmp_path.name}"))
    else:
        toy = Toy(tmp_path / "root")
    toy.add_samples(ids(6))
    toy.build(num_views=2)
    return toy


def contents(toy: Toy) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path, _, _ in place.listing(toy.root)}


def test_a_sound_root_has_no_orphans(toy):
    assert orphans.find(toy.root, 0) == orphans.Found()


@pytest.mark.slow
def test_what_nothing_names_goes_and_nothing_else(toy):
    before = contents(toy)
    store = toy.store()
    scratch = layout.scratch_directory(store.directory)
    tables, segments = toy.store().samples.directory, layout.manifest_directory(store.directory)
    left = [
        layout.patches_file(store.directory, 0, 2),
        layout.rows_file(store.directory, 1, 7),
        layout.zarr_file(store.directory, 2),
        tables / "00000001-0123456789abcdef.arrow",
        segments / "00000001-0123456789abcdef.arrow",
        layout.spec_file(store.directory.with_name("64")),
        layout.moments_file(store.directory.with_name("64")),
    ]
    for path in left:
        atomic.write(path, [b"left"], scratch)
    killed = scratch / atomic.temporary_name("file").replace(f"~{os.getpid()}~", "~999999999~")
    killed.write_bytes(b"half")
    ours = scratch / atomic.temporary_name("file")
    ours.write_bytes(b"in work")
    assert [each.path for each in orphans.find(toy.root).orphans] == [killed]  # the rest is young
    found = orphans.find(toy.root, 0)
    assert found.untold == []
    assert sorted(str(each.path) for each in found.orphans if each.path != ours) == sorted(
        str(path) for path in (*left, killed)
    )
    assert {each.num_bytes for each in found.orphans if each.path not in (ours,)} == {4}
    assert not orphans.remove(found.orphans[0], HOURS)  # written to meanwhile
    for each in found.orphans:
        assert orphans.remove(each, 0)
    after = contents(toy)
    assert {path: after[path] for path in before} == before
    assert [path for path in after if path not in before and ".tmp" not in path.parts] == []
    assert verify(toy.store()).problems == []


def test_what_others_are_about_to_name_stays(tmp_path):
    """A shard that is written and not yet committed, hours after the others."""
    toy = Toy(tmp_path)
    toy.add_samples(ids(6))
    store = toy.store()
    (view, shard), *_ = store.todo(1)
    record = toy.write(store, view, shard)
    for path in tmp_path.rglob("*"):
        os.utime(path, (time.time() - 5 * HOURS,) * 2)
    assert len(orphans.find(tmp_path, 6 * HOURS).orphans) == 0
    assert len(orphans.find(tmp_path, 4 * HOURS).orphans) == 2
    store.commit([record])
    assert orphans.find(tmp_path, 4 * HOURS).orphans == []


@pytest.mark.parametrize("name", ["HEAD*", "*.arrow"])
def test_of_a_damaged_store_nothing_is_an_orphan(tmp_path, name):
    toy = Toy(tmp_path)
    toy.add_samples(ids(6))
    store = toy.build(num_views=1)
    other = Toy(tmp_path, codec="rot4").build(num_views=1)
    left = layout.patches_file(other.directory, 0, 2)
    left.write_bytes(b"left")
    for path in layout.manifest_directory(store.directory).glob(name):
        path.unlink()
    before = files_under(tmp_path)
    found = orphans.find(tmp_path, 0)
    assert [each.path for each in found.orphans] == [left]
    assert [problem.path for problem in found.untold] == [store.directory]
    for each in found.orphans:
        orphans.remove(each, 0)
    assert files_under(tmp_path) == {
        name: content for name, content in before.items() if content != b"left"
    }
    assert Toy(tmp_path).root.joinpath(DATASET.name).is_dir()
