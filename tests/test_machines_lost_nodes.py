"""A pool ends its work whatever becomes of actors and nodes, and a bug still ends the pool."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support import draining

from pipelines.machines import deaths, every_node, pool
from pipelines.machines.pool import Pool

pytestmark = pytest.mark.ray
SOON = 1.0
PATIENCE_SECONDS = 120.0  # a process of Ray's begins, on a busy machine


class Slow(Sequence[tuple[float]]):
    """Calls that take long, until there is nothing more to wait for."""

    def __init__(self, number: int) -> None:
        self.number, self.seconds = number, SOON / 2

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> tuple[float]:
        return (self.seconds,)


def worker() -> type:
    class Worker:  # here, for actors cannot import this module
        def where(self, seconds: float) -> str:
            import ray

            time.sleep(seconds)
            return str(ray.get_runtime_context().get_node_id())

        def stay(self, node: str) -> str:
            """Never end on that node."""
            here = self.where(0.0)
            time.sleep(3600.0 if here == node else 0.1)
            return here

        def die_until(self, folder: Path, deaths: int) -> int:
            """Die that often, by a mark in a folder for each."""
            marks = len(list(folder.iterdir()))
            if marks < deaths:
                (folder / str(marks)).touch()
                os._exit(1)
            return marks

    return Worker


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """Start a cluster whose head has no CPU to compute on."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield started
    started.shutdown()


@pytest.fixture
def cluster(head: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Name that cluster; nodes are the test's own, and go with it."""
    monkeypatch.setenv("RAY_ADDRESS", head.address)
    yield head
    for node in list(head.worker_nodes):
        head.remove_node(node)


def test_work_goes_on_beside_an_actor_without_room_and_with_nodes_that_come_and_go(
    cluster, monkeypatch
):
    """One of two nodes dies in the middle, a third joins; not one death is allowed for a bug."""
    monkeypatch.setattr(deaths, "MAX_DEATHS", 0)
    monkeypatch.setattr(pool, "LOOK_SECONDS", SOON)
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    tasks, seen = Slow(400), dict[int, str]()
    with Pool(worker(), {}, actors=3, cpus=1) as workers:
        for results in workers.run("where", tasks):
            assert not seen.keys() & dict(results).keys()
            seen |= dict(results)
            if len(set(seen.values())) == 2 and second is not None:
                cluster.remove_node(second, allow_graceful=False)
                second, third = None, cluster.add_node(num_cpus=1)
            if len(set(seen.values())) == 3:
                tasks.seconds = 0.0
    assert sorted(seen) == list(range(len(tasks)))
    assert {first.node_id, third.node_id} < set(seen.values())
    assert len(set(seen.values())) == 3


@pytest.mark.timeout(300)
def test_what_a_lost_node_was_working_on_is_done_by_an_actor_that_had_nothing_more_to_do(
    cluster, monkeypatch
):
    """For one that would follow there is no room any more."""
    monkeypatch.setattr(deaths, "MAX_DEATHS", 0)
    monkeypatch.setattr(pool, "LOOK_SECONDS", SOON)
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    with Pool(worker(), {}, actors=2, cpus=1) as workers:
        seen = set[str]()
        while len(seen) < 2:
            seen |= {node for some in workers.run("where", 4 * [(SOON,)]) for _, node in some}
        done = list[int]()
        for results in workers.run("stay", 4 * [(second.node_id,)]):
            assert {node for _, node in results} == {first.node_id}
            done += [number for number, _ in results]
            if second is not None and len(done) >= 2:
                cluster.remove_node(second, allow_graceful=False)
                second = None
    assert sorted(done) == list(range(4))


def test_an_actor_on_a_node_that_is_being_drained_gets_no_more_calls(cluster, monkeypatch):
    """It has an hour: what it has begun is ended there, and not one death is allowed."""
    monkeypatch.setattr(deaths, "MAX_DEATHS", 0)
    monkeypatch.setattr(pool, "LOOK_SECONDS", SOON)
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    tasks, seen, third = Slow(400), list[tuple[int, str]](), None
    with Pool(worker(), {}, actors=2, cpus=1) as workers:
        for results in workers.run("where", tasks):
            seen += results
            if third is None and len({node for _, node in seen}) == 2:
                draining.drain(cluster.address, second.node_id)
                third = cluster.add_node(num_cpus=1)
            if third is not None and third.node_id in {node for _, node in seen}:
                tasks.seconds = 0.0
    assert sorted(number for number, _ in seen) == list(range(len(tasks)))
    assert {node for _, node in seen} == {first.node_id, second.node_id, third.node_id}
    nodes = [node for _, node in seen]
    assert second.node_id not in nodes[nodes.index(third.node_id) :]
    with Pool(worker(), {}, actors=3, cpus=1) as workers:
        later = {node for some in workers.run("where", 9 * [(0.0,)]) for _, node in some}
    assert later <= {first.node_id, third.node_id}


def test_a_node_that_is_being_drained_is_not_asked_and_has_no_room(cluster, capfd):
    """It lives, since an actor is still there, and what is begun there now is refused."""
    first, second = (cluster.add_node(num_cpus=1) for _ in range(2))
    with Pool(worker(), {}, actors=2, cpus=1) as workers:
        assert list(workers.run("where", 4 * [(SOON,)]))
        draining.drain(cluster.address, second.node_id)
        answers = every_node.ask(lambda name: name, PATIENCE_SECONDS, "CPU")
        assert second.node_id in deaths.nodes_draining() & deaths.nodes_alive()
        with Pool(worker(), {}, actors=2, cpus=1) as others:
            others._start(2)
            assert "of 2 actors (1 CPUs and 0 GPUs each)" in (said := capfd.readouterr().err)
            assert said.strip().endswith("has room for 1")
    assert answers.mute == {}
    assert [name for name in answers.said if first.node_id[:6] in name] == list(answers.said)


def test_an_actor_that_has_no_room_gets_no_calls(cluster):
    """Two CPUs, of which somebody else holds one: the cluster's size promises what is not free."""
    cluster.add_node(num_cpus=2)
    with (
        Pool(worker(), {}, actors=1, cpus=1) as other,
        Pool(worker(), {}, actors=2, cpus=1) as workers,
    ):
        assert len(list(other.run("where", [(0.0,)]))) == 1
        assert len({n for some in workers.run("where", 6 * [(0.0,)]) for n, _ in some}) == 6


def test_deaths_are_counted_by_the_hour(cluster, monkeypatch, tmp_path):
    cluster.add_node(num_cpus=1)
    monkeypatch.setattr(deaths, "NODE_SECONDS", SOON)  # it lives
    enough = deaths.MAX_DEATHS + 2
    for seconds in (deaths.DEATH_SECONDS, 0.0):
        monkeypatch.setattr(deaths, "DEATH_SECONDS", seconds)
        folder = tmp_path / str(seconds)
        folder.mkdir()
        with Pool(worker(), {}, actors=1, cpus=1) as workers:
            calls = workers.run("die_until", [(folder, enough)])
            if seconds:
                with pytest.raises(RuntimeError, match="Worker died more than 3 times within"):
                    list(calls)
                assert len(list(folder.iterdir())) == deaths.MAX_DEATHS + 1
            else:
                assert list(calls) == [[(0, enough)]]
