"""Faults among several: two builders; Ray's driver, actors, workers, nodes; Prefect's server.

One Ray of two nodes serves all rounds, until one of its own processes is killed. It listens to its
token alone, has no job API, and writes below the campaign's folder: another Ray of this machine is
not touched.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from benchmarks import fault_subject
from benchmarks.fault_children import Child, Ended, wait_until
from benchmarks.fault_kinds import SIGNALS, FaultNotHad, Round, Struck, kind
from flows.local_stack import ask, free_ports
from pipelines.records import tracking

PATIENCE_SECONDS = 600.0
ACTORS = 2
STORE_BYTES = 80 << 20
RECONNECT_SECONDS = 10
"""Ray waits a minute for a head that is gone; a round need not."""


def settings(folder: Path) -> dict[str, str]:
    """Return what Ray and Prefect read when they are imported."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": str(RECONNECT_SECONDS),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_CLIENT_MAX_RETRIES": "2",  # of five, which are a minute each time
        "DO_NOT_TRACK": "1",
    }


@kind("two builders at once")
def _two_builders(round: Round) -> Struck:
    """Start two builders on one root; one of them dies on its way, or both come to their end."""
    at = round.random.choice([None, round.random.randint(1, round.reference.build_operations)])
    arguments = (fault_subject.build, round.reference.images, round.root)
    children = [Child(*arguments), Child(*arguments, dies_at=at)]
    one, two = (child.end() for child in children)
    wanted = {"done", "died"} if at else {"done"}
    if one.how == "done" and two.how in wanted:
        return Struck()
    return Struck(broken="; ".join(f"{each.how}: {each.words}" for each in (one, two)))


class Nodes:
    """A Ray of two nodes of one CPU each; started when first asked for, mended when asked again."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self._second: Any = None

    def address(self) -> str:
        """Return where the head listens; both nodes are there."""
        from ray.cluster_utils import Cluster

        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        if self._cluster is None:
            head = {**node, "include_dashboard": False, "dashboard_agent_listen_port": 0}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        if self._second is None:
            self._second = self._cluster.add_node(**node)
        return str(self._cluster.address)

    def end_second(self, by: signal.Signals = signal.SIGKILL) -> None:
        """End the raylet of the second node; the next round gets another."""
        os.kill(_pid(self._second, "raylet"), by)

    def forget_second(self) -> None:
        """Clear away what is left of a node whose raylet was killed."""
        with suppress(Exception):  # of what is dead already
            self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None

    def end_head(self, by: signal.Signals) -> None:
        """End the process that the cluster hangs on."""
        os.kill(_pid(self._cluster.head_node, "gcs_server"), by)

    def actors(self, of_class: str) -> list[psutil.Process]:
        """Return the processes of actors of a class: Extractor holds teachers, say."""
        raylets = [_pid(node, "raylet") for node in (self._cluster.head_node, self._second)]
        found = []
        for raylet in raylets:
            for process in psutil.Process(raylet).children(recursive=True):
                with suppress(psutil.Error):
                    if f"ray::{of_class}" in " ".join(process.cmdline()):
                        found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def close(self) -> None:
        """End all of it."""
        if self._cluster is not None:
            with suppress(Exception):  # of what is dead already
                self._cluster.shutdown()
        self._cluster = self._second = None


def _pid(node: Any, name: str) -> int:
    pid: int = node.all_processes[name][0].process.pid
    return pid


NODES = Nodes()
"""Of this campaign."""


def _begin(round: Round) -> Child:
    """Start a build by Ray's actors; return when a seeded number of shards lies there."""
    wanted = round.random.randint(1, round.reference.num_shards - 4)
    arguments = (round.reference.images, round.root, fault_subject.GROWING, NODES.address())
    child = Child(fault_subject.build, *arguments)
    _wait_for_shards(child, round, wanted)
    return child


def _wait_for_shards(child: Child, round: Round, wanted: int) -> None:
    there = wait_until(lambda: len(round.shards()) >= wanted, child, PATIENCE_SECONDS)
    if not there:
        raise FaultNotHad(f"{wanted} shards did not come: {child.end(PATIENCE_SECONDS)}")


def _struck(round: Round, ended: Ended, sound: bool, there: dict[Path, int]) -> Struck:
    broken = "" if sound else f"{ended.how}: {ended.words}"
    return Struck(broken=broken, actors=ACTORS, there=there)


def _driver(by: str) -> None:
    @kind(f"driver {by}", slow=True)
    def strike(round: Round) -> Struck:
        child = _begin(round)
        child.kill(SIGNALS[by])
        ended, there = child.end(PATIENCE_SECONDS), round.shards()
        return _struck(round, ended, ended.how == "died", there)


def _while_building(round: Round, strike: Callable[[], None]) -> tuple[Ended, dict[Path, int]]:
    """Have something happen to a build; return how it ended, and the shards there before that."""
    child = _begin(round)
    there = round.shards()
    strike()
    return child.end(PATIENCE_SECONDS), there


