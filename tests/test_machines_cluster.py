"""A Ray that is named is reached, or refused in a sentence."""

import socket
import subprocess
import sys

import pytest

from eupe.errors import BadInput
from pipelines.machines import cluster


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(monkeypatch, host):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"{host}:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput, match="no Ray answers there"), cluster.connect():
        raise AssertionError("connected")


AUTO = """
import os
from pipelines.machines import cluster
from pipelines.machines.errors import one_sentence
os.environ |= {"RAY_ADDRESS": "auto", "RAY_AUTH_TOKEN": "nobody's", "RAY_AUTH_MODE": "token"}
with one_sentence(), cluster.connect():
    raise AssertionError("connected")
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_is_not_found_or_has_another_token_is_a_sentence():
    """One that runs on this machine by chance is found, and takes another token."""
    run = subprocess.run([sys.executable, "-c", AUTO], capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "RAY_ADDRESS = auto: " in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
