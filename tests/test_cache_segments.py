"""Segments under a HEAD: what a damaged HEAD or segment says, and the bytes that stay."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from cache.errors import Corrupt, NotBuilt
from cache.heads import Head, commit, read_head
from cache.manifest import ManifestHead
from cache.samples import SamplesHead
from cache.segments import map_segment, write_segment

GOLDEN = Path(__file__).parent / "golden" / "cache_format_1"
TABLE = pa.table({"row": pa.array([1, 2, 3], pa.int64())})
PINNED = {"spec_sha256": "a" * 64, "moments_sha256": "b" * 64}


def put(directory, head):
    """Make a HEAD the first of a folder, or the next."""
    return commit(directory, type(head), lambda there: head, directory)


def test_a_head_is_read_as_it_was_written(tmp_path):
    head = ManifestHead(**PINNED, provenance={"compute_batch": 8, "share": 0.1})
    written = put(tmp_path, head)
    assert read_head(tmp_path, ManifestHead) == written
    assert read_head(tmp_path, ManifestHead).head.to_bytes() == (tmp_path / "HEAD").read_bytes()


def test_a_flipped_bit_of_a_head_is_refused(tmp_path):
    put(tmp_path, ManifestHead(**PINNED, provenance={"share": 0.1}))
    path = tmp_path / "HEAD"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(Corrupt, match="eupe cache repair"):
            read_head(tmp_path, ManifestHead)


def test_golden_heads_keep_their_bytes():
    for name, kind in (("toy/samples", SamplesHead), ("toy/*/*/*/manifest", ManifestHead)):
        (directory,) = GOLDEN.glob(name)
        there = read_head(directory, kind)
        assert there.head.to_bytes() == there.content == (directory / "HEAD").read_bytes()


def test_no_head_is_no_error(tmp_path):
    assert read_head(tmp_path / "nowhere", Head) is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"{", "all of it: Invalid JSON"),
        (b"[]", "all of it"),
        (b'{"format": 2, "segments": []}', "format: Input should be 1"),
        (b'{"format": 1, "segments": [], "other": 0}', "other: Extra inputs"),
        (b'{"format": 1, "segments": [{"name": "x"}]}', r"segments\.0\.rows: Field required"),
    ],
)
def test_a_damaged_head_says_what_is_wrong(tmp_path, content, what):
    (tmp_path / "HEAD").write_bytes(content)
    with pytest.raises(Corrupt, match=rf"HEAD: no HEAD of format 1 \({what}"):
        read_head(tmp_path, Head)


def test_a_head_cannot_be_changed_in_place():
    with pytest.raises(ValidationError, match="frozen"):
        Head().format = 1


def test_another_segment_under_the_same_name_is_refused(tmp_path):
    segment = write_segment(tmp_path, 1, TABLE, tmp_path)
    assert map_segment(tmp_path, segment, TABLE.schema).equals(TABLE)
    other = write_segment(tmp_path, 1, pa.table({"row": pa.array([1, 2, 4])}), tmp_path)
    assert other.name != segment.name
    (tmp_path / other.name).rename(tmp_path / segment.name)
    with pytest.raises(Corrupt, match="do not match the recorded sha256"):
        map_segment(tmp_path, segment, TABLE.schema)
    (tmp_path / segment.name).unlink()
    with pytest.raises(NotBuilt):
        map_segment(tmp_path, segment, TABLE.schema)


def test_head_files_are_plain_json(tmp_path):
    put(tmp_path, Head(segments=[]))
    content = (tmp_path / "HEAD").read_bytes()
    said = json.loads(content)
    own = said.pop("head_sha256")
    assert said == {"format": 1, "version": 0, "segments": []}
    blank = content.replace(own.encode(), b"0" * 64)
    assert own == hashlib.sha256(blank).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b'"version": 0', b'"version": 1'),
        lambda content: content.replace(b'"share": 0.1', b'"share": 0.10'),  # says the same
        lambda content: content.replace(b"head_sha256", b"head_sha257"),
        lambda content: content + b"\n",
        lambda content: b'{"format": 1}',
    ],
)
def test_a_head_that_is_not_as_it_was_written_is_refused(tmp_path, change):
    head = ManifestHead(**PINNED, provenance={"share": 0.1})
    sound = put(tmp_path, head).content
    (tmp_path / "HEAD").write_bytes(change(sound))
    assert change(sound) != sound
    with pytest.raises(Corrupt, match=r"HEAD: (contents do not match|no HEAD of format 1)"):
        read_head(tmp_path, ManifestHead)
