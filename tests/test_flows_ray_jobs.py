"""A Ray job's output streams and its exit code comes back; stopping us stops it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 400
INTERRUPT_SECONDS = 60
"""On a busy machine; on an idle one it is the second that is given to stop the job."""

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


def output(script: str, **more: str) -> str:
    """Run a script in a process of its own, with more environment variables; return its stdout."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **more},
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


HEAD = """
import sys
import ray
from flows.ray_jobs import job_cluster
with job_cluster() as address:
    print("up", ray.get_runtime_context().gcs_address, address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A Ray in a process of its own: what names it to whoever is to use it."""
    words = [sys.executable, "-c", HEAD]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        late = threading.Timer(PATIENCE_SECONDS, process.kill)
        late.start()
        try:
            said = next(line.split() for line in process.stdout if line.startswith("up "))
            late.cancel()
            yield {"RAY_ADDRESS": said[1], "RAY_API_SERVER_ADDRESS": said[2]}
            process.communicate("", timeout=PATIENCE_SECONDS)
        finally:
            late.cancel()
            process.kill()  # nothing where it has ended


@pytest.mark.ray
@pytest.mark.slow
def test_output_streams_and_the_exit_code_is_the_drivers_own(head):
    code = "import os, sys; print(os.environ['GREETING'], 'from the job'); sys.exit(7)"
    said = output(SCRIPT.format(code=code), **head)
    assert "hello from the job\n" in said
    assert "exit code 7\n" in said
    assert "exit code 127\n" in said  # what the shell says of a command that is not there


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("head")
def test_a_second_ray_on_the_machine_takes_jobs_too():
    """Every Ray's job agent wants one port unless it is told otherwise."""
    said = output(SCRIPT.format(code="print('hello')"))
    assert "hello\nexit code 0\n" in said


GPU_SCRIPT = """
import sys
from flows import ray_jobs
ray_jobs.PENDING_SECONDS = 1.0
words = ["python", "-c", "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"]
with ray_jobs.job_cluster() as address:
    for gpus in (1, 2):
        print("exit code", ray_jobs.run_job(words, address, {}, sys.stdout.write, gpus))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_computes_runs_where_gpus_are_free_and_says_that_it_waits_for_them():
    said = output(
        GPU_SCRIPT,
        RAY_OVERRIDE_RESOURCES='{"GPU": 1}',  # Ray believes that this machine has one
        RAY_JOB_START_TIMEOUT_SECONDS="30",  # how long Ray lets a job wait for what it asks
    )
    first, second = said.split("exit code 0\n")
    assert first.endswith("sees 0\n")
    assert "may be waiting for resources" in second
    assert second.endswith("exit code 1\n")


RELAYED_SCRIPT = """
import contextlib, os, signal, socket, sys, threading, time
from flows import ray_jobs

fault = {fault!r}
ray_jobs.REQUEST_SECONDS = 2.0 if fault == "mute" else 300.0
ray_jobs.STOP_SECONDS = 1.0
MUTE_SECONDS = 5.0 if fault == "mute" else 300.0
connections, mute_until, pressed = [], 0.0, 0.0
# A test run in the background of a shell ignores SIGINT, and its children would too.
signal.signal(signal.SIGINT, signal.default_int_handler)

def pump(source, sink, mute):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if not mute.is_set():
                sink.sendall(data)
    if not mute.is_set():
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

def relay(listener, target):
    while True:
        near, _ = listener.accept()
        far, mute = socket.create_connection(target), threading.Event()
        connections.append((near, far, mute))
        if time.monotonic() < mute_until:
            mute.set()
        for ends in ((near, far), (far, near)):
            threading.Thread(target=pump, args=(*ends, mute), daemon=True).start()

def press():
    global pressed
    pressed = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

def say(chunk):
    global mute_until
    sys.stdout.write(chunk)
    if "line 1" not in chunk or mute_until:
        return
    mute_until = 1.0 if fault == "cut" else time.monotonic() + MUTE_SECONDS
    for near, far, mute in list(connections):
        if fault != "cut":
            mute.set()
            continue
        for end in (near, far):
            with contextlib.suppress(OSError):  # closed already
                end.shutdown(socket.SHUT_RDWR)
    if fault == "interrupt":
        threading.Timer(2.0, press).start()  # the next poll waits for its answer by then

code = "import time\\nfor n in range(6): print('line', n, flush=True); time.sleep(0.7)"
with ray_jobs.job_cluster() as address:
    host, port = address.removeprefix("http://").split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=relay, args=(listener, (host, int(port))), daemon=True).start()
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        del os.environ[name]  # Ray's client would ask there whatever it is given
    through = f"http://127.0.0.1:{{listener.getsockname()[1]}}"
    try:
        code = ray_jobs.run_job(["python", "-c", code], through, {{}}, say)
    except KeyboardInterrupt:
        code = f"none, {{time.monotonic() - pressed:.0f}} s after Ctrl-C"
    assert mute_until and len(connections) > 2, "the relay was passed by"
    print("exit code", code)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "mute"])
def test_a_connection_that_fails_neither_stops_the_job_nor_loses_a_line(head, fault):
    """Cut, or open and mute as when a machine is gone; others work, at once or after a while."""
    said = output(RELAYED_SCRIPT.format(fault=fault), **head)
    lines = [line for line in said.splitlines() if line.startswith(("line", "exit"))]
    assert lines == [*(f"line {n}" for n in range(6)), "exit code 0"]


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_a_driver_whose_job_api_is_mute(head):
    """A Ray of its own gets it, too, and the driver may be waiting for that one's next answer."""
    last = output(RELAYED_SCRIPT.format(fault="interrupt"), **head).splitlines()[-1]
    ended = re.fullmatch(r"exit code none, (\d+) s after Ctrl-C", last)
    assert ended is not None, last
    assert int(ended[1]) < INTERRUPT_SECONDS


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_driver_leaves_no_job_behind(number, tmp_path, head):
    """Ctrl-C, with a Ray of its own, which ends too; SIGTERM, with one that lives on."""
    pid_file = tmp_path / "pid"
    code = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(code=code), "--one"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **({} if number == signal.SIGINT else head)},
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
            driver.wait(PATIENCE_SECONDS)
