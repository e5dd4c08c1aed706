"""Connecting to Ray, in one place: the cluster RAY_ADDRESS names, or a local one for the moment."""

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest import mock

from eupe.errors import BadInput
from pipelines.machines import interrupt

TOKEN_BYTES = 32
SOCKET_BYTES = 107
"""Of the path of a Unix socket, at most."""
RAY_BYTES = len("/ray/session_2026-11-26_08-58-28_750547_4194304/sockets/plasma_store")
"""That Ray puts behind the folder for temporary files."""
ANSWER_SECONDS = 10.0
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""What a client of gRPC says first (RFC 9113, 3.4): the preface, and settings that set nothing."""
FRAME_BYTES = 9
FRAME_TYPE = 3
SETTINGS = b"\x04"
"""The type of the frame that such a server says first."""


def address_named() -> str | None:
    """Return what RAY_ADDRESS names a cluster by; an empty one and "local" name none."""
    named = os.environ.get("RAY_ADDRESS")
    return None if named in ("", "local") else named


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
        BadInput: RAY_ADDRESS is no address, no Ray answers there, or it wants another token.
    """
    _authenticate()
    import ray  # after its settings: it reads them once, when imported

    if ray.is_initialized():
        yield None
        return
    named = address_named()
    kept = ExitStack()
    try:
        if named:
            address = _endpoint(named)
            by = f"RAY_ADDRESS = {named}" + ("" if address == named else f" ({address})")
            _check_answers(address, by)
            _check_takes_us(address, by)
            try:
                with interrupt.unchanged(signal.SIGTERM):
                    ray.init(address=address, logging_level=logging.WARNING)
            except ray.exceptions.AuthenticationError as error:
                raise _other_token(by) from error
            except ConnectionError as error:
                said = " ".join(str(error).split()).removesuffix(".")
                raise BadInput(
                    f"{by}: {said}; is it up, and is its token the one that "
                    "RAY_AUTH_TOKEN_PATH names? Unset RAY_ADDRESS to use a Ray of this machine"
                ) from error
        else:
            kept.enter_context(short_folder())  # for as long as that Ray lives
            with _own_agent_port(), interrupt.unchanged(signal.SIGTERM):
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
        kept.close()


@contextmanager
def short_folder() -> Iterator[str | None]:
    """Give a Ray that is started inside the block a short name for its folder, if it wants one.

    Yields:
        the name, see `named`; None if the folder's own is short enough.
    """
    link = short_name()
    if link is None:
        yield None
        return
    try:
        with mock.patch.dict(os.environ, named(link)):
            yield str(link)
    finally:
        remove_name(link)


def short_name() -> Path | None:
    """Make a short name for the folder of a Ray to be started; None if its own is short enough.

    Below a long TMPDIR, as batch systems make one for a job, Ray's sockets have no room in a path.
    What it writes still lies there: only a link is made, in /tmp, for `remove_name` to remove.
    """
    temporary = tempfile.gettempdir()
    wanted = os.environ.get("RAY_TMPDIR") or temporary
    longest = max(len(os.fsencode(folder)) for folder in (wanted, temporary))
    if longest + RAY_BYTES <= SOCKET_BYTES:
        return None
    link = Path(tempfile.mkdtemp(prefix="eupe-", dir="/tmp")) / "t"
    link.symlink_to(Path(wanted).absolute())
    return link


def named(link: Path) -> dict[str, str]:
    """Return the variables by which Ray's processes use a short name.

    Ray's own sockets lie below RAY_TMPDIR, those that its dashboard's processes fork by in TMPDIR.
    """
    return {"RAY_TMPDIR": str(link), "TMPDIR": str(link)}


def remove_name(link: Path) -> None:
    """Remove what `short_name` made, if it is there."""
    link.unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        link.parent.rmdir()


def require_gpus(count: int, field: str) -> None:
    """Refuse GPUs of which the connected Ray has none: it would wait for them in silence, for ever.

    Args:
        count: how many are wanted.
        field: of the recipe, with its value, that wants them.

    Raises:
        BadInput: no node has one, or a Ray of this machine alone has not so many.
    """
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    if count and (not there or (there < count and address_named() is None)):
        raise BadInput(
            f"{field}: wants {count} GPUs and Ray has {there} here; name a cluster that has them "
            "in RAY_ADDRESS, or set workers.use_gpu=false"
        )


