"""The example: raw pixels judged as the demo's student is, to the figure that the README names."""

import subprocess
import sys
from pathlib import Path

import pytest

PATIENCE_SECONDS = 300

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_raw_pixels_have_what_the_readme_says():
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples/raw_pixels.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert run.stdout.startswith("kNN top-1 of raw 16 x 16 pixels: 56.0% (category, k = 10, 475 ")
    assert "16 x 16 pixels have 56.0 %" in (ROOT / "README.md").read_text()
