"""Training as a Ray job: submit, stream its log, stop it when interrupted, return its exit code."""

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.loopback import free_ports, write_token

POLL_SECONDS = 0.5
NEVER_RAN = 1
"""Exit code reported for a job whose entry point never started."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported


def run_job(
    entrypoint: Sequence[str],
    address: str,
    env: Mapping[str, str],
    say: Callable[[str], None],
) -> int:
    """Run a command on a Ray cluster and return its exit code.

    Args:
        entrypoint: the command's words; its program must be on the PATH of the cluster's head.
        address: of the job API, http://host:port.
        env: variables that the command gets besides those of the head.
        say: called with each chunk of the job's output, as it comes.

    Returns:
        the driver's exit code; NEVER_RAN, after saying why, when it never started.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    client = JobSubmissionClient(address)
    job = client.submit_job(entrypoint=shlex.join(entrypoint), runtime_env={"env_vars": dict(env)})
    try:
        asyncio.run(_stream(client, job, say))
        # The log ends a moment before the job manager has noted the exit.
        while not client.get_job_status(job).is_terminal():
            time.sleep(POLL_SECONDS)
    except BaseException:
        client.stop_job(job)
        raise
    info = client.get_job_info(job)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    say(f"job {job} {info.status.value.lower()}: {info.message}\n")
    return NEVER_RAN


async def _stream(client: object, job: str, say: Callable[[str], None]) -> None:
    async for chunk in client.tail_job_logs(job):  # type: ignore[attr-defined]
        say(chunk)


@contextmanager
def job_cluster(home: Path) -> Iterator[str]:
    """Be connected to a Ray cluster that takes jobs; yield the address of its job API.

    With RAY_ADDRESS set that is the cluster it names (its job API named by
    RAY_API_SERVER_ADDRESS); else a local Ray with token authentication, on loopback, which ends
    with the block.

    Args:
        home: EUPE_HOME; a local Ray's token is written below it.

    Raises:
        ValueError: RAY_ADDRESS is set and RAY_API_SERVER_ADDRESS is not.
    """
    if "RAY_ADDRESS" in os.environ:
        if not os.environ.get("RAY_API_SERVER_ADDRESS"):
            raise ValueError(
                "RAY_ADDRESS is set and RAY_API_SERVER_ADDRESS is not: training is submitted to "
                "the cluster's job API, http://HEAD:8265 unless configured otherwise"
            )
        from pipelines.cluster import connect

        with connect():
            yield os.environ["RAY_API_SERVER_ADDRESS"]
        return
    with _environment(_local_settings(home)):
        import ray

        try:
            context = ray.init(
                address="local",
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=free_ports(1)[0],
                logging_level="warning",
            )
            yield f"http://{context.dashboard_url}"
        finally:
            ray.shutdown()


def _local_settings(home: Path) -> dict[str, str]:
    """Environment of a local Ray: a token, and this installation's scripts on the PATH."""
    settings = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        token = home / "runs" / "ray_token"
        write_token(token)
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    return settings


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
