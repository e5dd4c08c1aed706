"""What a flow shows: a Prefect server that is gone holds no work up."""

import pytest

from flows import artifacts
from pipelines.machines import progress

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
