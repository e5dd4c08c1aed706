"""`make up` keeps everybody else out and serves its owner; `make down` leaves nothing behind."""

import json
import os
import shlex
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.small_demo import TINY

from flows.local_stack import running

ROOT = Path(__file__).resolve().parents[1]
STACK = [sys.executable, "-m", "flows.local_stack"]
PATIENCE_SECONDS = 400
WATCHED_EVENTS = 60  # of Prefect's own, three a task
DEAD = "http://127.0.0.1:9"
PROXIES = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), DEAD)

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.prefect]

RUN_FLOW = (
    "prefect deployment run teacher-cache/default --watch --watch-timeout 300 "
    f"-p {shlex.quote('overrides=' + json.dumps(TINY))}"
)


def told(word: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Tell the stack of an environment to come up, or to go down."""
    return subprocess.run(
        [*STACK, word],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running stack, beside a dead proxy and below a TMPDIR too long for a socket; EUPE_HOME."""
    home = tmp_path_factory.mktemp("home")
    long = home / ("x" * 100)
    long.mkdir()
    (home / "examples").symlink_to(ROOT / "examples")  # the demo's images are below EUPE_HOME
    environment = {**os.environ, **PROXIES, "EUPE_HOME": str(home), "TMPDIR": str(long)}
    up = told("up", environment)
    try:
        assert up.returncode == 0, up.stderr
        short = Path((home / "runs/local/ray_folder").read_text().strip())
        assert (long / "ray").samefile(short / "ray")  # what Ray writes lies where it was told
        yield home
    finally:
        down = told("down", environment)
    assert down.returncode == 0, down.stderr
    assert running(home / "runs/local") == []
    assert not short.parent.exists()


def shell(home: Path, command: str) -> subprocess.CompletedProcess:
    """Run a command as a user does who has sourced the stack's env, from another folder."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "RAY_", "EUPE_HOME"))
    }
    return subprocess.run(
        ["sh", "-c", f". {home}/runs/local/env && {command}"],
        cwd=home,
        env=environment | PROXIES,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def test_the_environment_is_complete_and_the_token_private(stack):
    named = shell(stack, "env").stdout
    for name in ("PREFECT_API_URL", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        assert f"\n{name}=" in named
    token = stack / "runs/local/ray_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_the_job_api_refuses_whoever_has_no_token(stack):
    address = shell(stack, 'printf %s "$RAY_API_SERVER_ADDRESS"').stdout
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}/api/jobs/", timeout=60)
    assert refused.value.code == 401


def test_prefects_api_refuses_whoever_has_no_secret(stack):
    """Whoever may create a run of a process worker runs what he likes as its owner."""
    api = shell(stack, 'printf %s "$PREFECT_API_URL"').stdout
    for path in ("flows/filter", "work_pools/filter", "admin/settings"):
        asked = urllib.request.Request(f"{api}/{path}", data=b"{}" if "filter" in path else None)
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(asked, timeout=60)
        assert refused.value.code == 401
    page = api.removesuffix("/api")
    with urllib.request.urlopen(page, timeout=60) as answer:
        assert b"<title>Prefect" in answer.read()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_of_this_machine_reads_no_secret_and_is_refused(stack):
    kept = stack / "runs/local"
    for folder in (*kept.parents, kept):  # else it is a folder above that keeps him out
        if folder.is_relative_to(tempfile.gettempdir()) and folder != Path(tempfile.gettempdir()):
            folder.chmod(folder.stat().st_mode | 0o055)
    for name in ("env", "ray_token"):
        assert stat.S_IMODE((kept / name).stat().st_mode) == 0o600
        read = subprocess.run(
            ["cat", kept / name],
            user="nobody",
            cwd="/",
            capture_output=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert b"Permission denied" in read.stderr
    for variable, path in (
        ("PREFECT_API_URL", "/flows/filter"),
        ("RAY_API_SERVER_ADDRESS", "/api/jobs/"),
    ):
        url = shell(stack, f'printf %s "${variable}"').stdout + path
        asked = (
            f"import urllib.request as r; r.urlopen(r.Request({url!r}, data=b'{{}}'), timeout=60)"
        )
        said = subprocess.run(
            ["/usr/bin/python3", "-c", asked],
            user="nobody",
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert "HTTP Error 401" in said.stderr, said.stderr


def test_a_run_says_neither_command_nor_environment(stack):
    """The pool's template has no place for them, whatever a run asks for."""
    made = stack / "made-by-a-run"
    asked = shell(
        stack,
        "prefect deployment run teacher-cache/default --watch --watch-timeout 120 "
        f"--job-variable {shlex.quote(f'command=touch {made}')} "
        f"--job-variable {shlex.quote('env=' + json.dumps({'EUPE_HOME': str(made)}))} "
        f"-p {shlex.quote('overrides=' + json.dumps(['num_veiws=1']))}",
    )
    assert asked.returncode != 0
    assert not made.exists()


def test_a_second_up_is_refused_and_loses_nothing(stack):
    before = {process.pid for process in running(stack / "runs/local")}
    again = subprocess.run(
        [*STACK, "up"],
        cwd=ROOT,
        env={**os.environ, "EUPE_HOME": str(stack)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert again.returncode == 2
    assert "up already" in again.stderr
    assert before <= {process.pid for process in running(stack / "runs/local")}


def test_caches_are_built_once_and_a_student_learns_from_them(stack):
    log = stack / "runs/local/stack.log"
    first = shell(stack, RUN_FLOW)
    assert first.returncode == 0, first.stdout + log.read_text()[-3000:]
    assert "15 shards computed" in log.read_text()  # 3 jobs x 2 teachers and 3 scales
    assert "Extracting" in first.stdout  # its progress and its table, as whoever watches sees it
    assert "Stores of recipe demo" in first.stdout
    assert sum(line.startswith("●") for line in first.stdout.splitlines()) < WATCHED_EVENTS
    again = shell(stack, RUN_FLOW)
    assert again.returncode == 0, again.stdout + log.read_text()[-3000:]
    assert " 0 shards computed" in log.read_text()
    words = " ".join(f"--set {shlex.quote(item)}" for item in TINY)
    job = shell(stack, f"ray job submit -- stage2 {words}")
    assert job.returncode == 0, job.stdout + job.stderr
    assert (stack / "runs/demo_stage2/stage2/metrics.jsonl").is_file()


def test_bad_input_fails_the_run_and_the_job(stack):
    flow = shell(stack, RUN_FLOW.replace("num_views=1", "num_veiws=1"))
    assert flow.returncode == 1
    assert " ".join(flow.stdout.split()).count("did you mean 'num_views'") == 1
    assert "Traceback" not in flow.stdout
    job = shell(stack, "ray job submit -- stage2 --set num_veiws=1")
    assert job.returncode == 1
    assert "did you mean 'num_views'" in job.stdout
