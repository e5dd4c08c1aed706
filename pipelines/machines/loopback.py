"""This machine's own addresses: reached directly, whatever proxy the environment names."""

import os
from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep loopback off a proxy, beside what they name already.

    Prefect's client (httpx), Ray's job client (requests) and gRPC go through HTTP_PROXY to
    127.0.0.1 too: a local server then never answers. Some read the one name, some the other.
    """
    named = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    there = [host.strip() for host in named.split(",") if host.strip()]
    hosts = ",".join(dict.fromkeys((*there, *LOOPBACK)))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def reach_directly() -> None:
    """Keep loopback off a proxy in this process and in those that it starts."""
    os.environ.update(without_proxy(os.environ))