def _actor(by: str) -> None:
    def end() -> None:
        for process in NODES.actors("Extractor")[:1]:
            process.send_signal(SIGNALS[by])

    @kind(f"actor {by}", slow=True)
    def strike(round: Round) -> Struck:
        ended, there = _while_building(round, end)
        return _struck(round, ended, ended.how == "done", there)


def _raylet(by: str) -> None:
    @kind(f"one of two raylets {by}", slow=True)
    def strike(round: Round) -> Struck:
        """Half of the actors are gone for good: the build ends with the other half, or says so."""
        ended, there = _while_building(round, lambda: NODES.end_second(SIGNALS[by]))
        NODES.forget_second()
        return _struck(round, ended, ended.how == "done" or "died more than" in ended.words, there)


@cache
def _trained_by_two(folder: Path, images: Path, cache_root: Path) -> object:
    """Return what two workers learn, undisturbed: they add floats in an order of their own."""
    root = folder / "trained-by-two"
    shutil.copytree(cache_root, root / "cache")
    arguments = (images, root, 2, NODES.address())
    ended = Child(fault_subject.train, *arguments).end(PATIENCE_SECONDS)
    if ended.how != "done":
        raise FaultNotHad(f"training by two without a fault {ended.how}: {ended.words}")
    return ended.result


def _while_two_train(round: Round, strike: Callable[[], None]) -> Struck:
    """Have something happen to a training by two workers: it ends by itself, with equal losses."""
    known = round.reference
    wanted = _trained_by_two(known.folder, known.images, known.root / "cache")
    round.copy("cache")
    child = Child(fault_subject.train, round.reference.images, round.root, 2, NODES.address())
    steps = round.random.randint(1, fault_subject.STEPS - 2)
    log = round.root / "run" / fault_subject.STAGE / tracking.METRICS_FILE
    begun = wait_until(
        lambda: log.is_file() and log.read_text().count("\n") >= steps, child, PATIENCE_SECONDS
    )
    if begun:
        strike()
    ended = child.end(PATIENCE_SECONDS)
    if ended.how != "done" or not begun:
        return Struck(broken=f"{ended.how}, strike: {begun}: {ended.words}")
    return Struck(broken="" if ended.result == wanted else "losses or weights differ")


def _one_of_two(by: str) -> None:
    @kind(f"one of two training workers {by}", slow=True)
    def one_of_two(round: Round) -> Struck:
        def strike() -> None:
            processes = NODES.actors("RayTrainWorker")
            if processes:  # else it has just ended
                round.random.choice(processes).send_signal(SIGNALS[by])

        return _while_two_train(round, strike)


@kind("node of one of two training workers lost", slow=True)
def _node_of_one_of_two(round: Round) -> Struck:
    """The one that is left has no room for two: they go on when another node joins."""

    def strike() -> None:
        NODES.end_second()
        NODES.forget_second()
        NODES.address()

    return _while_two_train(round, strike)


def _head(by: str) -> None:
    @kind(f"Ray head {by}", slow=True)
    def strike(round: Round) -> Struck:
        ended, there = _while_building(round, lambda: NODES.end_head(SIGNALS[by]))
        NODES.close()
        return _struck(round, ended, ended.how != "hung", there)


def _prefect(by: str) -> None:
    @kind(f"Prefect server {by}", slow=True)
    def strike(round: Round) -> Struck:
        """A flow ends without its server, or fails and says so; it does not wait for ever."""
        wanted = round.random.randint(1, round.reference.num_shards - 4)
        with _prefect_server() as (url, server):
            arguments = (round.reference.images, round.root, NODES.address(), url)
            child = Child(fault_subject.flow, *arguments)
            _wait_for_shards(child, round, wanted)
            there = round.shards()
            for process in [server, *server.children(recursive=True)]:
                process.send_signal(SIGNALS[by])
            ended = child.end(PATIENCE_SECONDS)
        return _struck(round, ended, ended.how != "hung", there)


for _by in SIGNALS:
    _driver(_by)
    _actor(_by)
    _raylet(_by)
    _one_of_two(_by)
    _head(_by)
    _prefect(_by)


@contextmanager
def _prefect_server() -> Iterator[tuple[str, psutil.Process]]:
    """Start a Prefect server; its URL and process."""
    (port,) = free_ports(1)
    words = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    started = subprocess.Popen(
        [sys.executable, *words, "--no-ui"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        given = time.monotonic() + PATIENCE_SECONDS
        while ask(f"{url}/health") is not True:
            if time.monotonic() > given or started.poll() is not None:
                raise FaultNotHad("the Prefect server did not answer")
            time.sleep(0.2)
        yield url, psutil.Process(started.pid)
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(started.pid).children(recursive=True):
                process.kill()
        started.kill()
        started.wait()
