"""Builders and readers beside each other: who creates a store, what the others see meanwhile."""

import os
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from support import bucket_server
from support.bucket_server import Bucket
from support.toy_stores import (
    DATASET,
    PATCH_DIM,
    SUMMARY_DIM,
    Toy,
    ids,
    moments,
    sample_table,
    store_spec,
)

from cache import samples, store
from cache.errors import Corrupt, MissingSamples
from cache.files import atomic, place
from cache.files.bucket_path import BucketPath
from cache.files.mirror import HINT_THREADS
from cache.files.mirror_space import FOLDER_VARIABLE
from cache.format import layout
from cache.format.sample_table import HASHES, id_hashes
from cache.manifest import Manifest
from cache.reader import Reader
from cache.samples import Samples
from cache.store import create_store
from cache.verify import verify

WAIT_SECONDS = 60


def measured(mean: float) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Return moments whose means tell who measured them."""
    made = {"summary": moments(SUMMARY_DIM), "patches": moments(PATCH_DIM)}
    return {kind: (count, at + mean, scatter) for kind, (count, at, scatter) in made.items()}


@pytest.fixture
def bucket_root(s3: Bucket, request) -> BucketPath:
    path = place.root(f"s3://{bucket_server.NAME}/{request.node.name}")
    assert isinstance(path, BucketPath)
    return path


@pytest.mark.parametrize("codec", ["float16", "rot4"])
def test_of_two_builders_that_create_a_store_at_once_the_first_one_counts(
    tmp_path, monkeypatch, codec
):
    Toy(tmp_path).add_samples(ids(5))
    spec, others = store_spec(codec), []
    create = Manifest.create

    def slowly(directory, pinned):
        """Write the first HEAD while another builder is at the same point."""
        if not others:
            others.append(
                threading.Thread(target=create_store, args=(tmp_path, spec, measured(2), {}))
            )
            others[0].start()
            time.sleep(0.3)
        return create(directory, pinned)

    monkeypatch.setattr(store.Manifest, "create", slowly)
    made = create_store(tmp_path, spec, measured(1), {})
    others[0].join(WAIT_SECONDS)
    for each in (made, create_store(tmp_path, spec, measured(3), {})):
        assert each.moments()["patches"][1].tolist() == [1.0] * PATCH_DIM
        assert each.codec.name == codec
    assert not verify(made).problems


@pytest.mark.parametrize("codec", ["float16", "rot4"])
def test_a_bucket_keeps_the_moments_of_the_builder_that_was_first(
    bucket_root, monkeypatch, codec, tmp_path
):
    Toy(bucket_root).add_samples(ids(5))
    spec, overtaken = store_spec(codec), []
    create = Manifest.create

    def after_another_machine(directory, pinned):
        if not overtaken:
            overtaken.append(True)
            monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "another machine"))  # and locks
            create_store(bucket_root, spec, measured(2), {})
        return create(directory, pinned)

    monkeypatch.setattr(store.Manifest, "create", after_another_machine)
    made = create_store(bucket_root, spec, measured(1), {})
    assert overtaken
    assert made.moments()["patches"][1].tolist() == [1.0] * PATCH_DIM  # written first, kept by both
    assert made.codec.name == codec
    assert not verify(made).problems


def test_moments_of_another_store_are_refused(tmp_path):
    Toy(tmp_path).add_samples(ids(5))
    first = create_store(tmp_path, store_spec(), measured(1), {})
    other = create_store(tmp_path, store_spec("float32"), measured(2), {})
    layout.moments_file(first.directory).write_bytes(
        layout.moments_file(other.directory).read_bytes()
    )
    with pytest.raises(Corrupt, match="do not match the recorded sha256"):
        first.moments()


def test_what_was_added_and_built_since_a_store_was_opened_is_not_there_yet(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(5))
    opened = toy.build()
    assert len(opened.samples) == 5
    toy.add_samples([*ids(5), *ids(3, "b")])
    grown = toy.build()
    reader = Reader(opened, range(2))
    assert len(reader) == 5
    np.testing.assert_array_equal(
        reader.select([0, 4]).patches(), Reader(grown, range(2)).select([0, 4]).patches()
    )
    with pytest.raises(MissingSamples, match="row 8 holds no sample"):
        reader.select([8]).patches()
    report = verify(opened)  # looks at what is there now
    assert (report.problems, report.num_rows) == ([], 16)


def test_a_large_table_of_samples_becomes_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SEGMENT_ROWS", 10)
    whole = Samples.append(tmp_path / "whole", DATASET, sample_table(ids(23)), 4)
    monkeypatch.setattr(samples, "SEGMENT_ROWS", 1000)
    plain = Samples.append(tmp_path / "plain", DATASET, sample_table(ids(23)), 4)
    assert len(samples.segment_files(tmp_path / "whole", "toy")) == 6  # of 8, 8 and 7 rows
    assert whole.table.equals(plain.table)
    assert whole.shards() == plain.shards()
    rows = np.random.default_rng(0).permutation(23)
    assert whole.take(rows).equals(plain.take(rows))
    assert whole.take([]).equals(plain.take([]))
    assert whole.rows_of(ids(23)[::-1]).tolist() == list(range(23))[::-1]


def test_a_segment_that_is_added_reads_no_earlier_ones_hashes_again(tmp_path, monkeypatch):
    """In the order of hashes, as indexing adds them: once each in a process."""
    read = Counter[str]()
    mapped = samples.map_segment

    def counted(directory, segment, schema):
        read[segment.name] += schema is HASHES
        return mapped(directory, segment, schema)

    monkeypatch.setattr(samples, "map_segment", counted)
    table = sample_table(ids(64))
    table = table[np.argsort(id_hashes(DATASET.name, table["sample_id"].to_arrow()))]
    for first in range(0, 64, 4):
        grown = Samples.append(tmp_path, DATASET, table.slice(first, 4), 4)
    assert len(grown.starts) == 16
    assert max(read.values()) == 1
    assert grown.rows_of(table["sample_id"].to_list()).tolist() == list(range(64))
    assert grown.find(pa.array(["absent"], pa.string())).tolist() == [-1]
    assert grown.find(pa.array([], pa.string())).tolist() == []


# --------------------------------------------------------------------------------- temporary files


def test_no_two_temporary_files_have_one_name_whoever_has_the_pid():
    assert len({atomic.temporary_name("0") for _ in range(1000)}) == 1000


def test_only_files_of_writers_that_are_gone_are_swept(tmp_path):
    mine, dead = atomic.temporary_name("0"), atomic.temporary_name("0")
    dead = dead.replace(f"~{os.getpid()}~", "~4194305~")  # above the highest pid there can be
    foreign, forgotten = (f"other-1~{os.getpid()}~{n}~0" for n in range(2))
    for name in (mine, dead, foreign, forgotten, "LOCK"):
        (tmp_path / name).touch()
    old = time.time() - atomic.ABANDONED_SECONDS - 1
    os.utime(tmp_path / forgotten, (old, old))
    os.utime(tmp_path / "LOCK", (old, old))
    assert atomic.sweep(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {mine, foreign, "LOCK"}


# ------------------------------------------------------------------------------------------ mirror

NUM_HINTED = 8 * HINT_THREADS  # a busy machine may need some seconds to leave: 8 fetches each
HINTING = """
import sys
from cache.files import place
root = place.root(sys.argv[1])
place.will_need((root / str(n), None, "0" * 64) for n in range(int(sys.argv[2])))
print("hinted", flush=True)
"""


def test_a_process_that_hinted_much_ends_without_fetching_it_all(s3, bucket_root, tmp_path):
    s3.behave(throttle=lambda request: True)  # every fetch is tried again for a while
    started = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", HINTING, str(bucket_root), str(NUM_HINTED)],
        env={
            **os.environ,
            FOLDER_VARIABLE: str(tmp_path / "mirror"),
            "EUPE_BUCKET_RETRY_SECONDS": "1",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_SECONDS,
    )
    assert run.stdout == "hinted\n"
    asked = {request.key for request in s3.requests}
    s3.behave()
    assert len(asked) <= NUM_HINTED // 2, time.monotonic() - started


def test_an_object_opens_for_reading_bytes_and_nothing_else(bucket_root):
    with pytest.raises(ValueError, match="'rb' only"):
        (bucket_root / "name").open("w")
    with pytest.raises(ValueError, match="'rb' only"):
        (bucket_root / "name").read_text()
