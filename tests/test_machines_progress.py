"""Progress reaches a listener here, and through the output of another process."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from pipelines.machines import progress
from pipelines.machines.progress import Reading, Relay, set_listener, track

CHILD = """
import sys
from pipelines.machines.progress import track
print("before", file=sys.stderr)
with track(3, "Counting", "sheep") as progress:
    for _ in range(3):
        progress.advance()
print("after, without a newline", end="", file=sys.stderr)
"""


@pytest.fixture
def heard():
    readings: list[Reading] = []
    set_listener(readings.append)
    yield readings
    set_listener(None)


def test_a_listener_hears_the_beginning_and_the_end(heard):
    with track(5, "Counting", "sheep") as progress:
        for _ in range(5):
            progress.advance()
    assert heard[0].done == 1
    assert (heard[-1].done, heard[-1].total, heard[-1].finished) == (5, 5, True)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_another_process_is_shown_as_if_it_were_here(heard, size, monkeypatch):
    monkeypatch.setenv("EUPE_PROGRESS", "records")
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True
    )
    monkeypatch.delenv("EUPE_PROGRESS")
    said: list[str] = []
    with Relay(said.append) as relay:
        for start in range(0, len(child.stderr), size):
            relay.feed(child.stderr[start : start + size])
    assert said == ["before\n", "after, without a newline"]
    assert heard[-1].description == "Counting"
    assert (heard[-1].done, heard[-1].finished) == (3, True)


def test_a_process_that_dies_halfway_ends_its_step(heard, monkeypatch):
    """What shows the step, a bar say, is left: else it would spin on for ever."""
    seen: list[object] = []

    @contextmanager
    def shown(total, description, unit):
        seen.append(("begun", total, description, unit))
        yield lambda reading: seen.append(reading.done)
        seen.append("ended")

    monkeypatch.setattr(progress, "_shown", shown)
    with Relay(lambda line: None) as relay:
        relay.feed(
            '@progress {"description": "Counting", "unit": "sheep", "done": 1, "total": 3, '
            '"seconds": 0.5, "finished": false}\n'
        )
        assert "ended" not in seen
    assert seen == [("begun", 3, "Counting", "sheep"), 1, "ended"]
    assert [reading.done for reading in heard] == [1]


def test_a_step_says_how_it_goes(heard):
    with track(2, "Training", "steps") as progress:
        progress.note("loss 1.500")
        progress.advance()
    assert heard[-1].note == "loss 1.500"
    reading = Reading("Training", "steps", 1, 2, 4.0, note="loss 1.500")
    assert str(reading) == "Training: 1/2 steps, 0.2 steps/s, 4 s left; loss 1.500"


def test_what_an_earlier_start_did_counts_and_does_not_make_the_rate(heard):
    with track(10, "Training", "steps", before=6) as progress:
        progress.advance(2)
    assert (heard[-1].done, heard[-1].total) == (8, 10)
    reading = Reading("Training", "steps", 8, 10, 4.0, before=6)
    assert (reading.rate, reading.eta_seconds) == (0.5, 4.0)


def test_a_record_that_somebody_printed_into_is_an_ordinary_line(heard):
    said: list[str] = []
    with Relay(said.append) as relay:
        relay.feed('@progress {"description": "Counting", "unit": (raylet) hello\n')
        relay.feed('@progress {"unknown": 1}\n')
    assert [line.partition(" ")[0] for line in said] == ["@progress", "@progress"]
    assert heard == []
