"""The manifest's sorted runs: what is committed, in whatever order, is found at every version."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import runs
from cache.errors import Corrupt
from cache.format import record_table
from cache.format.record_table import SCHEMA, ShardRecord, records_of, table_of
from cache.heads import files
from cache.manifest import Manifest, ManifestHead
from cache.runs import MERGE_AT, Runs

Oracle = list[dict[tuple[int, int], ShardRecord]]
"""Version -> what exists then."""


def record(view: int, shard: int, number: int = 0) -> ShardRecord:
    """A record whose digests tell its number."""
    return ShardRecord(
        view=view,
        shard=shard,
        start=4 * shard,
        stop=4 * shard + 4,
        num_valid=3,
        num_escapes=number,
        samples_digest=f"{shard:064x}",
        patches_bytes=1 << 33,
        patches_sha256=f"{number:064x}",
        rows_bytes=1 << 20,
        rows_sha256=f"{number + 1:064x}",
        provenance=f'{{"device":"cpu {number % 3}"}}',
    )


def created(directory: Path) -> Manifest:
    """An empty manifest."""
    pins = {"spec_sha256": "a" * 64, "moments_sha256": "b" * 64}
    Manifest.create(directory, ManifestHead(**pins, provenance={}))
    return Manifest.open(directory)


def built(directory: Path, commits: list[list[tuple[int, int]]]) -> tuple[Manifest, Oracle]:
    """Commit records of (view, shard), and what is to be found at each version."""
    manifest, oracle, number = created(directory), [{}], 0
    for keys in commits:
        made = []
        for key in keys:
            number += 1
            made.append(record(*key, number))
        manifest.commit(made)
        oracle.append({**oracle[-1], **{(each.view, each.shard): each for each in made}})
    return manifest, oracle


def check(manifest: Manifest, oracle: Oracle) -> None:
    """Compare all that a manifest says with what was committed."""
    assert manifest.version == len(oracle) - 1
    for version, there in enumerate(oracle):
        assert list(manifest.records(version)) == [there[key] for key in sorted(there)]
        assert {view: own.num_shards for view, own in manifest.totals(version).items()} == {
            view: sum(key[0] == view for key in there) for view in sorted({key[0] for key in there})
        }
    for version in {0, len(oracle) // 2, len(oracle) - 1}:
        for view in range(-1, 4):
            for shard in range(-1, 13):
                found = manifest.find(view, shard, version)
                assert found == oracle[version].get((view, shard))
                since = (later.get((view, shard)) for later in oracle[version:])
                first = next((each for each in since if each is not None), None)
                assert manifest.find_since(view, shard, version) == first
            own = [each for key, each in sorted(oracle[version].items()) if key[0] == view]
            tables = manifest.tables(version, range(view, view + 1))
            assert [each for table in tables for each in records_of(table)] == own


keys = st.tuples(st.integers(0, 3), st.integers(0, 12))


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.lists(keys, min_size=1, max_size=6, unique=True), max_size=30), st.integers(1, 7)
)
def test_what_was_committed_is_found_at_every_version(tmp_path_factory, commits, part_records):
    before = runs.PART_RECORDS
    runs.PART_RECORDS = part_records
    try:
        manifest, oracle = built(tmp_path_factory.mktemp("store"), commits)
        check(manifest, oracle)
        check(Manifest.open(manifest.directory.parent), oracle)
    finally:
        runs.PART_RECORDS = before


def test_records_come_back_as_they_were(tmp_path):
    given_records = [record(0, 7, 5), record(1, 2**31 - 2, 2**31 - 1)]
    assert records_of(table_of(given_records, [3, 4])) == given_records
    assert table_of(given_records, [3, 4]).schema == SCHEMA


@pytest.mark.slow
def test_commits_are_merged_into_few_runs_of_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PART_RECORDS", 50)
    order = np.random.default_rng(0).permutation(1000).tolist()
    manifest, oracle = built(tmp_path, [[(0, shard)] for shard in order])
    parts = manifest.head.segments
    assert len({part.run for part in parts}) <= (MERGE_AT - 1) * 4  # log 8 of 1000, rounded up
    assert len(parts) <= 1000 / 50 + 4 * MERGE_AT
    assert max(part.rows for part in parts) <= 50
    assert {path.name for path in manifest.directory.glob("*.arrow")} == {p.name for p in parts}
    assert list(manifest.records()) == [oracle[-1][0, shard] for shard in range(1000)]


def test_provenance_is_stored_once_a_part(tmp_path):
    manifest, _ = built(tmp_path, [[(0, shard) for shard in range(100)]])
    ((path, _),) = files(manifest.directory, manifest.head)
    dictionary = pa.ipc.open_file(path).read_all()["provenance"].chunk(0).dictionary
    assert len(dictionary) == 3


def test_only_what_is_asked_for_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PART_RECORDS", 10)
    manifest, oracle = built(tmp_path, [[(0, shard) for shard in range(100)]])
    first, last = manifest.head.segments[0], manifest.head.segments[-1]
    path = manifest.directory / last.name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opened = Manifest.open(tmp_path)
    assert opened.find(0, first.first[1]) == oracle[-1][first.first]
    with pytest.raises(Corrupt, match=f"{last.name}: contents do not match the recorded sha256"):
        opened.find(0, 99)
    with pytest.raises(Corrupt, match=last.name):
        list(opened.records())


def test_a_stream_goes_on_where_parts_were_merged_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PART_RECORDS", 5)
    manifest, oracle = built(tmp_path, [[(0, 10 * n + k) for k in range(10)] for n in range(6)])
    stream = Manifest.open(tmp_path).tables(version=6)
    shards = next(stream)["shard"].to_pylist()
    manifest.commit([record(0, 900), *(record(0, 100 + n) for n in range(9))])
    manifest.commit([record(1, n) for n in range(10)])  # the eighth run: all become one
    assert len({part.run for part in manifest.head.segments}) == 1
    shards += [shard for table in stream for shard in table["shard"].to_pylist()]
    assert shards == [shard for _, shard in sorted(oracle[-1])]


def test_a_stream_holds_about_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "PART_RECORDS", 20)
    order = np.random.default_rng(1).permutation(500).tolist()
    manifest, _ = built(tmp_path, [[(0, s) for s in order[n : n + 10]] for n in range(0, 500, 10)])
    most = max(table.num_rows for table in manifest.tables())
    assert most <= 20 * len({part.run for part in manifest.head.segments})
    joined = []
    monkeypatch.setattr(
        runs, "joined", lambda t: joined.append(sum(map(len, t))) or record_table.joined(t)
    )
    Runs(manifest.directory, manifest.head.segments).appended(
        table_of([record(2, n) for n in range(1000)], [51] * 1000), 51, tmp_path
    )
    assert max(joined[:-1]) <= 20 * MERGE_AT


def test_the_latest_of_two_records_in_one_commit_holds(tmp_path):
    manifest = created(tmp_path)
    manifest.commit([record(0, 3, 1), record(0, 3, 2)])
    assert manifest.find(0, 3) == record(0, 3, 2)
    assert list(manifest.records()) == [record(0, 3, 2)]


def test_a_version_that_is_not_there_is_refused(tmp_path):
    manifest, _ = built(tmp_path, [[(0, 0)]])
    for version in (-1, 2):
        with pytest.raises(ValueError, match=rf"version = {version}: .* has 0 to 1"):
            manifest.find(0, 0, version)
