"""A Ray that is named is reached, or refused in a sentence."""

import socket

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
