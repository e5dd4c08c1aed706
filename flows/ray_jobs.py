"""Training as a Ray job: submit, stream its log, stop it when interrupted, return its exit code."""

import asyncio
import logging
import os
import shlex
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from eupe.errors import BadInput
from flows.local_stack import free_ports
from pipelines.machines import cluster, interrupt

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
PENDING_SECONDS = 15.0
SAVE_SECONDS = round(interrupt.GRACE_SECONDS)
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
"""Seconds from a job's SIGTERM to its SIGKILL; Ray's own 3 are too few to save a training in."""
ANSWER_SECONDS = 10.0
REQUEST_SECONDS = 120.0
"""A job API that says nothing for so long is away; a submission waits there for the job's agent."""
AWAY_SECONDS = 600.0
AGENT_SECONDS = 180.0  # a machine five times overloaded took more than ten, which Ray itself waits
NEVER_RAN = 1
"""Exit code reported for a job whose entry point never started."""


def run_job(
    entrypoint: Sequence[str],
    address: str,
    env: Mapping[str, str],
    say: Callable[[str], None],
    gpus: int = 0,
) -> int:
    """Run a command on a Ray cluster and return its exit code.

    Args:
        entrypoint: the command's words; its program must be on the PATH of the node it runs on.
        address: of the job API, http://host:port.
        env: variables that the command gets besides those of the node.
        say: called with each chunk of the job's output, as it comes.
        gpus: that the command itself computes on; with any it runs on a node that has them free,
            else on the head.

    Returns:
        the driver's exit code; NEVER_RAN, after saying why, when it never started.
    """
    from ray.job_submission import JobStatus

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    client = _client(address)
    for attempt in Retrying(
        retry=retry_if_exception(_no_agent_yet),
        stop=stop_after_delay(AGENT_SECONDS),
        wait=wait_fixed(POLL_SECONDS),
        reraise=True,
    ):
        with attempt:
            job = client.submit_job(
                entrypoint=shlex.join(entrypoint),
                runtime_env={"env_vars": {STOP_VARIABLE: str(SAVE_SECONDS), **env}},
                entrypoint_num_gpus=gpus or None,
            )
    try:
        with interrupt.calling(partial(_stop, client, job)):
            info = _follow(client, job, say)
    except Exception as error:
        raise RuntimeError(
            f"lost sight of job {job} at {address} ({error!r}); if that cluster is up, so is the "
            f"job: `ray job logs --follow {job}`"
        ) from error
    except BaseException as error:
        # Ctrl-C reaches a local Ray as well: a job API that is dying must not hold us.
        seconds = STOP_SECONDS if isinstance(error, KeyboardInterrupt) else SAVE_SECONDS
        stop = threading.Thread(target=_stop, args=(client, job, seconds), daemon=True)
        stop.start()
        stop.join(seconds)
        raise
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    say(f"job {job} {info.status.value.lower()}: {info.message}\n")
    return NEVER_RAN


