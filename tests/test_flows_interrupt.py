"""Ctrl-C as a person presses it: a sentence, exit code 130, nothing left, and it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_flows_run import ROOT, TINY

PATIENCE_SECONDS = 400
END_SECONDS = 5.0
MOST_LINES = 5

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the demo's images."""
    home = tmp_path_factory.mktemp("home")
    (home / "examples").symlink_to(ROOT / "examples")
    return home


def command(words: list[str]) -> list[str]:
    asked = (*TINY, "stages.stage2.steps=100", "stages.stage2.log_every=1")
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
    ("words", "begun"),
    [
        (["cache", "build", "demo_stage2"], "runs/cache/**/moments.arrow"),
        (["run", "demo_stage2"], "runs/demo_stage2/stage2/metrics.jsonl"),
    ],
    ids=["build", "training"],
)
def test_an_interrupt_ends_it_at_once_and_the_same_command_goes_on(home, words, begun):
    log = home / f"{words[0]}.log"
    marker = f"{words[0]} {os.getpid()}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(words),
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
        os.killpg(process.pid, signal.SIGINT)  # the terminal's: to the whole foreground group
        code = process.wait(timeout=60)
        took = time.monotonic() - pressed
    said = log.read_text().splitlines()[before:]
    assert code == 130
    assert took < END_SECONDS, said
    assert "interrupted; the same command goes on from here: " in "\n".join(said)
    assert len([line for line in said if line.strip()]) <= MOST_LINES, said
    assert "Traceback" not in log.read_text()
    while below(marker) and time.monotonic() - pressed < 2 * END_SECONDS:
        time.sleep(0.1)  # the last are being reaped
    assert below(marker) == []
    assert not list(home.rglob(".job-*"))
    again = subprocess.run(
        command(words),
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert again.returncode == 0, again.stderr
