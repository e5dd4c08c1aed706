"""Trackers: figures in files that survive kills and resumes."""

import json

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.records import tracking
from pipelines.records.tracking import JsonLines


def test_figures_are_read_back_in_order(tmp_path):
    tracker = JsonLines(tmp_path / "metrics.jsonl", 1)
    tracker.log(1, {"loss/total": 2.5})
    tracker.log(2, {"loss/total": 2.0, "lr": 0.1})
    assert tracking.read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss/total": 2.5},
        {"step": 2, "loss/total": 2.0, "lr": 0.1},
    ]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JsonLines(path, 1)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.close()
    second = JsonLines(path, 3)
    second.log(3, {"loss": 30.0})
    assert [line["loss"] for line in tracking.read(path)] == [1.0, 2.0, 30.0]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert tracking.read(path) == [{"step": 1}]
    JsonLines(path, 2).log(2, {"loss": 1.0})
    assert [line["step"] for line in tracking.read(path)] == [1, 2]


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        tracking.read(path)


def test_what_is_not_finite_is_null_not_invalid_json(tmp_path):
    JsonLines(tmp_path / "m.jsonl", 1).log(1, {"loss": float("nan"), "lr": float("inf")})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "loss": None, "lr": None}


def test_tensorboard_reads_what_the_lines_say(tmp_path):
    """Read by TensorBoard's own reader; its values are float32."""
    logged = {1: {"loss/total": 1.25, "lr": 3e-3}, 3: {"loss/total": 0.5}, 4: {"score": -7.0}}
    trackers = tracking.open_trackers(tmp_path, 1)
    for step, figures in logged.items():
        trackers.log(step, figures)
    trackers.close()
    lines = tracking.read(tmp_path / tracking.METRICS_FILE)
    assert lines == [{"step": step, **figures} for step, figures in logged.items()]
    events = EventAccumulator(str(tmp_path / tracking.EVENTS_DIRECTORY)).Reload()
    shown = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    wanted = {
        (line["step"], name): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name != "step"
    }
    assert shown == wanted
