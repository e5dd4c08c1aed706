"""A mirror that two users share: copies are read by both, and nobody stumbles over the other's."""

import codecs
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.bucket_server import NAME

from cache.errors import StoreError
from cache.files import bucket
from cache.files.bucket_path import BucketPath
from cache.files.mirror import Mirror, Wanted

ONE, OTHER = 4001, 4002
GROUP = 4000
NUM_BYTES = 1000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may become other users")


@contextmanager
def as_user(user: int) -> Iterator[None]:
    """Do the block as another user, who keeps what he writes to himself as far as he can."""
    groups, umask = os.getgroups(), os.umask(0o077)
    os.setgroups([GROUP])
    os.setegid(GROUP)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(umask)


@pytest.fixture
def objects(s3, tmp_path) -> list[Wanted]:
    """Five objects, each of one byte value."""
    wanted = []
    for number in range(5):
        content = bytes([number]) * NUM_BYTES
        (tmp_path / "file").write_bytes(content)
        path = BucketPath(f"s3://{NAME}/{tmp_path.name}/{number}")
        bucket.send(tmp_path / "file", path)
        wanted.append(Wanted(path, NUM_BYTES, hashlib.sha256(content).hexdigest()))
    Mirror(tmp_path / "warm", 1 << 20).local(wanted[0])  # imports what root alone may read
    codecs.lookup("ascii")
    return wanted


def shared(folder: Path, mode: int) -> Path:
    """Make a folder that a mirror is to lie in, and the way to it."""
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(mode)
    for parent in folder.parents[: len(folder.parents) - 2]:
        parent.chmod(parent.stat().st_mode | 0o055)
    return folder


@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o2770])
def test_two_users_share_a_mirror(objects, tmp_path, mode):
    folder = shared(tmp_path / "shared", mode)
    with as_user(ONE):
        copies = [Mirror(folder, 3200).local(wanted) for wanted in objects[:3]]
    for path in folder.rglob("*"):
        allowed = stat.S_IMODE(path.stat().st_mode)
        assert allowed & 0o777 == (mode if path.is_dir() else mode & 0o666) & 0o777, path
    with as_user(OTHER):
        theirs = Mirror(folder, 3200)
        assert theirs.local(objects[0]).read_bytes() == bytes([0]) * NUM_BYTES
        if mode & stat.S_ISVTX:  # he may not delete: no room, in a sentence
            with pytest.raises(StoreError, match="the mirror has no room for 1000 more bytes"):
                theirs.local(objects[3])
            assert all(copy.exists() for copy in copies)
        else:
            assert theirs.local(objects[3]).read_bytes() == bytes([3]) * NUM_BYTES
            assert [copy.exists() for copy in copies] == [True, False, True]  # 0 was just used
            assert theirs.scratch(objects[0].path).is_dir()
    with as_user(ONE):
        assert Mirror(folder, 6400).local(objects[4]).read_bytes() == bytes([4]) * NUM_BYTES
        assert Mirror(folder, 6400).scratch(objects[0].path).is_dir()


def test_a_mirror_of_another_user_is_read_and_not_written(objects, tmp_path):
    folder = shared(tmp_path / "his", 0o755)
    os.chown(folder, ONE, GROUP)
    with as_user(ONE):
        Mirror(folder, 3200).local(objects[0])
    with as_user(OTHER):
        his = Mirror(folder, 3200)
        assert his.local(objects[0]).read_bytes() == bytes([0]) * NUM_BYTES
        his.will_need(objects[1:2])  # a hint that comes to nothing
        sentence = f"^{folder}: the mirror cannot be written: Permission denied; .* EUPE_MIRROR$"
        with pytest.raises(StoreError, match=sentence):
            his.local(objects[1])
        with pytest.raises(StoreError, match="cannot be written"):
            Mirror(tmp_path / "new")


def test_a_damaged_copy_of_another_user_is_named(objects, tmp_path):
    folder = shared(tmp_path / "shared", 0o1777)
    with as_user(ONE):
        copy = Mirror(folder, 3200).local(objects[0])
        copy.write_bytes(bytes(NUM_BYTES - 1) + b"x")
    with as_user(OTHER), pytest.raises(StoreError, match=f"^{copy}: damaged, and another user's"):
        Mirror(folder, 3200).drop_damaged(objects[0])
