"""`eupe run` with caches and run in a bucket: whole on one machine, found by another one."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.bucket_server import NAME
from support.small_demo import TINY, eupe

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 900

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


def on(home: Path, machine: str, *words: str) -> subprocess.CompletedProcess:
    """Run a command in a folder that has the images alone, on a machine of that name."""
    if not (home / "examples").exists():
        (home / "examples").symlink_to(ROOT / "examples")
    disk = home / "disks" / machine
    places = {"EUPE_RUN_COPIES": str(disk / "copies"), "EUPE_MIRROR": str(disk / "mirror")}
    return eupe(home, *words, seconds=PATIENCE_SECONDS, **places)


def test_a_run_is_in_the_bucket_and_a_new_machine_has_nothing_to_do(s3, tmp_path):
    place = f"s3://{NAME}/flows"
    sets = [*TINY, f"cache_root={place}/cache", f"run_directory={place}/runs/demo"]
    words = [word for item in sets for word in ("--set", item)]
    first = on(tmp_path, "first", "run", "demo_stage2", "--json", *words)
    assert first.returncode == 0, first.stderr
    assert "Training stage2: 2/2 steps" in first.stderr
    assert not (tmp_path / "runs" / "demo").exists()
    second = on(tmp_path, "second", "run", "demo_stage2", "--json", *words)
    assert second.returncode == 0, second.stderr
    assert "nothing to do: all of it is there, of this recipe and these images" in second.stderr
    assert json.loads(second.stdout) == json.loads(first.stdout)
    run, pictures = f"{place}/runs/demo", tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (48, 48), (90 * number, 40, 0)).save(pictures / f"{number}.png")
    answers = dict[str, Any]()
    for machine, *asked in (
        ("third", "compare", run),
        ("fourth", "export", run, "--to", "taken"),
        ("fifth", "encode", "pictures", "--model", run, "--out", "pictures.parquet"),
        ("sixth", "evaluate", "demo_stage2", "--model", run, *words),
        ("seventh", "doctor", "demo_stage2", *words),
        ("eighth", "report", "demo_stage2", *words),
    ):
        said = on(tmp_path, machine, *asked, "--json")
        assert said.returncode == 0, said.stderr
        answers[asked[0]] = json.loads(said.stdout)
    assert answers["encode"]["pictures"] == 3
    assert answers["doctor"]["findings"] == []
    assert answers["report"] == json.loads(first.stdout)
    assert (tmp_path / "taken" / "model.safetensors").is_file()
    assert not (tmp_path / "s3:").exists()


def test_a_bucket_that_is_not_there_is_said_before_anything_is_built(s3, tmp_path):
    for command in ("run", "report", "evaluate", "train"):
        there = ("--set", "run_directory=s3://no-such/runs/demo")
        said = on(tmp_path, "first", command, "demo_stage2", *there)
        assert said.returncode == 2
        assert "there is no bucket 'no-such'" in said.stderr
        assert len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert not (tmp_path / "runs" / "cache").exists()
