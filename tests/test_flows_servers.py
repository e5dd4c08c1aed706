"""A server that is named and says nothing, or takes somebody else, is one sentence, and soon."""

import base64
import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from support.http_server import answering

from eupe.errors import BadInput
from flows import ray_jobs
from flows.commands import runs

PATIENCE_SECONDS = 300

ENDED_SECONDS = 60.0
"""On a busy machine; an idle one takes half. Prefect's client takes six minutes, Ray's for ever."""

pytestmark = pytest.mark.slow


@pytest.fixture
def mute() -> Iterator[str]:
    """A port that accepts connections, which nobody ever answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class Refusing(BaseHTTPRequestHandler):
    """Knows nobody."""

    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *words: object) -> None:
        pass


class Other(Refusing):
    """Is another server altogether."""

    status = 404


def test_a_mute_job_api_is_refused_within_half_a_minute(mute):
    importlib.import_module("ray.job_submission")  # which alone takes a busy machine half a minute
    began = time.monotonic()
    with pytest.raises(BadInput, match=r"no job API of Ray answers there \(.*timed out"):
        ray_jobs._check_answers(mute)
    assert time.monotonic() - began < ENDED_SECONDS


@pytest.mark.parametrize(
    ("server", "why"), [(Refusing, "wants another token"), (Other, "no job API of Ray")]
)
def test_a_job_api_that_does_not_take_us_is_refused(server, why):
    with answering(server) as address, pytest.raises(BadInput, match=why):
        ray_jobs._check_answers(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://", "h t:1"])
def test_a_job_api_that_is_not_there_is_refused(address):
    with pytest.raises(BadInput, match="no job API of Ray answers there"):
        ray_jobs._check_answers(address)


CHECKING = """
import time
from prefect.client.orchestration import get_client  # which alone takes a busy machine a minute
from flows.commands import runs
from pipelines.machines.errors import one_sentence
began = time.monotonic()
try:
    with one_sentence():
        runs.check_prefect()
finally:
    print(time.monotonic() - began)
"""


def checked(url: str) -> tuple[subprocess.CompletedProcess, float]:
    """Ask for a Prefect server in a process of its own, as `eupe run` does."""
    run = subprocess.run(
        [sys.executable, "-c", CHECKING],
        env={**os.environ, "PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": "eupe:mine"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    return run, float(run.stdout)


def test_a_mute_prefect_server_ends_a_command_in_one_sentence_within_half_a_minute(mute):
    run, seconds = checked(f"{mute}/api")
    assert run.returncode == 2, run.stderr
    assert f"PREFECT_API_URL = {mute}/api: no Prefect server answers us there" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert seconds < ENDED_SECONDS


@pytest.mark.parametrize("server", [Refusing, Other])
def test_a_prefect_server_that_does_not_take_us_is_one_sentence(server):
    with answering(server) as address:
        run, _ = checked(f"{address}/api")
    assert run.returncode == 2, run.stderr
    assert str(server.status) in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert base64.b64encode(b"eupe:mine").decode() not in run.stderr


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/api", "127.0.0.1:4200"])
def test_an_address_of_no_prefect_server_is_one_sentence(url):
    run, _ = checked(url)
    assert run.returncode == 2, run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_no_address_is_none(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "")
    runs.check_prefect()
