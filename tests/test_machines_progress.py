"""Progress reaches a listener here, and through the job folder of another process."""

import io
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict

import pytest
from rich.console import Console

from pipelines.machines import job_folder, progress
from pipelines.machines.progress import Reading, followed, set_listener, track

PATIENCE_SECONDS = 300

CHILD = """
import sys
import time
from pipelines.machines.progress import track
print("before", file=sys.stderr)
with track(3, "Counting", "sheep") as progress:
    progress.advance()
    progress.note("black")
    with track(1, "Feeding", "sheep") as inner:
        inner.advance()
    progress.advance(2)
print("after", file=sys.stderr)
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


def child(folder: str) -> str:
    """Run CHILD with a job folder and return what it says on stderr."""
    return subprocess.run(
        [sys.executable, "-c", CHILD],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, job_folder.VARIABLE: folder},
        timeout=PATIENCE_SECONDS,
    ).stderr


def test_another_process_is_shown_as_if_it_were_here(heard, tmp_path, capsys):
    with job_folder.made(tmp_path, "sheep") as folder, followed(folder):
        assert child(str(folder)) == "before\nafter\n"
    ended = {reading.description: reading for reading in heard if reading.finished}
    assert [(name, step.done, step.note) for name, step in sorted(ended.items())] == [
        ("Counting", 3, "black"),
        ("Feeding", 1, ""),
    ]
    assert "Counting: 3/3 sheep" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_that_do_the_same_says_nothing(tmp_path):
    assert child("") == "before\nafter\n"


def test_a_step_is_shown_once_however_often_it_is_looked_at(heard, tmp_path):
    steps = progress._Followed(heard.append)
    going = asdict(Reading("Counting", "sheep", 1, 3, 0.5))
    over = asdict(Reading("Counting", "sheep", 3, 3, 0.9, finished=True))
    for seen in (going, going, over, over, going):  # the last: the same step done again
        steps.show([seen])
    assert [(reading.done, reading.finished) for reading in heard] == [
        (1, False),
        (3, True),
        (1, False),
    ]
    steps.close()


def test_a_process_that_dies_halfway_ends_its_step(heard, monkeypatch, tmp_path):
    """What shows the step, a bar say, is left: else it would spin on for ever."""
    seen: list[object] = []

    @contextmanager
    def shown(total, description, unit):
        seen.append(("begun", total, description, unit))
        yield lambda reading: seen.append(reading.done)
        seen.append("ended")

    monkeypatch.setattr(progress, "_shown", shown)
    step = asdict(Reading("Counting", "sheep", 1, 3, 0.5))
    with followed(tmp_path):
        job_folder.write(tmp_path, job_folder.PROGRESS, [step])
        assert "ended" not in seen
    assert seen == [("begun", 3, "Counting", "sheep"), 1, "ended"]
    assert [reading.done for reading in heard] == [1]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(job_folder.VARIABLE, str(tmp_path / "file"))
    for _ in range(2):
        with track(2, "Counting", "sheep") as step:
            step.advance(2)
    assert capsys.readouterr().err.count("is not told") == 1


def test_a_folder_that_nobody_waits_at_any_more_is_not_made_again(tmp_path):
    assert not job_folder.write(tmp_path / "gone", job_folder.PROGRESS, [])
    assert list(tmp_path.iterdir()) == []
    assert job_folder.read(tmp_path / "gone", job_folder.PROGRESS) is None


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


def test_folders_that_killed_processes_left_go_when_they_are_old(tmp_path):
    old, young = tmp_path / ".job-a-00000000", tmp_path / ".job-a-00000001"
    for folder in (old, young):
        folder.mkdir()
        (folder / job_folder.PROGRESS).write_text("[1]")
    os.utime(old, (0, 0))
    with job_folder.made(tmp_path, "a") as ours:
        assert sorted(tmp_path.iterdir()) == sorted([ours, young])


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_bar_shows_count_rate_and_time_left_however_narrow_the_screen(width):
    """And what it is of, as far as there is room; brackets in it are no markup."""
    screen = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    long = "Extracting imagenet-train[/x]/0123456789ab/efficientnet_lite0 at 256 and 384 pixels"
    with progress._bar(screen, 1_281_167, long, "images") as shown:
        for done in (0, 1000, 2000):
            shown(
                Reading(long, "images", done, 1_281_167, done / 100, note="loss 1.2345, 8 others")
            )
            time.sleep(0.02)  # of no time at all rich gives no rate
    last = screen.file.getvalue().split("\r")[-1]
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).strip()
    assert len(line) <= width
    assert "2000/1281167" in line
    assert re.search(r"[\d.]+ images/s", line)
    assert re.search(r"\d:\d\d:\d\d", line)
    assert line.startswith("Extract")
