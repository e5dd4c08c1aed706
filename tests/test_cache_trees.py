"""Working copies of folders in a bucket: what HEAD names exists, and one process writes."""

import json
import os
import time
from pathlib import Path

import pytest
from support import bucket_server
from support.bucket_server import NAME

from cache.errors import Busy, Corrupt, StoreError
from cache.files import bucket, bucket_service, copies, sealed, trees
from cache.files.bucket_path import BucketPath
from eupe.errors import BadInput


@pytest.fixture
def place(s3, request) -> str:
    return f"s3://{NAME}/{request.node.name}/runs"


def fill(tree: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)


def held(tree: Path) -> dict[str, str]:
    """Return the files of a copy that are not its own affair."""
    return {name: (tree / name).read_text() for name in trees._names(tree)}


def objects(place: str) -> set[str]:
    base = BucketPath(place)
    return {path.key.removeprefix(f"{base.key}/") for path, _ in base.files_below()}


def test_a_copy_is_where_its_name_says_and_a_folder_is_itself(machine, tmp_path):
    copy = copies.local("s3://some/where/deep")
    assert copy == (tmp_path / "first").resolve() / "s3" / "some" / "where" / "deep"
    assert str(copies.remote(copy)) == "s3://some/where/deep"
    assert str(copies.named(copy / "file")) == "s3://some/where/deep/file"
    assert copies.local(tmp_path) == tmp_path
    assert copies.remote(tmp_path / "first" / "s3") is None
    assert copies.remote(tmp_path) is None


def test_what_is_published_is_on_another_machine(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    files = {"made_of.json": "{}", "checkpoints/step-3/state.pt": "three", "empty": ""}
    with trees.taken(tree):
        fill(tree, {**files, ".tmp/half": "", "train.lock": "", "ray/theirs": "", "a/.hidden": ""})
        trees.publish(tree)
    machine("second")
    tree = copies.local(f"{place}/stage2-1")
    assert not tree.exists()
    trees.bring(tree)
    assert held(tree) == files
    assert sorted(path.name for path in tree.iterdir() if path.name[0] != ".") == [
        "checkpoints",
        "empty",
        "made_of.json",
    ]


def test_what_was_not_published_does_not_exist(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"checkpoints/step-3/state.pt": "three", "metrics": "a\n"})
        trees.publish(tree)
        fill(tree, {"checkpoints/step-6/state.pt": "six", "metrics": "a\nb\n", "more": ""})
    trees.bring(tree)  # this machine's copy, too: another one may have gone on meanwhile
    assert held(tree) == {"checkpoints/step-3/state.pt": "three", "metrics": "a\n"}
    assert not (tree / "checkpoints" / "step-6").exists()


@pytest.mark.parametrize("stray", ["checkpoints/notes", "checkpoints/mine/notes", "notes"])
def test_a_file_that_is_too_much_takes_none_that_is_named_with_it(place, machine, stray):
    """A user's own in the copy, or one that was never published: it goes, and nothing else does."""
    tree, files = copies.local(f"{place}/stage2-1"), {"checkpoints/step-3/state.pt": "three"}
    with trees.taken(tree):
        fill(tree, files)
        trees.publish(tree)
    fill(tree, {stray: "hers"})
    trees.bring(tree)
    assert held(tree) == files
    fill(tree, {stray: "hers"})
    with trees.taken(tree):
        fill(tree, {"metrics": "a"})
        trees.publish(tree)
    machine("second")
    tree = copies.local(f"{place}/stage2-1")
    trees.bring(tree)
    assert held(tree) == {**files, "metrics": "a"}


def test_what_is_superseded_is_deleted_and_what_is_unchanged_not_sent_again(place, machine, s3):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"step-3/state": "three", "metrics": "a"})
        trees.publish(tree)
        (tree / "step-3" / "state").unlink()
        (tree / "step-3").rmdir()
        fill(tree, {"step-6/state": "six", "metrics": "ab"})
        trees.publish(tree)
        named = {name.partition("/")[2] for name in objects(f"{place}/stage2-1")}
        assert named == {"", "step-6/state", "metrics"}  # HEAD, and what it names
        s3.behave()
        trees.publish(tree)
        assert s3.requests == []
        fill(tree, {"metrics": "abc"})
        trees.publish(tree)
        assert [each.method for each in s3.requests] == ["PUT", "PUT", "POST"]  # POST deletes


def test_a_copy_that_is_up_to_date_costs_one_request(place, machine, s3):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {f"step-{n}/state": "x" * n for n in range(9)})
        trees.publish(tree)
    s3.behave()
    trees.bring(tree)
    assert [each.method for each in s3.requests] == ["GET"]


def test_a_file_that_is_changed_here_is_brought_again(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"config": "score: null"})
        trees.publish(tree)
    before = (tree / "config").stat()
    (tree / "config").write_text("score: 0.83")  # as long
    os.utime(tree / "config", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    trees.bring(tree)
    assert held(tree) == {"config": "score: null"}


def test_an_upload_that_is_cut_off_changes_nothing(place, machine, s3, monkeypatch):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"step-3/state": "three"})
        trees.publish(tree)
        fill(tree, {"step-6/config": "6", "step-6/state": "six"})
        s3.behave(throttle=lambda request: "step-6/state" in request.key)
        with monkeypatch.context() as patch:
            patch.setenv(bucket_service.RETRY_VARIABLE, "0.1")
            with pytest.raises(StoreError, match="cannot be written"):
                trees.publish(tree)
    s3.behave()
    machine("second")
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        assert held(tree) == {"step-3/state": "three"}
        fill(tree, {"step-6/state": "otherwise"})
        trees.publish(tree)
    assert held(tree)["step-6/state"] == "otherwise"


