"""The local stack: Prefect server, work pool, deployments, worker and a Ray head on this machine.

    make up          # python -m flows.local_stack up
    . runs/local/env # the plain `prefect` and `ray` commands now reach this stack
    make down        # python -m flows.local_stack down

The Prefect and job APIs listen on loopback only, where every user of this machine is, and either of
them runs what it is told to: both want a secret, made anew at every start. Ray's is in
runs/local/ray_token, Prefect's in runs/local/env, both of mode 0600. The work pool takes no command
and no environment from whoever creates a run (flows/work_pool.json).

Processes are found again by a variable that all of them inherit (`EUPE_LOCAL_STACK`, the stack's
folder), so those that Ray re-parents are stopped too, and another stack or another Ray on the
machine is left alone.
"""

import base64
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import typer
from rich.console import Console

from eupe.errors import BadInput
from pipelines.machines import cluster, loopback
from pipelines.machines.errors import one_sentence

app = typer.Typer(
    help="Prefect server, work pool, deployments, worker and a Ray head on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

CHECKOUT = Path(__file__).resolve().parents[1]
POOL = "local"
POOL_TEMPLATE = Path(__file__).with_name("work_pool.json")
DEPLOYMENTS = {"teacher-cache/default", "distill/default", "ablations/default"}
MARK = "EUPE_LOCAL_STACK"
OWN_PORT = 20_000
"""The first port that a server here may get: Ray gives its workers those up to 19,999."""
PORTS = ("PREFECT", "RAY", "RAY_CLIENT", "RAY_DASHBOARD", "RAY_AGENT")
UP_SECONDS = 600  # two idle cores take 30, overloaded ones minutes; what dies is seen at once
STOP_SECONDS = 20  # honcho itself waits five before it kills
POLL_SECONDS = 0.5
SHORT = "ray_folder"
"""File with the short name of Ray's folder, where that wants one."""
TOKEN_BYTES = 32
ANSWER_SECONDS = 30  # Ray waits ten for its job agent before it says no
PUBLIC = (
    "PREFECT_API_URL",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_HOME",
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "DO_NOT_TRACK",
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_USAGE_STATS_ENABLED",
    "EUPE_HOME",
    "NO_PROXY",
    "no_proxy",
)
"""What runs/local/env exports, besides PATH."""


class StackError(BadInput):
    """The stack did not come up, or is in the way; the message is one sentence for the user."""


def up(home: Path) -> Mapping[str, str]:
    """Start the stack and return its environment when every part of it answers.

    Args:
        home: EUPE_HOME: relative paths of recipes are below it, and so is runs/local.

    Raises:
        StackError: it is up already, or a part failed or took too long (naming the log).
    """
    folder = home / "runs" / "local"
    if running(folder):
        raise StackError(f"the local stack of {home} is up already; `make down` stops it")
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **settings(home, free_ports(len(PORTS)))}
    if (short := cluster.short_name()) is not None:
        environment |= cluster.named(short)
        (folder / SHORT).write_text(f"{short}\n")
    write_private(Path(environment["RAY_AUTH_TOKEN_PATH"]), secrets.token_hex(TOKEN_BYTES))
    log = folder / "stack.log"
    honcho = [command("honcho"), "start", "--no-colour", "-d", str(CHECKOUT)]
    with log.open("wb") as output:
        manager = subprocess.Popen(
            honcho,
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (folder / "pid").write_text(f"{manager.pid}\n")
    try:
        wait_until_healthy(manager, environment, log)
    except BaseException:
        stop(folder)
        raise
    lines = ["# written by `make up`; read it with: . runs/local/env"]
    lines += [f"export {name}={shlex.quote(environment[name])}" for name in PUBLIC]
    lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    write_private(folder / "env", "\n".join(lines) + "\n")
    return environment


def down(home: Path) -> int:
    """Stop the stack and return how many processes were stopped; none running is no error."""
    folder = home / "runs" / "local"
    stopped = stop(folder)
    (folder / "env").unlink(missing_ok=True)
    return stopped


def settings(home: Path, ports: Sequence[int]) -> dict[str, str]:
    """Return the environment of every process of the stack, and of the commands that reach it."""
    folder = home / "runs" / "local"
    port = dict(zip(PORTS, map(str, ports), strict=True))
    secret = f"eupe:{secrets.token_hex(TOKEN_BYTES)}"
    return {
        **loopback.without_proxy(os.environ),
        **{f"EUPE_{name}_PORT": value for name, value in port.items()},
        MARK: str(folder),
        "EUPE_HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        # Ray gives a job's driver one thread, since the actor above it has no CPUs of its own.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "PREFECT_API_URL": f"http://127.0.0.1:{port['PREFECT']}/api",
        "PREFECT_API_AUTH_STRING": secret,
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port['PREFECT']}",  # its own
        "PREFECT_HOME": str(folder / "prefect"),
        # Else the server writes its pages into the installation.
        "PREFECT_UI_STATIC_DIRECTORY": str(folder / "prefect" / "ui"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # Whoever watches a run sees its log, the last line of it too.
        "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",
        "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.5",
        "DO_NOT_TRACK": "1",
        # The defaults of ten seconds are for thousands of workers.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        "RAY_ADDRESS": f"127.0.0.1:{port['RAY']}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port['RAY_DASHBOARD']}",
        "RAY_AUTH_MODE": "token",  # a job API without it runs anybody's code
        "RAY_AUTH_TOKEN_PATH": str(folder / "ray_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listens on now, all different.

    Where there are such, they are none that the kernel hands out to whoever wants any port: on a
    busy machine a server takes a minute to begin, and Ray's processes open dozens meanwhile.
    """
    own = range(OWN_PORT, _lowest_handed_out())
    tried = iter(secrets.SystemRandom().sample(own, len(own)))
    with ExitStack() as stack:
        return [_bound(stack.enter_context(socket.socket()), tried) for _ in range(count)]


def _bound(one: socket.socket, tried: Iterator[int]) -> int:
    """Bind a socket to the first port of some that is free, else to any; return that."""
    for port in chain(tried, (0,)):
        with suppress(OSError):
            one.bind(("127.0.0.1", port))
            break
    return int(one.getsockname()[1])


def _lowest_handed_out() -> int:
    """Return the first port that the kernel gives to whoever names none."""
    return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def write_private(path: Path, content: str) -> None:
    """Write a file anew that only this user can read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)


def deploy() -> None:
    """Wait for the server, then create the work pool and the deployments (run by the Procfile).

    Raises:
        StackError: the server did not answer in time, or Prefect refused.
    """
    deadline = time.monotonic() + UP_SECONDS
    while not server_answers(os.environ):
        if time.monotonic() > deadline:
            raise StackError("the Prefect server did not answer")
        time.sleep(POLL_SECONDS)
    for words in (
        [
            *("work-pool", "create", POOL, "--type", "process", "--overwrite"),
            *("--base-job-template", str(POOL_TEMPLATE)),
        ],
        ["--no-prompt", "deploy", "--all"],
    ):
        if subprocess.run([command("prefect"), *words], cwd=CHECKOUT, check=False).returncode:
            raise StackError(f"`prefect {' '.join(words)}` failed")


def wait_until_healthy(
    manager: subprocess.Popen[bytes], environment: Mapping[str, str], log: Path
) -> None:
    """Wait for every part in the order in which they become healthy.

    Raises:
        StackError: naming the part and the log.
    """
    parts: dict[str, Callable[[Mapping[str, str]], bool]] = {
        "Prefect server": server_answers,
        "deployments": deployments_are_there,
        "Prefect worker": worker_is_online,
        "Ray head": ray_answers,
    }
    console = Console(stderr=True)
    started = time.monotonic()
    with ExitStack() as stack:
        status = stack.enter_context(console.status("starting")) if console.is_terminal else None
        for part, healthy in parts.items():
            if status:
                status.update(f"waiting for the {part}")
            while not healthy(environment):
                if manager.poll() is not None:
                    raise StackError(f"the {part} did not start; {last_words(log)}")
                if time.monotonic() - started > UP_SECONDS:
                    raise StackError(
                        f"the {part} was not healthy after {UP_SECONDS} s; {last_words(log)}"
                    )
                time.sleep(POLL_SECONDS)
            console.print(f"{part}: up after {time.monotonic() - started:.0f} s")


def server_answers(environment: Mapping[str, str]) -> bool:
    """Say whether the Prefect API is healthy."""
    return ask_prefect(environment, "health") is True


def deployments_are_there(environment: Mapping[str, str]) -> bool:
    """Say whether both flows are deployed."""
    flows = ask_prefect(environment, "flows/filter", {}) or []
    names = {flow["id"]: flow["name"] for flow in flows}
    there = ask_prefect(environment, "deployments/filter", {}) or []
    found = {f"{names.get(item['flow_id'])}/{item['name']}" for item in there}
    return found >= DEPLOYMENTS


def worker_is_online(environment: Mapping[str, str]) -> bool:
    """Say whether a worker of the pool sends heartbeats."""
    workers = ask_prefect(environment, f"work_pools/{POOL}/workers/filter", {}) or []
    return any(worker["status"] == "ONLINE" for worker in workers)


def ray_answers(environment: Mapping[str, str]) -> bool:
    """Say whether the Ray head takes jobs, by giving it one that does nothing."""
    token = Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    url = environment["RAY_API_SERVER_ADDRESS"]
    return ask(f"{url}/api/jobs/", {"entrypoint": "true"}, headers) is not None


def ask_prefect(environment: Mapping[str, str], path: str, body: object = None) -> Any:
    """Return what the Prefect API answers, None while it does not."""
    secret = base64.b64encode(environment["PREFECT_API_AUTH_STRING"].encode()).decode()
    url = f"{environment['PREFECT_API_URL']}/{path}"
    return ask(url, body, {"Authorization": f"Basic {secret}"})


def ask(url: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
    """Return the JSON that a local service answers, None while it does not answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310 (http, to the ports that this stack was given)
        url, data=data, headers={"Content-Type": "application/json", **(headers or {})}
    )
    try:
        # Loopback: never through a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)
    except (urllib.error.URLError, OSError, ValueError):
        return None


def running(folder: Path) -> list[psutil.Process]:
    """Every live process of the stack in that folder, whoever its parent is now."""
    return [process for process in marked(str(folder)) if process.pid != os.getpid()]


def marked(value: str) -> Iterator[psutil.Process]:
    """Yield this user's processes whose environment says they belong to the stack."""
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == value:
                yield process
        except psutil.Error:  # gone meanwhile, or another user's
            continue


def stop(folder: Path) -> int:
    """End every process of the stack: first as honcho does it, then what is left, by pid."""
    found = running(folder)
    pid_file = folder / "pid"
    if pid_file.exists():
        manager = [process for process in found if process.pid == int(pid_file.read_text())]
        terminate(manager)
        psutil.wait_procs(manager, timeout=STOP_SECONDS)
        pid_file.unlink()
    while left := running(folder):  # a parent may have spawned while we looked: look again
        terminate(left)
        _, stubborn = psutil.wait_procs(left, timeout=STOP_SECONDS)
        for process in stubborn:
            process.kill()
        psutil.wait_procs(stubborn, timeout=STOP_SECONDS)
    if (short := folder / SHORT).exists():
        cluster.remove_name(Path(short.read_text().strip()))
        short.unlink()
    return len(found)


def terminate(processes: Sequence[psutil.Process]) -> None:
    """Send SIGTERM to those that are still there."""
    for process in processes:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue


def command(name: str) -> str:
    """Path of a console script of this installation."""
    return str(Path(sys.executable).parent / name)


def last_words(log: Path) -> str:
    """Point at the log and quote its end."""
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return f"see {log}, which ends:\n" + "\n".join(f"  {line}" for line in lines)


@app.command("up")
def up_command() -> None:
    """Start the stack; return when every part of it answers."""
    where = up(home())
    print(f"Prefect's page  {where['PREFECT_API_URL'].removesuffix('/api')}")
    print(f"    its secret  PREFECT_API_AUTH_STRING in {home() / 'runs/local/env'}")
    print(f"Ray's page      {where['RAY_API_SERVER_ADDRESS']}")
    print(f"    its token   {where['RAY_AUTH_TOKEN_PATH']}")
    print(f"up; now: . {home() / 'runs/local/env'}")


@app.command("down")
def down_command() -> None:
    """Stop every process of the stack."""
    print(f"down; {down(home())} processes stopped")


@app.command("deploy")
def deploy_command() -> None:
    """Create the work pool and the deployments; run by the Procfile."""
    deploy()


def home() -> Path:
    """Return EUPE_HOME, or the checkout."""
    return Path(os.environ.get("EUPE_HOME") or CHECKOUT).resolve()


def main() -> None:
    """Run `up`, `down` or `deploy`; exit code 2 with a sentence when it cannot be done."""
    with one_sentence():
        app()


if __name__ == "__main__":
    main()
