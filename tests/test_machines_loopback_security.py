"""Loopback is reached directly, whatever proxy the environment names."""

import http.server
import subprocess
import sys
import threading

import pytest

from pipelines.machines import loopback

PATIENCE_SECONDS = 300

DEAD = "http://127.0.0.1:9"
CLIENTS = {
    "httpx": "import httpx; print(httpx.get({url!r}).status_code)",  # Prefect's
    "requests": "import requests; print(requests.get({url!r}).status_code)",  # Ray's
}


def test_what_is_named_already_stays():
    assert loopback.without_proxy({"NO_PROXY": "a.example, localhost"}) == {
        name: "a.example,localhost,127.0.0.1,::1" for name in ("NO_PROXY", "no_proxy")
    }


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_reach_a_local_server_beside_a_dead_proxy(client, tmp_path):
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(tmp_path)),
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    environment = {"HTTP_PROXY": DEAD, "http_proxy": DEAD, "ALL_PROXY": DEAD}
    said = [
        subprocess.run(
            [sys.executable, "-c", CLIENTS[client].format(url=url)],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        for more in ({}, loopback.without_proxy(environment))
    ]
    server.shutdown()
    assert said[0].returncode != 0  # so the proxy would have been asked
    assert said[1].stdout == "200\n", said[1].stderr
