"""Leases: one holder at a time, and a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.bucket_server import NAME

from cache.errors import Busy, StoreError
from cache.files import bucket, copies
from cache.files.bucket_path import BucketPath
from pipelines.machines import lease

PATIENCE_SECONDS = 120
CHILD = """
import sys, time
from pathlib import Path
from pipelines.machines import lease
with lease.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def child(tmp_path):
    """Another process that holds the lease on a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "stage2-1")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait(PATIENCE_SECONDS)


def test_who_holds_it_is_known_and_nobody_else_gets_it(child, tmp_path):
    path = tmp_path / "stage2-1"
    found = lease.holder(path)
    assert found is not None
    assert found.pid == child.pid
    busy = pytest.raises(Busy, match=rf"stage2-1 is in work on .*, process {child.pid}")
    with busy, lease.held(path, wait=False):
        raise AssertionError("two hold it")
    assert lease.holder(tmp_path / "stage2-2") is None


def test_what_a_killed_holder_held_is_taken_over_at_once(child, tmp_path, capsys):
    os.kill(child.pid, signal.SIGKILL)
    child.wait(PATIENCE_SECONDS)
    started = time.monotonic()
    with lease.held(tmp_path / "stage2-1", wait=False):
        found = lease.holder(tmp_path / "stage2-1")
        assert found is not None
        assert found.pid == os.getpid()
    assert time.monotonic() - started < lease.DEAD_SECONDS
    assert lease.holder(tmp_path / "stage2-1") is None


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_clock_that_is_set_kills_nobody(child, tmp_path, monkeypatch, seconds):
    """Linux tells when a process began by its ticks since the machine started and by the clock."""
    path, platform = tmp_path / "stage2-1", psutil._psplatform
    real = platform.boot_time
    monkeypatch.setattr(platform, "boot_time", lambda: real() + seconds)
    found = lease.holder(path)
    assert found is not None
    assert found.pid == child.pid
    with pytest.raises(Busy, match="in work on"), lease.held(path, wait=False):
        raise AssertionError("two hold it")


def test_a_process_number_that_is_used_again_holds_nothing(child, tmp_path):
    file = tmp_path / "stage2-1.lease"
    said = json.loads(file.read_bytes())
    file.write_text(json.dumps({**said, "started": said["started"] - 60.0}))
    assert lease.holder(tmp_path / "stage2-1") is None


def test_a_holder_on_another_machine_is_dead_when_its_beats_have_stopped(tmp_path, monkeypatch):
    path = tmp_path / "stage2-1"
    with monkeypatch.context() as patch:
        patch.setattr(lease.atomic, "host", lambda: "another")
        block = lease.held(path)
        block.__enter__()
    file = path.with_name("stage2-1.lease")
    with pytest.raises(Busy, match="another"), lease.held(path, wait=False):
        pass
    long_ago = time.time() - 2 * lease.DEAD_SECONDS
    os.utime(file, (long_ago, long_ago))
    with lease.held(path, wait=False):
        block.__exit__(None, None, None)  # the old holder wakes up: the lease is not its own
        assert lease.holder(path) is not None


def test_a_holder_says_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    path = tmp_path / "stage2-1"
    file = path.with_name("stage2-1.lease")
    with lease.held(path):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 30
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > 1


def test_of_many_that_wait_one_at_a_time_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.001)
    inside, most = list[int](), list[int]()

    def work(number: int) -> None:
        for _ in range(5):
            with lease.held(tmp_path / "stage2-1"):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert most == [1] * 20


def test_a_lease_that_cannot_be_read_is_nobodys(tmp_path: Path):
    (tmp_path / "stage2-1.lease").write_text("{")
    with lease.held(tmp_path / "stage2-1", wait=False):
        assert lease.holder(tmp_path / "stage2-1") is not None


@pytest.fixture
def in_bucket(s3, tmp_path, monkeypatch, request) -> Path:
    """Something that is worked on in a copy, and lies in a bucket."""
    monkeypatch.setenv(copies.FOLDER_VARIABLE, str(tmp_path / "copies"))
    return copies.local(f"s3://{NAME}/{request.node.name}/stage2-1")


def test_in_a_bucket_one_holds_it_and_gives_it_back(in_bucket, monkeypatch):
    with lease.held(in_bucket):
        found = lease.holder(in_bucket)
        assert found is not None
        assert found.pid == os.getpid()
        with pytest.raises(Busy, match="in work on"), lease.held(in_bucket, wait=False):
            raise AssertionError("two hold it")
    assert lease.holder(in_bucket) is None
    monkeypatch.setattr(lease, "BUCKET_POLL_SECONDS", 0.01)
    with lease.held(in_bucket):  # of many that wait one at a time has it
        threads = [threading.Thread(target=_hold, args=(in_bucket,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert lease.holder(in_bucket) is None


def _hold(path: Path) -> None:
    with lease.held(path):
        there = lease.holder(path)
        assert there is not None


def test_in_a_bucket_a_holder_elsewhere_is_dead_by_the_buckets_clock(in_bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lease.atomic, "host", lambda: "another")
        block = lease.held(in_bucket)
        block.__enter__()
    with pytest.raises(Busy, match="another"), lease.held(in_bucket, wait=False):
        pass
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * lease.DEAD_SECONDS)  # our clock is wrong
    with pytest.raises(Busy, match="another"), lease.held(in_bucket, wait=False):
        pass
    clock = lease._bucket_clock
    monkeypatch.setattr(lease, "_bucket_clock", lambda folder: clock(folder) + lease.DEAD_SECONDS)
    with lease.held(in_bucket, wait=False):
        block.__exit__(None, None, None)  # the old holder wakes up: the lease is not its own
        found = lease.holder(in_bucket)
        assert found is not None
        assert found.pid == os.getpid()
        assert not found.host.startswith("another")


def test_in_a_bucket_a_holder_says_that_it_lives(in_bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    there = copies.remote(in_bucket)
    assert there is not None
    file = BucketPath(f"{there}.lease")
    with lease.held(in_bucket):
        first = bucket.read(file)
        deadline = time.monotonic() + 30
        while (now := bucket.read(file)) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert now != first
        assert lease.holder(in_bucket) is not None
    assert lease.holder(in_bucket) is None


def test_in_a_bucket_a_beat_whose_answer_was_lost_is_not_the_last(in_bucket, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.01)
    there, real, lost = copies.remote(in_bucket), bucket.swap, list[str]()
    assert there is not None
    file = BucketPath(f"{there}.lease")

    def swap(path: BucketPath, content: bytes, before: bucket.Stamped | None) -> dict[str, str]:
        stamp = real(path, content, before)
        if before is not None and len(lost) < 2:
            lost.append(content.decode())
            raise StoreError("no answer")
        return stamp

    def beats() -> int:
        found = bucket.read(file)
        return 0 if found is None else int(json.loads(found.content).get("beats", 0))

    monkeypatch.setattr(bucket, "swap", swap)
    with lease.held(in_bucket):
        deadline = time.monotonic() + 30
        while beats() <= 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert beats() > 4
        assert len(lost) == 2
        lost.clear()
    assert lease.holder(in_bucket) is None, "it is given back, too"