def test_who_was_silent_and_is_followed_by_another_sends_nothing_more(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"step-3/state": "three"})
        trees.publish(tree)
        machine("second")
        other = copies.local(f"{place}/stage2-1")
        with trees.taken(other):  # as when the first one's lease was thought dead
            machine("first")
            fill(tree, {"step-6/state": "late"})
            with pytest.raises(Busy, match=r"another process has taken it over.*run the same"):
                trees.publish(tree)
            machine("second")
            fill(other, {"step-6/state": "six"})
            trees.publish(other)
    machine("third")
    third = copies.local(f"{place}/stage2-1")
    trees.bring(third)
    assert held(third) == {"step-3/state": "three", "step-6/state": "six"}


def test_a_reader_leaves_alone_what_this_machine_writes(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"metrics": "not sent yet"})
        trees.bring(tree)
        assert held(tree) == {"metrics": "not sent yet"}


def test_damage_in_the_bucket_is_a_sentence(place, machine):
    tree = copies.local(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"state": "three"})
        trees.publish(tree)
    machine("second")
    tree, there = copies.local(f"{place}/stage2-1"), BucketPath(f"{place}/stage2-1")
    (name,) = (name for name in objects(str(there)) if name.endswith("/state"))
    bucket.swap(there / name, b"eerht", bucket.read(there / name))
    with pytest.raises(Corrupt, match=r"000002-\w+/state: contents do not match the sha256"):
        trees.bring(tree)
    (there / name).unlink()
    with pytest.raises(StoreError, match="objects that its HEAD names are not there"):
        trees.bring(tree)
    head = bucket.read(there / trees.HEAD)
    assert head is not None
    bucket.swap(there / trees.HEAD, head.content.replace(b"5", b"6", 1), head)
    with pytest.raises(Corrupt, match=r"HEAD: contents do not match the head_sha256"):
        trees.bring(tree)


def test_a_head_that_names_files_elsewhere_is_refused(place, machine):
    there = BucketPath(f"{place}/stage2-1")
    file = {"num_bytes": 1, "sha256": "0" * 64, "at": "1/x"}
    for name in ("../outside", "/tmp/outside", "a/../../outside", ""):
        said = {"format": 1, "number": 1, "mark": "", "files": {name: file}}
        head = bucket.read(there / trees.HEAD)
        bucket.swap(there / trees.HEAD, sealed.seal(said, trees.CHECKSUM), head)
        with pytest.raises(Corrupt, match="HEAD: names a file outside of its folder"):
            trees.bring(copies.local(str(there)))
    with pytest.raises(BadInput, match=r"s3://features/../x: wants a folder in the bucket"):
        copies.local("s3://features/../x")


def test_what_killed_uploads_left_goes_once_it_is_old(place, machine, monkeypatch):
    tree, there = copies.local(f"{place}/stage2-1"), BucketPath(f"{place}/stage2-1")
    with trees.taken(tree):
        fill(tree, {"state": "three"})
        trees.publish(tree)
    bucket.swap(there / "000007-dead" / "state", b"half", None)
    with trees.taken(tree):
        assert "000007-dead/state" in objects(str(there))
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + trees.ABANDONED_SECONDS + 60)
    with trees.taken(tree):
        assert {name.partition("/")[2] for name in objects(str(there))} == {"", "state"}
    trees.bring(tree)
    assert held(tree) == {"state": "three"}


def test_files_and_links_of_a_folder_are_those_in_the_bucket(place, machine, tmp_path):
    folder = copies.local(f"{place}/demo")
    copies.bring(folder)
    assert [*folder.glob("[!.]*")] == []
    copies.write(folder / "summary.json", b"{}", folder / ".tmp")
    copies.write(folder / "old.json", b"{}", folder / ".tmp")
    copies.send_link(folder / "stage2", Path("../stages/stage2-1"), folder / ".tmp")
    assert objects(f"{place}/demo") == {"summary.json", "old.json", "stage2.link"}
    copies.bring(folder)
    assert (folder / "stage2").readlink() == Path("../stages/stage2-1")
    machine("second")
    other = copies.local(f"{place}/demo")
    copies.write(other / "summary.json", b"{} ", other / ".tmp")
    (BucketPath(f"{place}/demo") / "old.json").unlink()
    machine("first")
    (folder / "stray.json").write_text("{}")
    copies.bring(folder)
    assert {path.name for path in folder.glob("[!.]*")} == {"summary.json", "stage2"}
    assert json.loads((folder / "summary.json").read_text()) == {}
    assert (folder / "summary.json").stat().st_size == 3
    (BucketPath(f"{place}/demo") / "summary.json").unlink()
    copies.bring(folder)
    assert objects(f"{place}/demo") == {"stage2.link"}
    assert {path.name for path in folder.glob("[!.]*")} == {"stage2"}


def test_a_folder_in_the_bucket_is_asked_for_once(place, machine, s3):
    folder = copies.local(f"{place}/demo")
    for name in ("summary.json", "report.html", "evaluation.json"):
        copies.write(folder / name, b"x", folder / ".tmp")
    copies.bring(folder)
    s3.behave()
    copies.bring(folder)
    assert len(s3.requests) == 1
    assert bucket_server.NAME in str(copies.named(folder))
