"""A complete cache root that one may only read: a build finds nothing to do, and says so."""

import os
import shutil
import subprocess
import sys

import pytest
from support import read_only_child
from support.small_caches import build, data_files, job, pictures, write_folder

START_SECONDS = 240.0  # torch, and Prefect with its server, on a busy machine

OWNER = 4001
"""Whose root it is."""
POWERLESS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--"]
"""Has even root obey the rights of files: another user could not read this Python's own modules."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="only root gives files away"
)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", pytest.param("flow", marks=pytest.mark.prefect)])
def test_a_complete_root_that_one_may_only_read_has_no_shard_to_build(tmp_path, emoji, how):
    source = write_folder(tmp_path / "images", pictures(emoji, 6))
    build(job(tmp_path / "root", source))
    before = data_files(tmp_path / "root")
    for path in (tmp_path / "root", *(tmp_path / "root").rglob("*")):
        os.chown(path, OWNER, OWNER)
    home = tmp_path / "home"
    home.mkdir()
    words = [str(tmp_path / "root"), source.path, how, str(home)]
    done = subprocess.run(
        [*POWERLESS, sys.executable, read_only_child.__file__, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=START_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "0 shards computed, 0 invalid rows" in done.stdout
    assert data_files(tmp_path / "root") == before
    assert not [path for path in (tmp_path / "root").rglob("*") if path.stat().st_uid != OWNER]
