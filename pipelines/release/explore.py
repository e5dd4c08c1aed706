"""A table of `encode` in a browser: embedding-atlas serves it, on this machine alone."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from eupe.errors import BadInput

TABLE = "data/dataset.parquet"
"""Where embedding-atlas has the table, below its address."""
PACKAGE = "embedding_atlas"
HOST = "127.0.0.1"
START_SECONDS = 180.0
ASK_EVERY_SECONDS = 0.5
COLUMNS = ("x", "y", "neighbours")


def check(table: Path) -> str:
    """Refuse what is no table of `encode`, or a machine without embedding-atlas.

    Returns:
        how many pictures it has and what made it, in words.

    Raises:
        BadInput: saying what is missing.
    """
    try:
        file = pq.ParquetFile(table)
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"{table}: no Parquet file: {error}") from error
    names = set(file.schema_arrow.names)
    if missing := [name for name in COLUMNS if name not in names]:
        raise BadInput(f"{table}: no column {missing}; wants a table that `eupe encode` wrote")
    if importlib.util.find_spec(PACKAGE) is None:
        raise BadInput("exploring wants embedding-atlas: pip install 'eupe[explore]'")
    return f"{file.metadata.num_rows} pictures of {table}"


@contextmanager
def served(table: Path, port: int | None = None) -> Iterator[str]:
    """Serve a table until the block ends; yields the address once it answers.

    Args:
        table: that `encode` wrote.
        port: to listen on, on the loopback alone; None: one that is free.

    Raises:
        BadInput: as `check`, or the port is taken.
        RuntimeError: the server ends, or does not answer.
    """
    check(table)
    port = _free(port)
    command = [
        *(sys.executable, "-c", f"from {PACKAGE}.cli import main; main()", str(table)),
        *("--x", "x", "--y", "y", "--neighbors", "neighbours"),
        *("--host", HOST, "--port", str(port), "--no-auto-port"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    # What it says goes to a file: of a pipe that nobody reads it would wait for room for ever.
    with TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, **offline},
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            address = f"http://{HOST}:{port}/"
            _wait(process, address, said)
            yield address
        finally:
            _end(process)


def ask(address: str) -> int:
    """Return how many bytes an address answers with.

    Raises:
        OSError: it does not answer, or with an error.
    """
    # No proxy: whatever the environment names, this is our own process.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as answer:
        return len(answer.read())


def _free(port: int | None) -> int:
    """Return a port that nobody listens on.

    Raises:
        BadInput: somebody listens on the one that is asked for.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port or 0))
        except OSError as error:
            raise BadInput(f"--port {port}: {error.strerror}; name another") from error
        found: int = listening.getsockname()[1]
    return found


def _wait(process: subprocess.Popen[bytes], address: str, told: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            told.seek(0)
            said = told.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"embedding-atlas ended: {said[-1] if said else 'without a word'}")
        try:
            ask(address)
        except OSError:
            time.sleep(ASK_EVERY_SECONDS)
        else:
            return
    raise RuntimeError(f"embedding-atlas does not answer at {address} after {START_SECONDS:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, sign)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
    process.wait()
