"""What a flow shows: a Prefect server that is gone holds no work up."""

import logging
from uuid import uuid4

import pytest

from eupe.errors import BadInput
from flows import artifacts
from pipelines.machines import once, progress

RETRIES_SECONDS = 62.0  # of Prefect's client, in five tries, before it gives up
STEP_SECONDS = 10.0


class Clock:
    """A clock that goes on by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(artifacts, "time", made)
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_server_that_is_gone_costs_a_tenth_of_the_time_and_is_named_once(
    clock, monkeypatch, capsys
):
    tries = []

    def gone(*arguments, **named):
        tries.append(clock.now)
        clock.now += RETRIES_SECONDS
        raise ConnectionError("refused")

    monkeypatch.setattr(artifacts, "create_progress_artifact", gone)
    with artifacts.progress("extract-missing"), progress.track(1000, "Extracting") as step:
        for _ in range(1000):
            clock.now += STEP_SECONDS
            step.advance()
    assert clock.now < 1000 * STEP_SECONDS * 1.15
    assert 10 < len(tries) < 20  # it is asked again: a server may come back
    assert capsys.readouterr().err.count("does not take the progress") == 1


def test_a_long_step_has_an_artifact_of_ten_readings_and_a_short_one_none(clock, monkeypatch):
    made, identity = [], uuid4()
    monkeypatch.setattr(
        artifacts, "create_progress_artifact", lambda *a, **k: made.append(a) or identity
    )
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda *a, **k: made.append(a))
    with artifacts.progress("extract-missing"):
        with progress.track(1000, "Extracting") as step:
            for _ in range(1000):
                clock.now += STEP_SECONDS
                step.advance()
        assert 10 <= len(made) <= 11
        assert made[-1][-1] == 100.0
        with progress.track(3, "Verifying") as step:
            step.advance(3)
    assert made[-1][-1] == 100.0
    assert len(made) <= 11


@pytest.fixture(autouse=True)
def _of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "_said", set())


def kept(
    error: Exception,
    text: str = "Encountered exception during execution: %r",
    runs: str = "flow_runs",
) -> object:
    """Return what is left of a record of Prefect's, as its handlers get it."""
    record = logging.LogRecord(
        f"prefect.{runs}", logging.ERROR, __file__, 1, text, (error,), (type(error), error, None)
    )
    return logging.getLogger(record.name).filter(record) and (record.getMessage(), record.exc_info)


def test_bad_input_is_logged_as_its_sentence_and_a_bug_with_its_traceback():
    assert kept(BadInput("no field 'x'")) == ("no field 'x'", None)
    bug = RuntimeError("a bug")
    assert kept(bug) == (
        "Encountered exception during execution: RuntimeError('a bug')",
        (RuntimeError, bug, None),
    )
    assert not kept(bug, "Finished in state %r")


def test_a_task_its_flow_and_the_engine_say_a_sentence_once():
    error = BadInput("no image there")
    assert kept(error, runs="task_runs") == ("no image there", None)
    assert not kept(error)
    assert not kept(error, "Execution of flow run exited with unexpected exception %r")
    assert kept(BadInput("another")) == ("another", None)
