"""The demo, shrunk: 16 games to learn from, 26 held-out pictures, two steps of stage 2."""

import os
import subprocess
import sys
from pathlib import Path

TINY = [
    "num_views=1",
    "train.emoji-train.source.where={split: train, subcategory: game}",
    "held_out.source.where={split: test, category: Activities}",
    "extraction.moments_samples=4",
    "extraction.compute_batch=4",
    "stages.stage2.steps=2",
    "stages.stage2.global_batch=4",
    "stages.stage2.micro_batch=4",
    "stages.stage2.warmup_steps=0",
    "evaluation.k=1",
]


def eupe(
    home: Path, *words: str, seconds: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a working folder, with more in its environment; for so many seconds."""
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=home,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
