"""A Ray that is named is reached, or refused in a sentence."""

import os
import socket
import subprocess
import sys
import threading
from functools import cache

import pytest
from ray._private import services

from eupe.errors import BadInput
from pipelines.machines import cluster

PATIENCE_SECONDS = 300


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_an_address_at_which_nobody_listens_is_refused_at_once(monkeypatch, host):
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))  # so it is nobody else's while it is asked
        monkeypatch.setenv("RAY_ADDRESS", f"{host}:{kept.getsockname()[1]}")
        with pytest.raises(BadInput, match="no Ray answers there"), cluster.connect():
            raise AssertionError("connected")


def test_a_port_that_accepts_and_says_nothing_is_refused_soon(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(BadInput, match="no word within 1 s"), cluster.connect():
            raise AssertionError("connected")


@pytest.mark.parametrize("said", [b"HTTP/1.0 400 Bad request\r\n\r\n", b"SSH-2.0-OpenSSH", b""])
def test_what_answers_and_is_no_ray_is_refused_at_once(monkeypatch, said):
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            with other.accept()[0] as asked:
                asked.recv(1024)
                asked.sendall(said)

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(BadInput, match="what answers speaks otherwise"), cluster.connect():
            raise AssertionError("connected")


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "ray://head:10001", "head", "head:", "head:x", ":6379"]
)
def test_the_address_of_something_else_of_a_cluster_is_refused(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BadInput, match="wants a cluster's GCS address"), cluster.connect():
        raise AssertionError("connected")


def test_auto_that_finds_no_ray_is_refused(monkeypatch):
    monkeypatch.setattr(services, "find_gcs_addresses", cache(set))
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(BadInput, match="auto: no Ray runs on this machine"), cluster.connect():
        raise AssertionError("connected")


def test_auto_that_finds_the_address_of_a_ray_that_is_gone_is_refused_at_once(monkeypatch):
    """`ray start` leaves its address in a file, and a machine that goes down the file."""
    monkeypatch.setattr(services, "find_gcs_addresses", cache(set))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with socket.socket() as kept:
        kept.bind(("127.0.0.1", 0))
        left = f"127.0.0.1:{kept.getsockname()[1]}"
        monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: left)
        with (
            pytest.raises(BadInput, match=r"= auto \(.*:\d+\): no Ray answers there"),
            cluster.connect(),
        ):
            raise AssertionError("connected")


@pytest.mark.parametrize("named", ["", "local"])
def test_what_names_this_machine_names_no_cluster(monkeypatch, named):
    monkeypatch.setenv("RAY_ADDRESS", named)
    assert cluster.address_named() is None


CONNECTING = """
import time
from pipelines.machines import cluster
from pipelines.machines.errors import one_sentence
cluster._authenticate()
import ray  # which alone takes a busy machine half a minute
began = time.monotonic()
try:
    with one_sentence(), cluster.connect():
        print("connected", len(ray.nodes()))
finally:
    print("seconds", time.monotonic() - began)
"""
ENDED_SECONDS = 60.0
"""For a refusal, on a busy machine; an idle one takes ten. Ray itself tries on and on."""


def connecting(**environment: str) -> tuple[subprocess.CompletedProcess, float]:
    """Connect in a process of its own; return what it said, and how long that took."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    run = subprocess.run(
        [sys.executable, "-c", CONNECTING],
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    return run, float(run.stdout.split()[-1])


def refused(run: subprocess.CompletedProcess, seconds: float, sentence: str) -> None:
    assert run.returncode == 2, run.stderr
    assert sentence in run.stderr.splitlines()[-1]
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert seconds < ENDED_SECONDS


@pytest.mark.slow
def test_a_mute_address_ends_a_command_in_one_sentence_within_half_a_minute():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        refused(*connecting(RAY_ADDRESS=address), f"RAY_ADDRESS = {address}: no Ray answers there")


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_with_a_token_takes_who_has_it_and_refuses_others_in_a_sentence(
    ray_cluster, tmp_path
):
    import ray

    cluster_of = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "HOME": str(tmp_path)}
    own = os.environ["RAY_AUTH_TOKEN_PATH"]
    run, _ = connecting(**cluster_of, RAY_AUTH_TOKEN_PATH=own)
    assert run.stdout.startswith("connected 1"), run.stderr
    for wrong in (
        {"RAY_AUTH_TOKEN": "another"},
        {},
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "absent")},
    ):
        refused(*connecting(**cluster_of, **wrong), "that cluster wants its own token")


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_that_auto_finds_takes_who_has_its_token_and_refuses_others(
    ray_cluster, tmp_path
):
    """Beside others of the machine the one that the file of `ray start` names is meant."""
    import ray

    current = tmp_path / "ray" / "ray_current_cluster"
    current.parent.mkdir()
    current.write_text(ray.get_runtime_context().gcs_address)
    found = {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    run, _ = connecting(**found, RAY_AUTH_TOKEN_PATH=os.environ["RAY_AUTH_TOKEN_PATH"])
    assert run.stdout.startswith("connected 1"), run.stderr
    run, seconds = connecting(**found, RAY_AUTH_TOKEN="another")
    assert run.returncode == 2, run.stderr
    assert "RAY_ADDRESS = auto (" in run.stderr.splitlines()[-1]
    assert "that cluster wants its own token" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert seconds < ENDED_SECONDS
