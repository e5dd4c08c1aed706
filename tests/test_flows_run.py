"""`eupe run`: a whole recipe through the flows, on a temporary Prefect server and a local Ray."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from support.small_demo import TINY, eupe

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 500
DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), DEAD)
"""Nothing of a run goes through a proxy: neither Prefect nor Ray is anywhere but here."""

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


def run(home: Path, *words: str) -> subprocess.CompletedProcess:
    """Run a command beside a dead proxy."""
    sets = [word for item in TINY for word in ("--set", item)]
    return eupe(home, *words, *sets, seconds=PATIENCE_SECONDS, **PROXIES)


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
    assert "9 shards computed" in first.stderr  # 3 jobs x 2 teachers and the pixels, one shard each
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
    assert "nothing to do: all of it is there, of this recipe and these images" in again.stderr
    assert "Training" not in again.stderr
    assert (home / "runs/demo_stage2/stage2/metrics.jsonl").read_bytes() == metrics
    assert again.stdout == first.stdout  # the seconds too: nothing was evaluated again
    assert "Encoders:" in first.stderr


def test_evaluate_alone_finds_the_same(first, home):
    assert first.returncode == 0
    judged = run(home, "evaluate", "demo_stage2", "--json")
    assert judged.returncode == 0, judged.stderr
    before = json.loads(first.stdout)
    again = json.loads(judged.stdout)
    assert {key: before[key] for key in again} == again
    assert again["encoders"]["efficientnet_lite2"]["resolution"] == 160


def test_a_changed_recipe_says_what_is_old_and_trains_it_again(first, home):
    """Last in this file: the run names another stage 2 from here on."""
    assert first.returncode == 0
    before = (home / "runs/demo_stage2/stage2").resolve()
    words = ["run", "demo_stage2", "--json", "--set", "stages.stage2.head_hidden=8"]
    other = run(home, *words, "--set", "run_directory=runs/other")
    assert other.returncode == 0, other.stderr
    assert re.search(r"stage2-\w+: to do\n", other.stderr)
    again = run(home, "run", "demo_stage2", "--set", "stages.stage2.head_hidden=8")
    assert again.returncode == 0, again.stderr
    assert "stage.head_hidden is 8, was 256" in again.stderr
    assert (home / "runs/demo_stage2/stage2").samefile(home / "runs/other/stage2")
    assert "Training" not in again.stderr  # the other run had it trained
    seconds = [
        json.loads((home / f"runs/{name}/summary.json").read_text())["seconds"]
        for name in ("other", "demo_stage2")
    ]
    assert seconds[1]["stage2"] > 0  # as long as it took, not as it took to find
    assert before.is_dir()
