"""The benchmark of a GPU runs, small, without GPU, Ray or Prefect; a fault costs one row."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bench import Bench, Busy, covered

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 300
WITHOUT_RAY = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "prefect"):
            raise ModuleNotFoundError(f"{name} is not here", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


@pytest.mark.slow
def test_it_runs_small_without_gpu_ray_or_prefect(tmp_path):
    written = tmp_path / "gpu.json"
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, "--cpu", "--json", str(written)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr + run.stdout
    found = json.loads(written.read_text())
    assert found["ended"]
    assert list(found["sections"]) == list(gpu.SHARES)
    for name, section in found["sections"].items():
        assert section["rows"], name
        assert not section["faults"]
        assert not section["left_out"]
        for row in section["rows"]:
            assert set(gpu.TABLES.get(name, ())) <= set(row), name
    errors = [row["token_error"] for row in found["sections"]["codecs"]["rows"]]
    assert max(errors) < 1e-3
    assert "c_over_b" in run.stdout


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(
        torch.device("cpu"), True, time.monotonic() + 60, tmp_path, tmp_path / "found.json"
    )


def test_a_fault_is_written_down_and_the_rest_is_measured(bench):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with bench.section("first", 60):
        bench.do("broken", broken)
        bench.do("whole", lambda: [{"what": 1}])
        raise ValueError("outside of any measurement")
    with bench.section("second", 60):
        bench.do("whole", lambda: [{"what": 2}])
    found = json.loads(bench.path.read_text())["sections"]
    assert [row["what"] for row in found["first"]["rows"]] == [1]
    assert [row["what"] for row in found["second"]["rows"]] == [2]
    assert "illegal memory access" in found["first"]["faults"]["broken"]
    assert "outside of any" in found["first"]["faults"]["first"]
    assert gpu.report(bench) == 1


def test_what_there_is_no_time_for_is_named(bench):
    with bench.section("late", 0.0):
        bench.do("one", lambda: [{"what": 1}])
    assert bench.left_out == {"late": ["one"]}
    assert bench.rows("late") == []
    assert gpu.report(bench) == 0


def test_labels_pick_and_the_others_are_not_left_out(bench):
    bench.labels = ["at 256", "grid1"]
    with bench.section("step", 60):
        for label in ("vit at 256, compiled True", "vit at 512, compiled True", "grid1", "rot4"):
            bench.do(label, lambda label=label: [{"what": label}])
    assert [row["what"] for row in bench.rows("step")] == ["vit at 256, compiled True", "grid1"]
    assert bench.left_out == {}


def test_every_measurement_is_in_the_file_before_the_next_begins(bench):
    def look():
        there = json.loads(bench.path.read_text())
        return [{"seen": [row["what"] for row in there["sections"]["one"]["rows"]]}]

    with bench.section("one", 60):
        bench.do("first", lambda: [{"what": 1}])
        bench.do("second", look)
    assert bench.rows("one")[1]["seen"] == [1]


def test_time_that_spans_share_is_covered_once():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    assert Busy(0.2, 0.1, 0.25, 7).idle_share(1.0) == 0.75
    assert Busy(0.2, 0.1, 0.25, 7).idle_share(0.2) == 0  # profiled steps are the slower ones


def test_the_profiler_sees_what_runs(bench):
    a = torch.randn(600, 600)
    busy = bench.busy(lambda: a @ a, calls=2)
    assert busy.kernels >= 1
    assert busy.seconds == busy.any_seconds > 0
    assert busy.copy_seconds == 0
