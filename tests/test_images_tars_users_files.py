"""WebDataset tars as their users write them: fields of a key, shards, tars in tars, cut ones."""

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.small_caches import job, reader

from cache.format.sample_table import frame
from eupe.errors import BadInput
from pipelines.caching import indexing
from pipelines.images import index
from pipelines.images.aside import Aside
from pipelines.recipe.config import SourceConfig

Members = dict[str, bytes]
CHECKSUM_END = 155
"""Byte of a tar's header that ends its checksum, a zero or a space: it says nothing."""


def png(shade: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


def tar(path: Path, members: Members | list[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    """Write a tar of plain members, or of links that are given as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            file.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def link(name: str, target: str, kind: bytes) -> tuple[str, tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return name, member


def source(path: Path | str, **asked: Any) -> SourceConfig:
    return SourceConfig(kind="webdataset", path=str(path), **asked)


def looked(path: Path | str, **asked: Any) -> tuple[pl.DataFrame, dict[str, str], list[str]]:
    """Index tars: samples, the reason of each failure by its id, and what was said."""
    config, aside = source(path, **asked), Aside()
    parts = list(index.look(config, index.pieces(config, aside), aside=aside))
    failures = [found for part in parts for found in index.failures(part.sources)]
    records = pl.concat([frame(part.records) for part in parts])
    return records, {each[0]: each[3] for each in failures}, list(aside.lines())


def ids(path: Path | str, **asked: Any) -> list[str]:
    return sorted(looked(path, **asked)[0]["sample_id"])


def labels(path: Path | str, **asked: Any) -> dict[str, dict[str, str]]:
    records = looked(path, **asked)[0]
    return {each["sample_id"]: json.loads(each["labels"]) for each in records.iter_rows(named=True)}


def shards(folder: Path, num: int = 30, per_shard: int = 10) -> Path:
    """Shards as the library's own writer makes them; keys hold dots and a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/train-%05d.tar", maxcount=per_shard, verbose=0) as out:
        for number in range(num):
            out.write(
                {
                    "__key__": f"v1.2/{number:04d}",
                    "jpg": Image.new("RGB", (4, 3), (number, 0, 0)),
                    "seg.png": Image.new("RGB", (4, 3)),
                    "cls": number % 3,
                    "json": {"wnid": f"n{number % 3}", "size": [4, 3]},
                    "caption.txt": f"picture {number}",
                }
            )
    return folder


def test_samples_are_those_that_the_library_reads(tmp_path):
    folder = shards(tmp_path / "shards")
    found = labels(folder)
    urls = sorted(map(str, folder.glob("*.tar")))
    theirs = {each["__key__"]: each for each in webdataset.WebDataset(urls, shardshuffle=False)}
    assert sorted(found) == sorted(theirs)
    for key, own in found.items():
        number = int(key.rpartition("/")[2])
        assert own == {
            "label": "v1.2",
            "cls": str(number % 3),
            "wnid": f"n{number % 3}",
            "caption.txt": f"picture {number}",
        }
    images = reader(source(folder))
    for each in looked(folder)[0].iter_rows(named=True):
        assert images.read(each, verify=True) == theirs[each["sample_id"]]["jpg"]


def test_what_is_no_sample_is_counted_by_field(tmp_path):
    said = looked(shards(tmp_path / "shards"))[2]
    assert said == ["members that are no samples, by field: 30 seg.png"]


def test_one_of_several_pictures_is_chosen(tmp_path):
    path = tar(tmp_path / "x.tar", {"1.left.png": png(1), "1.right.png": png(2), "1.cls": b"7"})
    wanted = (
        r"x\.tar: 1 has 2 pictures, 1\.left\.png, 1\.right\.png; source\.image_member=left\.png"
    )
    with pytest.raises(BadInput, match=wanted):
        looked(path)
    for choice, shade in (("left.png", 1), ("right.png", 2), ("jpg;RIGHT.png", 2)):
        (record,) = looked(path, image_member=choice)[0].iter_rows(named=True)
        assert record["sample_id"] == "1"
        assert json.loads(record["labels"]) == {"cls": "7"}
        assert reader(source(path)).read(record, verify=True) == png(shade)


def test_the_picture_may_have_any_field(tmp_path):
    path = tar(tmp_path / "x.tar", {"1.image": png(), "1.txt": b"red", "2.txt": b"no picture"})
    assert labels(path, image_member="image") == {"1": {"txt": "red"}}
    assert looked(path, image_member="image")[2] == ["members that are no samples, by field: 1 txt"]
    with pytest.raises(BadInput, match="no image in this webdataset source; members that are no"):
        looked(path)


def test_every_picture_may_be_a_sample(tmp_path):
    """Photographs that were not written for WebDataset: their names have dots of their own."""
    members = {"a/2021.01.png": png(1), "a/2021.02.png": png(2), "a/2021.02.json": b'{"x": 1}'}
    path = tar(tmp_path / "x.tar", members)
    assert labels(path, key="path") == {
        "a/2021.01": {"label": "a"},
        "a/2021.02": {"label": "a", "x": "1"},
    }


def test_keys_that_are_unique_in_a_shard_only(tmp_path):
    for shard in ("train-0", "val/train-0"):
        tar(tmp_path / f"{shard}.tar", {"c/1.png": png(len(shard)), "c/2.png": png()})
    with pytest.raises(BadInput, match=r"source\.key=shard adds the name of a tar"):
        indexing.index_samples(job(tmp_path / "caches", source(tmp_path)))
    found = labels(tmp_path, key="shard")
    assert sorted(found) == [f"{shard}/c/{n}" for shard in ("train-0", "val/train-0") for n in "12"]
    assert {own["label"] for own in found.values()} == {"c"}
    asked = job(tmp_path / "caches", source(tmp_path, key="shard"))
    assert indexing.index_samples(asked).num_samples == 4


def imagenet(folder: Path) -> dict[str, bytes]:
    """A tar a class, as ILSVRC has them; returns each as bytes, by its name."""
    made = {}
    for number, wnid in enumerate(("n01440764", "n01443537")):
        members = {f"{wnid}_{n}.JPEG": png(10 * number + n) for n in range(3)}
        made[f"{wnid}.tar"] = tar(folder / f"{wnid}.tar", members).read_bytes()
    return made


def test_a_class_a_tar(tmp_path):
    imagenet(tmp_path)
    assert {own.get("label") for own in labels(tmp_path).values()} == {None}
    found = labels(tmp_path, classes="tar")
    assert found["n01440764_2"] == {"label": "n01440764"}
    assert {own["label"] for own in found.values()} == {"n01440764", "n01443537"}


def test_tars_in_a_tar(tmp_path):
    inner = imagenet(tmp_path / "inner")
    path = tar(tmp_path / "ILSVRC2012_img_train.tar", inner)
    found = labels(path)
    assert len(found) == 6
    assert found["n01443537/n01443537_2"] == {"label": "n01443537"}
    images = reader(source(path))
    for each in looked(path)[0].iter_rows(named=True):
        number, n = each["sample_id"].startswith("n01443537"), int(each["sample_id"][-1])
        assert images.read(each, verify=True) == png(10 * number + n)


def test_a_cut_tar_in_a_tar_is_refused(tmp_path):
    inner = imagenet(tmp_path / "inner")
    for length in (700, 1024, 1536, 3000):
        cut = {**inner, "n01440764.tar": inner["n01440764.tar"][:length]}
        path = tar(tmp_path / "outer.tar", cut)
        with pytest.raises(BadInput, match=r"outer\.tar: no whole uncompressed tar file"):
            looked(path)


def test_lists_in_braces(tmp_path):
    folder = shards(tmp_path / "shards", num=40)
    assert ids(f"{folder}/train-{{00000..00003}}.tar") == ids(folder)
    assert len(ids(f"{folder}/train-{{00000..00001}}.tar")) == 20
    assert len(ids(f"{folder}/train-{{00000,00003}}.tar")) == 20
    assert len(ids(f"{folder}/train-0000{{0..1}}.ta?")) == 20
    wanted = r"2 of its 6 names are not there, the first is .*train-00004\.tar"
    with pytest.raises(BadInput, match=wanted):
        looked(f"{folder}/train-{{00000..00005}}.tar")


def test_lists_in_braces_are_read_again(tmp_path):
    pattern = f"{shards(tmp_path / 'shards')}/train-{{00000..00002}}.tar"
    images = reader(source(pattern))
    for each in looked(pattern)[0].iter_rows(named=True):
        assert images.read(each, verify=True)


def test_links_in_a_tar_are_what_they_lead_to(tmp_path):
    members = [
        ("a/1.png", png(1)),
        link("b/hard.png", "a/1.png", tarfile.LNKTYPE),
        link("b/soft.png", "../a/1.png", tarfile.SYMTYPE),
        link("b/again.png", "soft.png", tarfile.SYMTYPE),
        ("blobs/0123", png(2)),
        link("b/blob.png", "../blobs/0123", tarfile.SYMTYPE),
        link("b/gone.png", "nowhere.png", tarfile.SYMTYPE),
        link("b/loop.png", "loop.png", tarfile.SYMTYPE),
        link("folder", "b", tarfile.SYMTYPE),
    ]
    path = tar(tmp_path / "x.tar", members)
    records, failures, _ = looked(path)
    images = reader(source(path))
    found = {
        each["sample_id"]: images.read(each, verify=True) for each in records.iter_rows(named=True)
    }
    assert found == {
        "a/1": png(1),
        "b/hard": png(1),
        "b/soft": png(1),
        "b/again": png(1),
        "b/blob": png(2),
    }
    assert failures == {
        f"b/{name}": f"x.tar: member b/{name}.png is a link to b/{target}, which is not in this tar"
        for name, target in (("gone", "nowhere.png"), ("loop", "loop.png"))
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tar of nine pictures, the last one without a label, and its bytes."""
    members = {f"c/{n}.png": png(n) for n in range(9)}
    path = tar(tmp_path_factory.mktemp("cut") / "x.tar", {**members, "c/0.cls": b"1"})
    return path, path.read_bytes()


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tar_cut_anywhere_is_refused_or_whole(small, data):
    path, whole = small
    end = 10 * 1024  # ten members, each a header and a block of contents; the rest is zeros
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    if path.stat().st_size >= end + tarfile.BLOCKSIZE:
        assert len(looked(path)[0]) == 9
    else:
        with pytest.raises(BadInput, match=r"x\.tar: no whole uncompressed tar file \(.*\); write"):
            looked(path)


@given(st.integers(1, 9), st.integers(0, 511))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_not_the_end(small, member, byte):
    path, whole = small
    damaged = bytearray(whole)
    damaged[1024 * member + byte] ^= 0x55
    path.write_bytes(damaged)
    if byte == CHECKSUM_END:
        assert len(looked(path)[0]) == 9
    else:
        with pytest.raises(BadInput, match="no whole uncompressed tar file"):
            looked(path)


def test_tars_that_were_joined_are_read_to_the_end(tmp_path):
    first = tar(tmp_path / "first.tar", {"a/1.png": png(1)}).read_bytes()
    second = tar(tmp_path / "second.tar", {"a/2.png": png(2)}).read_bytes()
    joined = tmp_path / "joined/x.tar"
    joined.parent.mkdir()
    joined.write_bytes(first + second)
    assert ids(joined) == ["a/1", "a/2"]
    images = reader(source(joined))
    assert [images.read(each) for each in looked(joined)[0].iter_rows(named=True)] == [
        png(1),
        png(2),
    ]


def test_a_name_that_is_there_twice_is_refused(tmp_path):
    path = tar(tmp_path / "x.tar", [("a/1.png", png(1)), ("./a/1.png", png(2))])
    with pytest.raises(BadInput, match=r"x\.tar: member a/1\.png is there twice"):
        looked(path)


@pytest.mark.parametrize("content", [b"{broken", b"\xff\xfe", b"[" * 100_000, b"9" * 5000])
def test_one_bad_json_is_that_samples_failure(tmp_path, content):
    members = {"a/1.png": png(1), "a/1.json": content, "a/2.png": png(2), "a/2.json": b'{"x": 1}'}
    path = tar(tmp_path / "x.tar", members)
    records, failures, _ = looked(path)
    assert records["sample_id"].to_list() == ["a/2"]
    ((name, reason),) = failures.items()
    assert name == "a/1"
    assert reason.startswith("x.tar: member a/1.json is no JSON (")


def test_a_label_that_leads_nowhere_is_that_samples_failure(tmp_path):
    members = [
        ("1.png", png(1)),
        link("1.cls", "gone.cls", tarfile.SYMTYPE),
        ("2.png", png(2)),
        ("2.cls", b"7"),
    ]
    path = tar(tmp_path / "x.tar", members)
    records, failures, _ = looked(path)
    assert records["sample_id"].to_list() == ["2"]
    assert failures == {"1": "x.tar: member 1.cls is a link to gone.cls, which is not in this tar"}


@pytest.mark.timeout(60)
def test_a_tar_that_is_no_file_is_refused(tmp_path):
    shards(tmp_path, num=10)
    os.mkfifo(tmp_path / "train-1.tar")
    for path in (tmp_path, tmp_path / "train-1.tar", tmp_path / "*.tar"):
        with pytest.raises(BadInput, match=r"train-1\.tar: no file but a FIFO"):
            looked(path)
    (tmp_path / "train-1.tar").unlink()
    (tmp_path / "train-1.tar").symlink_to("/mnt/not-mounted/train-1.tar")
    for path in (tmp_path, tmp_path / "train-1.tar", tmp_path / "*.tar"):
        with pytest.raises(BadInput, match=r"train-1\.tar: a link to nowhere"):
            looked(path)
    (tmp_path / "train-1.tar").unlink()
    (tmp_path / "train-1.tar").mkdir()  # a folder of that name is walked like any other
    assert len(ids(tmp_path)) == len(ids(tmp_path / "*.tar")) == 10


def test_compressed_tars_are_named_where_there_are_no_others(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"no \.tar file there \(.*by extension: 1 \.tar\.gz\)"):
        looked(tmp_path)


def test_a_wide_shard_is_in_no_doubt_about_its_classes(tmp_path):
    """The folders of tars are no folders of pictures."""
    for name in ("train/0", "train/1"):
        tar(tmp_path / f"{name}.tar", {"1.png": png(), "1.cls": b"7"})
    assert looked(tmp_path, key="shard")[2] == []
    path = tar(tmp_path / "x.tar", {f"train/{name}/1.png": png() for name in ("cat", "dog")})
    (line,) = looked(path)[2]
    assert line.startswith("every image has the label 'train', its top folder; written without")
    assert looked(path, classes="tar")[2] == []


def test_half_a_surrogate_pair_in_a_caption_is_replaced(tmp_path):
    members = {"1.png": png(), "1.json": b'{"caption": "a \\ud83d b", "whole": "\\ud83d\\ude00"}'}
    path = tar(tmp_path / "x.tar", members)
    assert labels(path) == {
        "1": {"caption": "a \N{REPLACEMENT CHARACTER} b", "whole": "\U0001f600"}
    }
    assert indexing.index_samples(job(tmp_path / "caches", source(path))).num_samples == 1


def test_a_name_that_is_not_utf8_is_a_failure(tmp_path):
    path = tar(tmp_path / "x.tar", {"a/caf\udce9.png": png(1), "a/2.png": png(2)})
    records, failures, _ = looked(path)
    assert records["sample_id"].to_list() == ["a/2"]
    assert failures == {r"a/caf\xe9.png": "x.tar: the name is not UTF-8"}


def test_tars_behind_links_are_found(tmp_path):
    folder = shards(tmp_path / "elsewhere", num=20)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train").symlink_to(folder)
    (tmp_path / "data/readme.md").write_text("other")
    (tmp_path / "data/._train-0.tar").write_bytes(b"of another system")
    records, _, said = looked(tmp_path / "data")
    assert len(records) == 20
    assert said[0] == "not looked at, by extension: 1 .md"


def test_a_source_that_was_indexed_before_there_were_keys_is_not_opened_again(tmp_path):
    """The stamp of a piece is what it was in format 1's first version."""
    path = tar(tmp_path / "x.tar", {"a/1.png": png()})
    rule = (
        '{"kind":"webdataset","image_column":"image","key_column":null,"label_columns":[],'
        '"where":{}}'
    )
    assert index._rule(source(path)) == rule
    assert index._rule(source(path, key="shard")) != rule
