"""Every benchmark runs, small, and writes the rows that its head promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300

SMALL = {
    "read": (
        [
            "--gigabytes",
            "0.02",
            "--seconds",
            "0.2",
            "--peers",
            "numpy.memmap",
            "eupe",
            "tensorstore",
        ],
        {"name", "mode", "access", "gb_per_s", "ratio_to_memmap", "version"},
    ),
    "codec": (
        ["--images", "16", "--resolution", "96"],
        {"teacher", "codec", "bits_per_coefficient", "cosine", "cosine_worst", "r2", "bound_r2"},
    ),
    "step": (
        ["--teachers", "efficientnet_lite2", "--codecs", "rot4", "--batch", "2", "--rounds", "2"],
        {"teacher", "codec", "a_seconds", "d_seconds", "ideal_ratio", "c_over_b", "wait_share"},
    ),
    "proxy_step": (
        ["--depth", "1", "--resolution", "64"],
        {"parameters", "forward_seconds", "backward_seconds", "peak_gib"},
    ),
    "extract": (["--images", "8", "--pairs", "1"], {"name", "images_per_s", "ratio_to_loop"}),
    "scale": (
        ["--rows", "1000", "20000"],
        {"rows", "shards", "open_seconds", "first_batch_seconds", "rss_mb"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_writes_its_rows(name, tmp_path):
    arguments, keys = SMALL[name]
    table = tmp_path / "rows.json"
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(table)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    rows = json.loads(table.read_text())
    assert rows
    assert all(keys <= row.keys() for row in rows)
