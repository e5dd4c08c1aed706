"""A cache root that one may only read serves all that is there; what is missing is a sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import read_only_child, small_run
from support.small_caches import build, data_files, job, pictures, write_folder

START_SECONDS = 240.0  # torch, and Prefect with its server, on a busy machine

OWNER = 4001
"""Whose root it is."""
POWERLESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--"]
"""Has even root obey the rights of files: another user could not read this Python's own modules."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root gives files away"
)


def given_away(root: Path) -> None:
    """Make a cache root another user's."""
    for path in (root, *root.rglob("*")):
        os.chown(path, OWNER, OWNER)


def powerless(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run Python as a user who may read what others own, and write nothing of it."""
    return subprocess.run(
        [*POWERLESS, sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", pytest.param("flow", marks=pytest.mark.prefect)])
def test_a_complete_root_that_one_may_only_read_has_no_shard_to_build(tmp_path, emoji, how):
    source = write_folder(tmp_path / "images", pictures(emoji, 6))
    build(job(tmp_path / "root", source))
    before = data_files(tmp_path / "root")
    given_away(tmp_path / "root")
    home = tmp_path / "home"
    home.mkdir()
    words = [str(tmp_path / "root"), source.path, how, str(home)]
    done = powerless(read_only_child.__file__, *words)
    assert done.returncode == 0, done.stderr
    assert "0 shards computed, 0 invalid rows" in done.stdout
    assert data_files(tmp_path / "root") == before
    assert not [path for path in (tmp_path / "root").rglob("*") if path.stat().st_uid != OWNER]


@pytest.mark.slow
def test_what_is_missing_of_such_a_root_is_one_sentence_that_names_where(tmp_path, emoji):
    source = write_folder(tmp_path / "images", pictures(emoji, 6))
    build(job(tmp_path / "root", source))
    given_away(tmp_path / "root")
    before = data_files(tmp_path / "root")
    write_folder(tmp_path / "images", pictures(emoji, 8))  # two more
    done = powerless(
        read_only_child.__file__, str(tmp_path / "root"), source.path, "plain", str(tmp_path)
    )
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith(str(tmp_path / "root"))
    assert "cannot be written: Permission denied" in sentence
    assert "Traceback" not in done.stderr
    assert data_files(tmp_path / "root") == before


FROM_WHAT_IS_THERE = """
import sys
from pathlib import Path
from flows.cli import app
from pipelines.machines.errors import one_sentence
from pipelines.recipe import recipes
from support import small_run
run = small_run.recipe(Path(sys.argv[1]))
recipes.RECIPES["small_run"] = lambda: run
with one_sentence():
    for words in (["train", "small_run"], ["report", "small_run"]):
        app(words, standalone_mode=False)
"""


@pytest.mark.slow
def test_a_student_is_trained_and_judged_from_a_root_that_one_may_only_read(tmp_path):
    run = small_run.recipe(tmp_path)
    small_run.build(run, tmp_path)
    root = Path(run.cache_root)
    given_away(root)
    before = data_files(root)
    done = powerless("-c", FROM_WHAT_IS_THERE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (run.directory / "summary.json").is_file()
    assert data_files(root) == before
    assert not [path for path in root.rglob("*") if path.stat().st_uid != OWNER]
