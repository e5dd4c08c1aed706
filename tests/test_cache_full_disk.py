"""A disk that is full, or fails: one sentence, nothing lost, and the same command goes on."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import StoreError
from cache.files import atomic

PATIENCE_SECONDS = 300

CHILD = Path(__file__).parent / "support" / "full_disk_child.py"
ALONE = ["unshare", "--map-root-user", "--mount"]
"""Runs a command in a mount namespace of its own, in which it may mount what it likes."""


def may_mount() -> bool:
    try:
        return (
            subprocess.run(
                [*ALONE, "true"], capture_output=True, check=False, timeout=PATIENCE_SECONDS
            ).returncode
            == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_mount(), reason="no file system may be mounted here")
@pytest.mark.slow
@pytest.mark.parametrize(("work", "refusals"), [("store", 20), ("training", 3)])
def test_a_full_disk_loses_nothing(tmp_path, work, refusals):
    run = subprocess.run(
        [*ALONE, sys.executable, CHILD, work, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["different"] == []
    assert len(found["refused"]) >= refusals
    for sentence in found["refused"]:
        assert sentence.startswith(f"{tmp_path}/full-")
        assert ": cannot be written: No space left on device (0." in sentence
        assert f"MB left on the file system of {tmp_path}/full-" in sentence


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, r"MB left on the file system of .*; free some, then run the same command"),
        (errno.EDQUOT, r"of which your quota leaves you none\); free some, then run the same"),
        (errno.EIO, r"the disk or the way to it fails: see the system's log, mend it, then run"),
        (errno.EFBIG, r"File too large$"),
    ],
)
def test_a_refused_write_says_what_helps_and_leaves_the_old_file(
    tmp_path, monkeypatch, number, advice
):
    path, scratch = tmp_path / "file", tmp_path / ".tmp"
    atomic.write(path, [b"old"], scratch)
    real, calls = os.write, []

    def refusing(handle: int, data: memoryview) -> int:
        calls.append(handle)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return real(handle, data[:1])

    monkeypatch.setattr(os, "write", refusing)
    with pytest.raises(StoreError, match=f"^{path}: cannot be written: .*{advice}"):
        atomic.write(path, [b"new"], scratch)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("below", ["", "sub", "sub/folder"])
def test_a_file_in_the_way_of_a_folder_is_named_and_kept(below, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(StoreError, match=r"/notes: is a file, where a folder is wanted"):
        atomic.make_directories(tmp_path / "notes" / below)
    assert (tmp_path / "notes").read_text() == "mine"
