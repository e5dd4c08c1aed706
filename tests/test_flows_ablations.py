"""Flow `ablations`: a sweep on a temporary Prefect server; what is there is not computed again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import toy_sweep

PATIENCE_SECONDS = 500
CHILD = """
import json, sys
from pathlib import Path
from flows.commands.runs import prefect_settings
prefect_settings(Path(sys.argv[1]))
from support import toy_sweep
toy_sweep.install(Path(sys.argv[1]))
from flows.ablations import ablations
print(json.dumps(ablations(sys.argv[2])))
"""

pytestmark = [pytest.mark.slow, pytest.mark.prefect]


def run(folder: Path, path: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def test_a_flow_works_a_sweep_and_leaves_its_table(tmp_path):
    path = toy_sweep.sweep(tmp_path, axes={"width": toy_sweep.WIDTHS})
    first = run(tmp_path, path)
    assert first.returncode == 0, first.stderr
    rows = json.loads(first.stdout)
    assert {row["width"] for row in rows if row["seeds"]} == {"w8", "w16", "w24"}
    assert rows[0]["width"] == "raw pixels"
    assert (tmp_path / "toy_stages" / "results.parquet").is_file()
    assert (tmp_path / "toy_stages" / "results.html").is_file()
    again = run(tmp_path, path)
    assert again.returncode == 0, again.stderr
    assert "0 nodes computed here, 8 were there" in again.stderr
    assert again.stdout == first.stdout