def _client(address: str) -> "JobSubmissionClient":
    """Return a client of a job API whose requests end; Ray's own wait for an answer for ever."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *said: Any, **options: Any) -> Any:
            return super()._do_request(*said, **{"timeout": REQUEST_SECONDS, **options})

    return Client(address)


def _no_agent_yet(error: BaseException) -> bool:
    """Say whether the cluster is up and its job agent, which starts after it, is not."""
    return isinstance(error, RuntimeError) and "No available agent" in str(error)


def _stop(client: "JobSubmissionClient", job: str, seconds: float) -> None:
    """Ask a job to end; return once it has, or after some seconds."""
    client.stop_job(job)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not client.get_job_status(job).is_terminal():
        time.sleep(POLL_SECONDS)


def _follow(client: "JobSubmissionClient", job: str, say: Callable[[str], None]) -> "JobDetails":
    """Show a job's output until it has ended; return what Ray knows of it.

    The job API may be away for a while (its node's dashboard starts anew): the job does not mind.
    """
    from ray.job_submission import JobStatus

    started, told, said = time.monotonic(), False, 0
    away = Retrying(
        stop=stop_after_delay(AWAY_SECONDS), wait=wait_fixed(POLL_SECONDS), reraise=True
    )
    while True:
        info = away(client.get_job_info, job)
        if info.status.is_terminal():
            say(_log(client, job)[said:])
            return info
        if info.status != JobStatus.PENDING:
            with asyncio.Runner() as runner:  # whose own `run` keeps Ctrl-C until the next answer
                said = runner.get_loop().run_until_complete(_stream(client, job, said, say))
        elif not told and time.monotonic() - started > PENDING_SECONDS:
            say(f"{info.entrypoint}: {info.message}\n")
            told = True
        time.sleep(POLL_SECONDS)


async def _stream(
    client: "JobSubmissionClient", job: str, said: int, say: Callable[[str], None]
) -> int:
    """Say what a job writes until it has ended, or the connection.

    Ray's stream of a log ends five seconds after its job: between chunks the job is asked itself.

    Args:
        client: of the job API.
        job: that runs.
        said: characters of its log that were said before.
        say: called with each chunk.

    Returns:
        characters of its log that are said.
    """
    from aiohttp import ClientError  # what Ray's client speaks with

    chunks, passed = client.tail_job_logs(job), 0  # from the log's beginning
    coming = asyncio.ensure_future(anext(chunks))
    try:
        while True:
            await asyncio.wait({coming}, timeout=POLL_SECONDS)
            if coming.done():
                passed += len(chunk := coming.result())
                new, said = max(passed - said, 0), max(passed, said)
                if new:
                    say(chunk[-new:])
                coming = asyncio.ensure_future(anext(chunks))
            elif client.get_job_info(job).status.is_terminal():
                return said
    except (StopAsyncIteration, RuntimeError, OSError, ClientError):
        return said
    finally:
        coming.cancel()


def _log(client: "JobSubmissionClient", job: str) -> str:
    """Return the whole log of a job that has ended; its node may not be there to give it."""
    tries = Retrying(
        stop=stop_after_delay(STOP_SECONDS), wait=wait_fixed(POLL_SECONDS), reraise=True
    )
    try:
        return str(tries(client.get_job_logs, job))
    except (RuntimeError, OSError) as error:  # requests' errors among them
        print(f"the end of the log of job {job} cannot be had: {error}", file=sys.stderr)
        return ""


def _check_answers(address: str) -> None:
    """Refuse a job API that does not answer: Ray's client would wait for it for ever.

    Raises:
        BadInput: nothing answers there within ANSWER_SECONDS, or what does is no job API, or it
            wants another token.
    """
    from ray.exceptions import AuthenticationError

    url = address if "://" in address else f"http://{address}"  # as Ray reads it
    try:
        with suppress(urllib.error.HTTPError):  # an answer, too: the client tells what it means
            urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_SECONDS).close()  # noqa: S310 (http, to where the user says)
        _client(address)
    except AuthenticationError as error:
        raise BadInput(
            f"RAY_API_SERVER_ADDRESS = {address}: that job API wants another token; name the file "
            "that holds the cluster's in RAY_AUTH_TOKEN_PATH"
        ) from error
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
        raise BadInput(
            f"RAY_API_SERVER_ADDRESS = {address}: no job API of Ray answers there ({said}); it is "
            "http://HEAD:8265 unless configured otherwise"
        ) from error


@contextmanager
def job_cluster() -> Iterator[str]:
    """Be connected to a Ray cluster that takes jobs; yield the address of its job API.

    With RAY_ADDRESS set that is the cluster it names (its job API named by
    RAY_API_SERVER_ADDRESS); else a local Ray, its job API on loopback, which ends with the block.
    Token authentication is on in both cases.

    Raises:
        BadInput: RAY_ADDRESS is set and RAY_API_SERVER_ADDRESS is not, or no job API that takes us
            answers there.
    """
    local = cluster.address_named() is None
    if not local and not os.environ.get("RAY_API_SERVER_ADDRESS"):
        raise BadInput(
            "RAY_ADDRESS is set and RAY_API_SERVER_ADDRESS is not: training is submitted to the "
            "cluster's job API, http://HEAD:8265 unless configured otherwise"
        )
    if local:
        # Jobs are named by console script; a local Ray inherits this PATH.
        scripts = str(Path(sys.executable).parent)
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)])
    with cluster.connect(dashboard_port=free_ports(1)[0] if local else None) as address:
        if address is None:
            address = os.environ["RAY_API_SERVER_ADDRESS"]
            _check_answers(address)  # refused before any work
        yield address
