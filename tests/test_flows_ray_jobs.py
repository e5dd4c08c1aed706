"""A Ray job's output streams and its exit code comes back; stopping us stops it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 120

SCRIPT = """
import sys
from flows.ray_jobs import job_cluster, run_job
with job_cluster() as address:
    for words in (["python", "-c", {code!r}], ["no-such-command"]):
        code = run_job(words, address, {{"GREETING": "hello"}}, sys.stdout.write)
        print("exit code", code, flush=True)
        if "--one" in sys.argv:
            break
"""


@pytest.mark.ray
@pytest.mark.slow
def test_output_streams_and_the_exit_code_is_the_drivers_own():
    code = "import os, sys; print(os.environ['GREETING'], 'from the job'); sys.exit(7)"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(code=code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    assert "hello from the job\n" in run.stdout
    assert "exit code 7\n" in run.stdout
    assert "exit code 127\n" in run.stdout  # what the shell says of a command that is not there


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_leaves_no_job_behind(number, tmp_path):
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(code=code), "--one"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A test run in the background of a shell ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline, "the job never started"
            assert driver.poll() is None
            time.sleep(0.2)
        job = psutil.Process(int(pid_file.read_text()))
        if number == signal.SIGINT:
            os.killpg(driver.pid, number)  # as a terminal does it
        else:
            driver.send_signal(number)  # as a Prefect worker does it
        driver.wait(timeout=PATIENCE_SECONDS)
        _, alive = psutil.wait_procs([job], timeout=30)
        assert alive == []
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
