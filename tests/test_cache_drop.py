"""A sample that was taken out is in no store, and does not come back; others stay equal."""

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from support.bucket_server import NAME
from support.toy_stores import DATASET, Toy, features, files_under, ids

from cache import dropping
from cache.errors import Corrupt, MissingSamples, StoreError
from cache.files import place
from cache.format import layout
from cache.reader import Reader
from cache.repair import repair_root
from cache.samples import segment_files
from cache.verify import unseen, verify, verify_root

VIEWS = 2
GONE = ["a/002", "b/000", "a/004"]
"""The last one has no features: it escapes the codec, say."""
CODECS = ["float16", "rot4"]
MEMORY = Path("/dev/shm")
OPERATIONS = ("open", "write", "fsync", "link", "replace", "mkdir", "unlink")


def toys(root: Path) -> list[Toy]:
    """Two stores of a dataset that has grown once; one row has no features."""
    bad = {"a/004": "no image"}
    both = [Toy(root, codec, bad) for codec in CODECS]
    both[0].add_samples(ids(6))
    both[0].add_samples(ids(6) + ids(3, "b"))
    for toy in both:
        toy.build(VIEWS)
    return both


def never_seen(root: Path) -> dict[str, bytes]:
    """Build a root that is told to leave the samples out before it has a store."""
    first = Toy(root)
    first.add_samples(ids(6))
    first.add_samples(ids(6) + ids(3, "b"))
    dropping.listed(root, DATASET.name, GONE)
    for toy in (Toy(root, codec) for codec in CODECS):
        toy.build(VIEWS)
    return files_under(root)


def values(toy: Toy) -> list[np.ndarray]:
    reader = Reader(toy.store(), range(VIEWS))
    rows = [0, 1, 2, 3, 4, 5, 8, 9, 10]
    found = [reader.select(rows, view) for view in range(VIEWS)]
    return [a for each in found for a in (each.patches(), each.summaries, each.valid)]


def test_what_is_left_is_what_a_build_gives_that_has_never_seen_them(tmp_path):
    root = tmp_path / "root"
    both = toys(root)
    before = [values(toy) for toy in both]
    done = dropping.drop(root, DATASET.name, GONE)
    assert (done.num_samples, done.num_shards, done.num_rows) == (3, 2 * 2 * 3, 2 * 2 * 2)
    assert files_under(root) == never_seen(tmp_path / "other")
    rows_left = np.array([True, True, False, True, False, True, False, True, True])
    for toy, old in zip(both, before, strict=True):
        assert verify(toy.store()).problems == []
        for was, now in zip(old, values(toy), strict=True):
            np.testing.assert_array_equal(now[rows_left], was[rows_left])
        selected = Reader(toy.store(), range(VIEWS)).select([2, 4, 8], 1)
        assert selected.reasons == ["dropped"] * 3
        assert not selected.valid.any()
        assert np.isnan(selected.summaries).all()


def test_no_file_holds_a_byte_of_them(tmp_path):
    (toy, _) = toys(tmp_path)
    patches, summary = features(GONE[0], 1)
    encoded = toy.store().codec.encode(patches[None]).data.tobytes()
    traces = [encoded, summary.tobytes(), f"canvas of {GONE[0]} 1".encode()]

    def found() -> list[bool]:
        contents = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
        return [any(trace in content for content in contents) for trace in traces]

    assert found() == [True] * 3
    dropping.drop(tmp_path, DATASET.name, GONE)
    assert found() == [False] * 3


def test_they_do_not_come_back(tmp_path):
    (toy, _) = toys(tmp_path)
    dropping.drop(tmp_path, DATASET.name, GONE[:1])
    samples = toy.add_samples(ids(6) + ids(3, "b") + ids(2, "c"))
    assert len(samples) == 11
    assert samples.dropped.tolist() == [2]
    assert samples.take([1, 2])["uri"].is_null().to_list() == [False, True]
    assert samples.shard(0)["uri"].is_null().to_list() == [False, False, True, False]
    assert samples.at(np.array([2, 3]))["uri"].is_null().to_list() == [True, False]
    toy.build(VIEWS)
    assert verify(toy.store()).problems == []
    before = files_under(tmp_path)
    assert dropping.drop(tmp_path, DATASET.name, GONE[:1]) == dropping.Dropped(1, 0, 0)
    assert files_under(tmp_path) == before
    assert dropping.drop(tmp_path, DATASET.name, ["c/001"]).num_samples == 2
    assert toy.store().samples.dropped.tolist() == [2, 13]


def test_a_builder_that_began_before_is_found(tmp_path):
    (toy, _) = toys(tmp_path)
    store = toy.store()
    assert not len(store.samples.dropped)  # read, as by a builder at work
    dropping.drop(tmp_path, DATASET.name, GONE)
    store.commit([toy.write(store, 0, store.samples.shard_range(0))])
    (problem,) = verify(toy.store()).problems
    assert "holds samples that were taken out; `eupe cache drop` them again" in str(problem)
    assert dropping.drop(tmp_path, DATASET.name, GONE).num_shards == 1
    assert verify(toy.store()).problems == []


