"""A builder killed between any two file operations, or in the middle of a write, loses nothing."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "support" / "crash_child.py"
MEMORY = Path("/dev/shm")  # a file system in memory: the 400 builds wait for no disk


@pytest.mark.slow
def test_killed_anywhere_then_rerun_gives_the_same_bytes(tmp_path):
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        run = subprocess.run(
            [sys.executable, CHILD, folder],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "POLARS_MAX_THREADS": "1"},
        )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["operations"] > 100
    assert result["failures"] == []
