"""Connecting to Ray, in one place: the cluster RAY_ADDRESS names, or a local one for the moment."""

import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

from eupe.errors import BadInput

TOKEN_BYTES = 32
ANSWER_SECONDS = 10.0


@contextmanager
def connect(dashboard_port: int | None = None) -> Iterator[str | None]:
    """Be connected to Ray inside the block, and disconnected after it whatever happens.

    With RAY_ADDRESS set this joins that cluster; else it starts a local Ray that ends with the
    block. A process that is already connected is left as it is.

    Args:
        dashboard_port: of a local Ray's dashboard and job API, on loopback; None: it has none.

    Yields:
        the address of the job API of a Ray started here with one, else None.

    Raises:
        BadInput: nothing answers at RAY_ADDRESS, or it wants another token.
    """
    _authenticate()
    import ray  # after its settings: it reads them once, when imported

    if ray.is_initialized():
        yield None
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _check_answers(address)
            try:
                ray.init(address=address, logging_level=logging.WARNING)
            except ray.exceptions.AuthenticationError as error:
                raise BadInput(
                    f"RAY_ADDRESS = {address}: that cluster wants its token: name the file that "
                    "holds it in RAY_AUTH_TOKEN_PATH, or set RAY_AUTH_MODE=disabled if it has none"
                ) from error
        else:
            with _own_agent_port():
                ray.init(
                    address="local",
                    include_dashboard=dashboard_port is not None,
                    dashboard_host="127.0.0.1",
                    dashboard_port=dashboard_port,
                    logging_level=logging.WARNING,
                )
        yield None if dashboard_port is None else f"http://127.0.0.1:{dashboard_port}"
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would try it for ever."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():  # "auto", say
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise BadInput(
            f"RAY_ADDRESS = {address}: no Ray answers there ({error.strerror or error}); unset it "
            "to use a Ray of this machine, or name a cluster's GCS address, head:6379"
        ) from error


def _own_agent_port() -> AbstractContextManager[object]:
    """Let the Ray that is started inside the block choose the port of its job agent.

    Every Ray's agent wants port 52365, and of a second Ray on a machine no job would ever start.
    `ray start` and `ray.cluster_utils` have an option for it, ray.init (2.60) has none.
    """
    from ray._private import parameter

    made = partial(parameter.RayParams, dashboard_agent_listen_port=None)
    return mock.patch.object(parameter, "RayParams", made)


def _authenticate() -> None:
    """Settle token authentication: the user's own token, else one for this process and its Ray.

    A cluster that RAY_ADDRESS names has a token already: an invented one would only be refused.
    Ray keeps the first token it reads, so a process has one for its life.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not os.environ.get("RAY_ADDRESS") and not _has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(TOKEN_BYTES)
    if "ray" not in sys.modules:
        # Set later it would contradict what Ray has read; ray.init turns tokens on by itself then.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _has_token() -> bool:
    """Say whether Ray finds a token of the user's, looking where Ray looks, in its order.

    A path that is named and leads nowhere counts: Ray refuses it, naming it.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    kept = Path(os.environ.get("HOME") or ".") / ".ray" / "auth_token"
    return kept.is_file() and bool(kept.read_text().partition("\n")[0].strip())
