"""Bars in a real terminal of 80 columns: tmux draws it, and is asked what stands there."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="wants tmux (apt-get install tmux)"),
]

PATIENCE_SECONDS = 60.0
STEPS = {
    "Indexing /home/somebody/eupe/examples/emoji/emoji.parquet": "images",
    "Measuring moments of emoji-train, 4 augmented view(s), lite0 + lite2": "images",
    "Extracting emoji-train, 4 augmented view(s), efficientnet_lite0": "images",
    "Verifying emoji-train/2953a569e024/efficientnet_lite0-f21665beec4c/128": "shards",
    "Training stage1": "steps",
}
"""The demo's longest descriptions."""
CHILD = """
import sys, time
from pipelines.machines.progress import track
with track(123456, sys.argv[1], sys.argv[2]) as step:
    step.note("loss 1.234, efficientnet_lite0 0.567, efficientnet_lite2 0.678")
    for _ in range(10000):
        step.advance(3)
        time.sleep(0.05)
"""


def tmux(*words: str) -> str:
    run = subprocess.run(
        ["tmux", *words], capture_output=True, text=True, check=True, timeout=PATIENCE_SECONDS
    )
    return run.stdout


@pytest.fixture
def screen() -> Iterator[list[str]]:
    """The words that name a server of tmux of our own."""
    server = ["-L", f"eupe-{uuid4().hex[:8]}"]
    yield server
    subprocess.run(
        ["tmux", *server, "kill-server"], capture_output=True, check=False, timeout=PATIENCE_SECONDS
    )


@pytest.mark.parametrize("description", STEPS)
def test_a_bar_of_80_columns_shows_count_rate_and_time_left(
    screen: list[str], tmp_path: Path, description: str
):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    unit = STEPS[description]
    words = [sys.executable, str(child), description, unit]
    tmux(*screen, "new-session", "-d", "-x", "80", "-y", "24", *words)
    whole = re.compile(rf"\b\d+/123456 \d+\.\d {unit}/s \d+:\d\d:\d\d\b")
    deadline, seen = time.monotonic() + PATIENCE_SECONDS, ""
    while not whole.search(seen) and time.monotonic() < deadline:
        time.sleep(0.2)
        seen = tmux(*screen, "capture-pane", "-p")
    assert whole.search(seen), seen
    (line,) = [line for line in seen.splitlines() if line.strip()]  # one row, however long
    assert line.startswith(description[:8])