def test_a_run_pinned_to_before_is_told_so_and_reads_other_shards(tmp_path):
    (toy, _) = toys(tmp_path)
    pinned = Reader(toy.store(), range(VIEWS))
    before = pinned.version
    dropping.drop(tmp_path, DATASET.name, GONE[1:2])
    pinned = Reader(toy.store(), range(VIEWS), before)
    assert pinned.select([0, 1, 2, 3]).valid.all()
    with pytest.raises(StoreError, match=f"built anew.*since manifest version {before}, to which"):
        pinned.select([9]).patches()


def test_an_id_that_is_not_there_is_named_and_nothing_is_changed(tmp_path):
    toys(tmp_path)
    before = files_under(tmp_path)
    with pytest.raises(MissingSamples, match="no sample 'a/999'"):
        dropping.drop(tmp_path, DATASET.name, ["a/002", "a/999"])
    assert files_under(tmp_path) == before


def test_a_damaged_shard_is_named_and_the_others_are_done(tmp_path):
    (toy, other) = toys(tmp_path)
    path = layout.patches_file(toy.store().directory, 0, 0)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt, match=f"{path}: .*`eupe cache repair --yes` deletes such shards"):
        dropping.drop(tmp_path, DATASET.name, GONE)
    assert verify(other.store()).problems == []
    assert [
        str(mended.mended[0].path) for _, mended in repair_root(tmp_path, True) if mended.mended
    ]
    toy.build(VIEWS)
    assert verify(toy.store()).problems == []


@pytest.mark.parametrize("name", ["HEAD*", "*.arrow", "HEAD"])
def test_a_damaged_list_of_them_is_mended_and_none_comes_back(tmp_path, name):
    """From other lists, or from what the stores say of their rows."""
    (toy, _) = toys(tmp_path)
    dropping.drop(tmp_path, DATASET.name, GONE)
    samples = toy.store().samples
    before = files_under(tmp_path)
    listed = [path for path, _ in segment_files(tmp_path, DATASET.name)][-1]
    for path in [listed] if name == "*.arrow" else samples.directory.glob(name):
        path.write_bytes(b"")
    assert next(report.problems for _, report in verify_root(tmp_path, True, unseen))
    assert not [lost for _, mended in repair_root(tmp_path, True) for lost in mended.lost]
    assert toy.store().samples.dropped.tolist() == [2, 4, 8]
    assert verify(toy.store()).problems == []
    after = files_under(tmp_path)
    assert {n: c for n, c in after.items() if "samples" not in n} == {
        n: c for n, c in before.items() if "samples" not in n
    }


@pytest.mark.slow
def test_a_root_in_a_bucket(s3, tmp_path):
    root = place.root(f"s3://{NAME}/{tmp_path.name}")
    both = toys(root)
    dropping.drop(root, DATASET.name, GONE)
    local = never_seen(tmp_path / "other")
    for path, _ in root.files_below():
        name = "/".join(path.parts[len(root.parts) :])
        if "manifest" not in name and "samples" not in name:
            assert path.read_bytes() == local[name], name
    assert [verify(toy.store()).problems for toy in both] == [[], []]


class Killed(BaseException):
    """The process is gone: nothing that it would still do happens."""


@pytest.mark.slow
def test_killed_anywhere_it_goes_on(monkeypatch):
    """Or, killed between a shard's two files, repair and a build end it."""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        whole, clean = Path(folder, "whole"), Path(folder, "clean")
        for root in (whole, clean):
            Toy(root).add_samples(ids(6))
        dropping.listed(clean, DATASET.name, GONE[:1])
        for root in (whole, clean):
            Toy(root, "rot4").build(num_views=1)
        for number in range(1, 1000):
            root = Path(folder, f"killed-{number}")
            shutil.copytree(whole, root)
            ended = not killed(root, number, monkeypatch)
            toy = Toy(root, "rot4")
            try:
                dropping.drop(root, DATASET.name, GONE[:1])
            except Corrupt:
                assert not [lost for _, mended in repair_root(root, True) for lost in mended.lost]
                toy.build(num_views=1)
            assert files_under(root) == files_under(clean), number
            assert verify(toy.store()).problems == []
            shutil.rmtree(root)
            if ended:
                assert number > 30
                return


def killed(root: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Drop, and die at that file operation; False if there were fewer."""
    done = 0

    def dying(real):
        def operation(*args, **kwargs):
            nonlocal done
            done += 1
            if done >= number:
                raise Killed
            return real(*args, **kwargs)

        return operation

    with monkeypatch.context() as patched:
        for name in OPERATIONS:
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            dropping.drop(root, DATASET.name, GONE[:1])
        except Killed:
            return True
    return False
