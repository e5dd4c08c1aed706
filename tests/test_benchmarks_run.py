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
        ["--images", "16", "--resolution", "96", "--quick"],
        {"teacher", "codec", "bpfp", "decode_gb_per_s"},
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
    "fetch": (
        ["--ranks", "2", "--objects", "4", "--scale", "512"],
        {"ranks", "requests", "fetched", "streams", "share_of_link"},
    ),
    "indexing": (
        ["--images", "300", "12000", "--workers", "1"],
        {"images", "workers", "images_per_s", "anonymous_mb", "again_seconds", "again_mb"},
    ),
    "lanes": (
        ["--pictures", "40000", "80000", "--nodes", "4", "--lanes", "1", "16", "--batch", "64"],
        {"pictures", "lanes"},  # a row has either measures of a batch, or bytes, or both
    ),
    "opening": (
        ["--rows", "20000", "--shards", "200"],
        {"rows", "shards", "records", "open_seconds", "list_seconds", "anonymous_mb"},
    ),
    "pixels": (
        ["--views", "2", "--resolution", "64"],
        {"coding", "of_raw", "psnr_db", "worst_db", "decode_ms"},
    ),
    "scale": (
        ["--rows", "1000", "20000"],
        {"rows", "shards", "open_seconds", "first_batch_seconds", "rss_mb"},
    ),
}


FAULTS = [
    "writer killed",
    "training worker killed",
    "training worker terminated",
    "disk full, build",
    "patches flipped",
    "rows deleted",
    "sample segment truncated",
    "spec exchanged",
    "two builders at once",
    "stale locks",
    "checkpoint truncated",
    "bucket, writer killed",
    "bucket, object truncated",
    "bucket, mirror's copy flipped",
]


def measured(name: str, arguments: list[str], written: Path) -> object:
    """Run a benchmark; return what it wrote."""
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr + run.stdout
    return json.loads(written.read_text())


@pytest.mark.slow
def test_faults_lose_nothing(tmp_path):
    arguments = ["--rounds", str(len(FAULTS)), "--seed", "3", "--kinds", *FAULTS]
    found = measured("faults", arguments, tmp_path / "faults.json")
    assert found["rounds"] == len(FAULTS)
    assert set(found["kinds"]) == set(FAULTS)
    for name in ("lost_rows", "duplicate_rows", "silent_differences", "failures"):
        assert found[name] == 0, name
    assert found["refusals"] >= 4  # a row, a table, a segment and a checkpoint, each by its name
    assert found["kinds"]["checkpoint truncated"]["refusals"] == 1
    assert found["max_shards_redone_per_actor"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_benchmark_writes_its_rows(name, tmp_path):
    arguments, keys = SMALL[name]
    rows = measured(name, arguments, tmp_path / "rows.json")
    assert rows
    assert all(keys <= row.keys() for row in rows)
