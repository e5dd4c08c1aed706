"""`eupe run`: a whole recipe through the flows, on a temporary Prefect server and a local Ray."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 500

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]

# "Stage 2 only" of the demo, shrunk: 16 games to learn from, 26 held-out pictures, two steps.
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


def run(home: Path, *words: str) -> subprocess.CompletedProcess:
    sets = [word for item in TINY for word in ("--set", item)]
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, *sets],
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's images."""
    home = tmp_path_factory.mktemp("home")
    (home / "examples").symlink_to(ROOT / "examples")
    return home


@pytest.fixture(scope="module")
def first(home: Path) -> subprocess.CompletedProcess:
    """The run from nothing."""
    return run(home, "run", "demo_stage2", "--json")


def test_a_run_goes_from_images_to_a_summary(first, home):
    assert first.returncode == 0, first.stderr
    assert "6 shards computed" in first.stderr  # 3 jobs x 2 teachers, each one shard
    summary = json.loads(first.stdout)
    assert json.loads((home / "runs/demo_stage2/summary.json").read_text()) == summary
    assert (summary["images"], summary["training_steps"]) == (42, 2)
    assert summary["knn_top1"]["queries"] == 26
    assert {"teacher caches", "stage2", "evaluation"} <= set(summary["seconds"])
    page = (home / "runs/demo_stage2/report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/", "")  # loads nothing from anywhere
    assert re.search(r'(src|href)="?https?:|url\((?!#)|@import', page) is None


def test_progress_of_the_job_is_shown_as_progress(first, home):
    assert "Training stage2: 2/2 steps" in first.stderr
    assert not list(home.rglob(".job-*"))


def test_a_second_run_repeats_nothing(first, home):
    assert first.returncode == 0
    metrics = (home / "runs/demo_stage2/stage2/metrics.jsonl").read_bytes()
    again = run(home, "run", "demo_stage2", "--json")
    assert again.returncode == 0, again.stderr
    assert " 0 shards computed" not in first.stderr
    assert "\n0 shards computed" in again.stderr
    assert (home / "runs/demo_stage2/stage2/metrics.jsonl").read_bytes() == metrics
    assert again.stdout == first.stdout  # the seconds too: nothing was evaluated again
    assert "Encoders:" in first.stderr
    assert "Encoders:" not in again.stderr


def test_evaluate_alone_finds_the_same(first, home):
    assert first.returncode == 0
    judged = run(home, "evaluate", "demo_stage2", "--json")
    assert judged.returncode == 0, judged.stderr
    before = json.loads(first.stdout)
    again = json.loads(judged.stdout)
    assert {key: before[key] for key in again} == again
    assert again["encoders"]["efficientnet_lite2"]["resolution"] == 160


def test_a_checkpoint_of_another_run_is_refused_in_a_sentence(first, home):
    assert first.returncode == 0
    other = run(home, "train", "demo_stage2", "--set", "stages.stage2.optimizer.lr=1e-4")
    assert other.returncode == 2
    assert "lr" in other.stderr
    assert "Traceback" not in other.stderr
