"""Indexing by several at once: the samples, their order and every byte are those of one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from support import indexing_child
from support.small_caches import data_files, job, pictures, write_folder, write_parquet, write_tar

from eupe.errors import BadInput
from pipelines.caching import indexing
from pipelines.images import index
from pipelines.images.looker import Looker
from pipelines.recipe.config import SourceConfig

FILES, EACH = 7, 6
PATIENCE_SECONDS = 120
END_SECONDS = 60
Source = tuple[SourceConfig, list[Path]]


class Backwards:
    """Workers that are done with the last task first, and tell of two at once."""

    def __init__(self, source: SourceConfig) -> None:
        self._looker = Looker(source, threads=1)

    def run(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[int, Any]]]:
        """Do all tasks."""
        call = getattr(self._looker, method)
        done = [(number, call(*task)) for number, task in enumerate(tasks)][::-1]
        for first in range(0, len(done), 2):
            yield done[first : first + 2]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Ask for help from the first file on, with each file by itself."""
    monkeypatch.setattr(index, "ALONE_SECONDS", 0.0)
    monkeypatch.setattr(index, "TASK_BYTES", 1)
    monkeypatch.setattr(index, "PART_IMAGES", 2 * EACH)


@pytest.fixture(params=["folder", "webdataset", "parquet"])
def source(request, tmp_path, emoji) -> Source:
    """Some files of a few pictures, one of which is none in each; and the paths of the files."""
    images = list(pictures(emoji, FILES * EACH).items())
    where, paths = tmp_path / "images", []
    where.mkdir()
    for number in range(FILES):
        some = {
            f"{number}/{Path(path).name}": data
            for path, data in images[number * EACH : (number + 1) * EACH]
        }
        some[min(some)] = b"none"
        if request.param == "folder":
            write_folder(where, some)
        else:
            write: Mapping[str, Any] = {"webdataset": write_tar, "parquet": write_parquet}
            suffix = {"webdataset": "tar", "parquet": "parquet"}[request.param]
            paths.append(where / f"{number}.{suffix}")
            write[request.param](paths[-1], some)
    return SourceConfig(kind=request.param, path=str(where)), paths


def indexed(root: Path, source: SourceConfig, workers: Any) -> dict[str, str]:
    """Index into a new root; return its files."""
    work = job(root, source, max_failure_share=0.5)
    found = indexing.index_samples(work, workers)
    assert (found.num_samples, len(found.failures)) == (FILES * (EACH - 1), FILES)
    return data_files(root)


def test_whoever_looks_and_in_what_order_every_byte_is_the_same(tmp_path, source):
    alone = indexed(tmp_path / "alone", source[0], None)
    assert indexed(tmp_path / "abreast", source[0], Backwards(source[0])) == alone


@pytest.mark.ray
def test_one_actor_and_three_write_the_bytes_of_none(tmp_path, source, ray_cluster):
    alone = indexed(tmp_path / "alone", source[0], None)
    for actors in (1, 3):
        work = job(tmp_path / f"{actors}", source[0], actors=actors)
        with indexing.lookers(work) as pool:
            assert indexed(tmp_path / f"{actors}", source[0], pool) == alone


@pytest.mark.ray
@pytest.mark.parametrize("source", ["webdataset", "parquet"], indirect=True)
def test_a_file_that_another_process_cannot_read_is_named(tmp_path, source, ray_cluster):
    config, paths = source
    paths[4].write_bytes(paths[4].read_bytes()[:3000])
    work = job(tmp_path / "root", config, actors=2, max_failure_share=0.5)
    with indexing.lookers(work) as pool, pytest.raises(BadInput) as refused:
        indexing.index_samples(work, pool)
    assert f"{paths[4]}: no whole" in str(refused.value)
    assert "Traceback" not in str(refused.value)
    assert not list((tmp_path / "root").rglob("HEAD"))


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_a_disk_that_fails_is_said_with_the_file(tmp_path, source, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipelines.images.tars._members", fails)
    with pytest.raises(BadInput, match=r"0\.tar: it cannot be read \(Input/output error\)"):
        indexing.index_samples(job(tmp_path / "root", source[0]))


def words_of(process: psutil.Process) -> str:
    """Return a process's command; Ray's own come and go."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.slow
@pytest.mark.ray
def test_ctrl_c_ends_all_who_look(tmp_path, emoji):
    """And the same command goes on with the parts that are there: tests/test_caching_indexing."""
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "0.tar", pictures(emoji, 24))
    for number in range(1, 10_000):
        os.link(tars / "0.tar", tars / f"{number}.tar")
    words = [sys.executable, indexing_child.__file__, str(tmp_path / "root"), str(tars)]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not list((tmp_path / "root").rglob("listing/*.arrow")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    below = psutil.Process(process.pid).children(recursive=True)
    assert any("Looker" in words_of(each) for each in below)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 128 + signal.SIGINT
    assert "interrupted" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(below, timeout=END_SECONDS)[1]
