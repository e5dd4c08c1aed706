"""The example: a store read four ways; where there is none, a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.toy_stores import Toy, ids

PATIENCE_SECONDS = 300

EXAMPLE = Path(__file__).parents[1] / "examples" / "read_a_store.py"


def example(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), str(root)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "rot4"])
def test_all_readers_agree(tmp_path, codec):
    toy = Toy(tmp_path, codec, bad={"a/005": "no image"})
    toy.add_samples(ids(12))
    toy.build(num_views=2)
    shown = example(tmp_path)
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.splitlines() if line.startswith("  view")]
    assert len(lines) == 2
    assert all("equal through our reader and polars; 1 rows invalid" in line for line in lines)


def test_a_folder_without_a_store_is_named(tmp_path):
    shown = example(tmp_path)
    assert shown.returncode == 2
    assert "no built store below this folder" in shown.stderr