def _endpoint(named: str) -> str:
    """Return host and port of the GCS that RAY_ADDRESS means.

    "auto" is resolved here by Ray's own rules and not in ray.init, so that what it finds is asked
    before it is joined: the address in the file that a `ray start` left behind when its machine
    went down would be tried for ever.

    Raises:
        BadInput: it is no host and port, or "auto" finds no Ray.
    """
    if named == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            return str(canonicalize_bootstrap_address(named))
        except ConnectionError as error:
            raise BadInput(
                "RAY_ADDRESS = auto: no Ray runs on this machine; start one, name a cluster's GCS "
                "address, HEAD:6379, or unset it to use a Ray for the moment"
            ) from error
    host, _, port = named.rpartition(":")
    if "://" in named or not host or not port.isdecimal():
        raise BadInput(
            f"RAY_ADDRESS = {named}: wants a cluster's GCS address, HEAD:6379; that of its "
            "job API belongs in RAY_API_SERVER_ADDRESS"
        )
    return named


def _check_answers(address: str, by: str) -> None:
    """Refuse an address at which no Ray answers: Ray would try it for minutes, or for ever.

    Raises:
        BadInput: nobody listens there, or no Ray does.
    """
    host, _, port = address.rpartition(":")
    encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as asked:
            asked.sendall(GREETING)
            answer = asked.recv(FRAME_BYTES)
        if not encrypted and answer[FRAME_TYPE:][:1] != SETTINGS:
            raise ConnectionError(f"what answers speaks otherwise: {answer!r}")
    except (OSError, OverflowError) as error:
        if encrypted and isinstance(error, ConnectionResetError):  # to what was no hello of TLS
            return
        why = getattr(error, "strerror", None) or error
        if isinstance(error, TimeoutError):
            why = f"no word within {ANSWER_SECONDS:.0f} s"
        raise BadInput(
            f"{by}: no Ray answers there ({why}); unset it to use a Ray of this "
            "machine, or name a cluster's GCS address, HEAD:6379"
        ) from error


def _check_takes_us(address: str, by: str) -> None:
    """Ask the GCS of an address something: ray.init asks one that refuses us twenty times.

    Raises:
        BadInput: it refuses us, or what answers is another part of a cluster.
    """
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import InnerGcsClient  # type: ignore[attr-defined]  # its stub leaves it out
    from ray.exceptions import AuthenticationError, RayError

    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one the next aborts
        with _no_stderr():  # Ray's C++ writes each try there
            InnerGcsClient.standalone(address, None, int(ANSWER_SECONDS * 1000))
    except AuthenticationError as error:
        raise _other_token(by) from error
    except RayError as error:
        said = " ".join(str(error).split()).removesuffix(".")
        raise BadInput(
            f"{by}: no GCS answers there ({said}); name a cluster's GCS "
            "address, HEAD:6379, or unset it to use a Ray of this machine"
        ) from error


def _other_token(by: str) -> BadInput:
    return BadInput(
        f"{by}: that cluster wants its own token: name the file that holds it "
        "in RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token; disabled is for one that has none"
    )


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Let nothing of this process, not C++ either, reach stderr inside the block."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


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
    if address_named() is None and not has_token():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(TOKEN_BYTES)
    if "ray" not in sys.modules:
        # Set later it would contradict what Ray has read; ray.init turns tokens on by itself then.
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def has_token() -> bool:
    """Say whether Ray finds a token of the user's, looking where Ray looks, in its order.

    A path that is named and leads nowhere counts: Ray refuses it, naming it.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    kept = token_file()
    return kept.is_file() and bool(kept.read_text().partition("\n")[0].strip())


def token_file() -> Path:
    """Return the file in which Ray looks for a token, unless the environment holds it itself."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named or Path(os.environ.get("HOME") or ".") / ".ray" / "auth_token")
