"""Ctrl-C as a person presses it, SIGTERM as a batch system sends it: a sentence, and it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_flows_run import ROOT, TINY

from pipelines.machines import interrupt
from pipelines.records import checkpoint

PATIENCE_SECONDS = 400
END_SECONDS = {signal.SIGINT: 20.0, signal.SIGTERM: 30.0}  # 4 and 5 without other work
MOST_LINES = 5
STEPS = 100

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's images."""
    home = tmp_path_factory.mktemp("home")
    (home / "examples").symlink_to(ROOT / "examples")
    return home


def command(words: list[str], number: signal.Signals) -> list[str]:
    """Return a command; each signal's has a run of its own, of the same caches."""
    stage = (f"steps={STEPS}", "log_every=1", f"checkpoint_every={STEPS}")
    own = (f"seed={number}", f"run_directory=runs/{number.name}")
    asked = (*TINY, *own, *(f"stages.stage2.{each}" for each in stage))
    sets = [word for item in asked for word in ("--set", item)]
    return [sys.executable, "-m", "flows.cli", *words, *sets]


def below(marker: str) -> list[psutil.Process]:
    """Every process that inherited the marker, re-parented ones included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("INTERRUPTED_TEST") == marker:
                found.append(process)
        except psutil.Error:
            continue
    return [each for each in found if each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("number", "words", "begun"),
    [
        (signal.SIGINT, ["cache", "build", "demo_stage2"], "runs/cache/**/moments.arrow"),
        (signal.SIGTERM, ["run", "demo_stage2"], "runs/SIGTERM/stage2/metrics.jsonl"),
        (signal.SIGINT, ["run", "demo_stage2"], "runs/SIGINT/stage2/metrics.jsonl"),
    ],
    ids=["build", "preempted", "training"],
)
def test_a_signal_ends_it_and_the_same_command_goes_on(home, number, words, begun):
    log = home / f"{words[0]}-{number.name}.log"
    marker = f"{words[0]} {number} {os.getpid()}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(words, number),
            cwd=home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "INTERRUPTED_TEST": marker},
            # A test run in the background of a shell ignores SIGINT, and its children would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list(home.glob(begun)):
            assert time.monotonic() < deadline, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        before = len(log.read_text().splitlines())
        pressed = time.monotonic()
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # the terminal's: to the whole foreground group
        else:
            process.send_signal(number)  # to the command alone
        code = process.wait(timeout=PATIENCE_SECONDS)
        took = time.monotonic() - pressed
    said = log.read_text().splitlines()[before:]
    assert code == 128 + number
    assert took < END_SECONDS[number], said
    assert f"{interrupt.SAID[number]}; the same command goes on from here: " in "\n".join(said)
    assert len([line for line in said if line.strip()]) <= MOST_LINES, said
    assert "Traceback" not in log.read_text()
    while below(marker) and time.monotonic() - pressed < 2 * END_SECONDS[number]:
        time.sleep(0.1)  # the last are being reaped
    assert below(marker) == []
    assert not list(home.rglob(".job-*"))
    saved = checkpoint.latest(home / f"runs/{number.name}/stage2")
    if number is signal.SIGTERM:
        assert saved is not None, "what was trained is lost"
        assert saved.step < STEPS, "it was not ended"
    else:
        assert saved is None
    again = subprocess.run(
        command(words, number),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert again.returncode == 0, again.stderr
