"""Training that ends before its end goes on exactly: SIGTERM asked it to, or workers have died."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import draining, ending_child, small_stage, two_workers
from support.ending_child import STEPS

from eupe.errors import BadInput
from pipelines.machines import deaths, interrupt
from pipelines.machines.deaths import Deaths
from pipelines.machines.errors import TERMINATED, RemoteBug
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint, tracking
from pipelines.training import launch, ray_train
from pipelines.training.batches import Loader
from pipelines.training.inputs import Inputs
from pipelines.training.job import Job
from pipelines.training.loop import StageResult, _locked, train_stage
from pipelines.training.outputs import Output

PATIENCE_SECONDS = 900  # a child that starts Ray on a busy machine
SAVED_SECONDS = 30.0  # what Slurm and Kubernetes give; without other work it takes 2, by Ray 5
CHECKPOINT_EVERY = 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return what trains by some number of workers, undisturbed, and its losses."""
    with two_workers.pair(tmp_path_factory.mktemp("pair") / "meeting-point") as pair:
        known = dict[int, Any]()

        def losses_of(workers: int) -> list[dict[str, float]]:
            if workers not in known:
                run = ending_child.recipe(tmp_path_factory.mktemp("undisturbed"), workers)
                if workers == 1:
                    two_workers.train(run)
                else:
                    pair.run(two_workers.train, run)
                known[workers] = losses(run)
            return known[workers]

        losses_of.pair = pair  # type: ignore[attr-defined]
        yield losses_of


def losses(run: Recipe) -> list[dict[str, float]]:
    """Return every step's number, losses and gradient norm."""
    lines = tracking.read(run.directory / "stage2" / tracking.METRICS_FILE)
    words = ("step", "loss/", "gradient_norm")
    return [{k: v for k, v in line.items() if k.startswith(words)} for line in lines]


def wait_for_steps(run: Recipe, steps: int, alive: Any) -> None:
    """Wait until a run has logged so many steps."""
    path, deadline = run.directory / "stage2" / tracking.METRICS_FILE, time.monotonic()
    while not path.is_file() or len(path.read_text().splitlines()) < steps:
        assert time.monotonic() < deadline + PATIENCE_SECONDS
        assert alive(), "it ended before its time"
        time.sleep(0.05)


@pytest.mark.parametrize("evaluate_every", [None, 2])
def test_who_is_asked_to_end_saves_the_step_and_goes_on_exactly(tmp_path, evaluate_every):
    settings = {"steps": 8, "log_every": 3, "checkpoint_every": 8, "evaluate_every": evaluate_every}
    judged = {}

    def train(directory: Path, ask_at: int | None) -> Any:
        run = small_stage.recipe(directory, **settings)
        stage, looks = run.stage("stage2"), iter(range(100))
        return train_stage(
            run,
            stage,
            small_stage.inputs(run),
            run.directory / "stage2",
            evaluate=lambda model, step: judged.setdefault((directory, step), {}),
            ending=lambda: next(looks) == ask_at,
        )

    ended = train(tmp_path / "asked", ask_at=3)
    assert ended.checkpoint.step == 4
    assert (tmp_path / "asked", 4) not in judged, "half a minute is too short for an evaluation"
    assert train(tmp_path / "asked", ask_at=None).first_step == 4
    train(tmp_path / "plain", ask_at=None)
    asked, plain = (small_stage.recipe(tmp_path / name, **settings) for name in ("asked", "plain"))
    assert losses(asked) == losses(plain)
    steps = {name: [s for d, s in judged if d.name == name] for name in ("asked", "plain")}
    assert steps["asked"] == steps["plain"]


@pytest.mark.slow
def test_workers_end_at_the_same_step_whichever_is_asked(tmp_path, undisturbed):
    run = ending_child.recipe(tmp_path / "run", 2)
    ended = undisturbed.pair.run(partial(two_workers.train, ask=(1, 6)), run)
    assert [worker.result.checkpoint.step for worker in ended] == [7, 7]
    undisturbed.pair.run(two_workers.train, run)
    assert losses(run) == undisturbed(2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.ray)])
def test_sigterm_is_a_checkpoint_and_the_same_command_goes_on(tmp_path, undisturbed, workers):
    run = ending_child.recipe(tmp_path / "run", workers)
    command = [sys.executable, ending_child.__file__, str(run.directory), str(workers)]
    tests = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
    }
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_steps(run, 3, lambda: child.poll() is None)
    child.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, said = child.communicate(timeout=PATIENCE_SECONDS)
    assert time.monotonic() - began < SAVED_SECONDS
    assert child.returncode == TERMINATED, said
    saved = checkpoint.require(run.directory / "stage2")
    assert 3 <= saved.step < STEPS
    last = said.strip().splitlines()[-1]
    assert last.startswith("terminated; "), said
    # Ray may take so long to leave that the process is ended before it can say that.
    saved_at = f"stage2 is saved at step {saved.step} of {STEPS}"
    assert workers > 1 or saved_at in last, said
    assert last.endswith(f"ending_child.py {run.directory} {workers}")
    # Ray Train's own may find the cluster gone before themselves, or a busy machine slow.
    theirs = ("(PlacementGroupCleaner ", "(TrainController ")
    ours = [line for line in said.splitlines() if not any(name in line for name in theirs)]
    assert "Traceback" not in "\n".join(ours)
    subprocess.run(command, check=True, env=environment, timeout=PATIENCE_SECONDS)
    assert losses(run) == undisturbed(workers)


def test_who_does_not_end_in_time_is_ended(tmp_path):
    script = (
        "import os, signal, time\n"
        "from pipelines.machines import interrupt\n"
        "interrupt.GRACE_SECONDS = 1.0\n"
        "with interrupt.at_once():\n"
        "    with interrupt.in_order(lambda: print('told')) as ending:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        print(ending())\n"
        "    time.sleep(300)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == TERMINATED, run.stderr
    assert run.stdout.split() == ["told", "True"]
    assert "terminated; the same command goes on from here: " in run.stderr


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_where_there_are_no_locks_nothing_that_a_kill_leaves_is_in_the_way(
    tmp_path, monkeypatch, code
):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with _locked(tmp_path, 0, 0.0):
        left = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, content in left.items():
        path.write_bytes(content)
    with _locked(tmp_path, 0, 0.0):
        pass


def test_outside_of_such_work_sigterm_does_what_it_did():
    before = signal.getsignal(signal.SIGTERM)
    with interrupt.at_once():
        outer = signal.getsignal(signal.SIGTERM)
        with interrupt.in_order() as ending:
            assert signal.getsignal(signal.SIGTERM) is not outer
            assert not ending()
        with interrupt.unchanged(signal.SIGTERM):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as ray.init would
        assert signal.getsignal(signal.SIGTERM) is outer
    assert signal.getsignal(signal.SIGTERM) is before


# --------------------------------------------------------------------------------- workers that die


class Failed(Exception):
    """As Ray Train's."""

    def __init__(self, **failures: Exception) -> None:
        self.worker_failures = dict(enumerate(failures.values()))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the nodes of a made-up cluster, two at first."""
    nodes = {"a", "b"}
    monkeypatch.setattr(deaths, "nodes_alive", lambda: frozenset(nodes))
    monkeypatch.setattr(deaths, "NODE_SECONDS", 0.0)
    return nodes


def refused(error: Exception, dead: Deaths) -> Exception | None:
    """Return what is raised for an error of workers that began on two nodes."""
    try:
        ray_train._refuse(error, frozenset({"a", "b"}), dead)
    except Exception as raised:
        return raised
    return None


def test_bad_input_and_bugs_are_raised_at_once(alive):
    bad, bug, dead = BadInput("a sentence"), Failed(one=RemoteBug("a traceback")), Deaths()
    assert refused(Failed(one=RuntimeError("died"), two=bad), dead) is bad
    assert refused(bug, dead) is bug
    assert "rank 0: a traceback" in bug.__notes__


def test_deaths_with_their_node_count_for_nothing_and_others_by_the_hour(alive, monkeypatch):
    monkeypatch.setattr(deaths, "MAX_DEATHS", 2)
    died, collateral, dead = Failed(one=OSError("gone")), Failed(one=RemoteBug("reset")), Deaths()
    assert refused(died, dead) is None
    assert refused(died, dead) is None
    assert refused(died, dead) is died
    alive.remove("b")  # explains all of them
    assert refused(died, dead) is None
    assert refused(collateral, dead) is None
    alive.add("b")
    assert refused(collateral, dead) is collateral
    assert refused(died, dead) is died
    monkeypatch.setattr(deaths, "DEATH_SECONDS", 0.0)
    assert refused(died, dead) is None


@pytest.mark.parametrize("judges", [True, False])
def test_workers_that_leave_after_their_last_step_are_followed_by_others_that_judge_it(
    tmp_path, alive, monkeypatch, capsys, judges
):
    """Asked to leave at that step they leave it unjudged, and a stage without figures is not done.

    Of an evaluation that gives no score there is nothing to wait for.
    """
    run = small_stage.recipe(tmp_path, steps=8)
    stage, groups = run.stage("stage2"), list[int]()

    def fit(job: Job) -> StageResult:
        groups.append(8 if groups else 0)
        score = 0.5 if judges and len(groups) > 1 else None
        saved = checkpoint.Checkpoint(tmp_path, 8, {}, {}, score, {}, {})
        return StageResult(saved, groups[-1], 1.0, 0.0, 0.0, 0)

    monkeypatch.setattr(ray_train, "_fit", fit)
    monkeypatch.setattr(ray_train, "_check_folders", lambda recipe: None)
    output = Output("stage2", {"stage": {"steps": 8}}, tmp_path)
    job = Job(run, stage, small_stage.inputs, lambda *given: None, None, True, output)
    done = ray_train._to_the_end(job, lambda: False)
    assert groups == [0, 8]
    assert (done.checkpoint.score is not None) == judges
    assert done.seconds == 2.0
    assert "a node is being drained" in capsys.readouterr().err
    alone = ray_train._to_the_end(replace(job, make_evaluate=None), lambda: False)
    assert alone.first_step == 8
    assert groups == [0, 8, 8], "nothing would judge it"


def said_where(folder: Path) -> Any:
    """Return what makes slow inputs, and says on which node each rank has."""

    def make(
        run: Recipe, stage: StageConfig, pins: Mapping[str, int] | None, loader: Loader
    ) -> Inputs:  # here, for workers cannot import this module
        import ray

        if ray.is_initialized():
            (folder / f"{loader.rank} {ray.get_runtime_context().get_node_id()}").touch()
        return ending_child.slow_inputs(run, stage, pins, loader)

    return make


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start three nodes of one CPU each, whose workers may have the modules of this folder."""
    import ray.cloudpickle
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    nodes = [cluster.add_node(**node) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    modules = (two_workers, small_stage, ending_child)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    yield cluster, nodes
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.parametrize("field", ["run_directory", "cache_root"])
def test_a_folder_that_is_not_shared_is_refused_before_the_work(
    tmp_path, monkeypatch, three_nodes, field
):
    """One is below the working folder: shared by those whose working folder it is."""
    monkeypatch.chdir(tmp_path)
    run = ending_child.recipe(tmp_path / "run", 2).model_copy(
        update={field: f"/proc/self/cwd/{field}/here"}
    )
    with pytest.raises(BadInput, match=f"^node .* to /proc/self/cwd/{field}.*workers.count=1$"):
        launch.train(run, run.stage("stage2"), make_inputs=two_workers.noise_inputs)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".probe-*"))


def nodes_of(where: Path) -> list[str]:
    """Return the nodes on which workers have begun, in the order in which they did."""
    paths = sorted(where.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [*dict.fromkeys(path.name.split()[1] for path in paths)]


def trained_while(
    run: Recipe, where: Path, lose: Callable[[list[Any]], object], nodes: list[Any]
) -> StageResult:
    """Train a run, and lose nodes that it uses in the middle.

    Args:
        run: of `ending_child`.
        where: as `said_where`.
        lose: is given those of the nodes that workers are on, once they train.
        nodes: any but the head.
    """
    ended = threading.Event()

    def lost() -> None:
        wait_for_steps(run, CHECKPOINT_EVERY + 2, lambda: not ended.is_set())
        used = nodes_of(where)
        lose([node for node in nodes if node.node_id in used])

    loser = threading.Thread(target=lost)
    loser.start()
    try:
        return launch.train(run, run.stage("stage2"), make_inputs=said_where(where))
    finally:
        ended.set()
        loser.join(PATIENCE_SECONDS)


@pytest.mark.slow
@pytest.mark.ray
def test_a_training_that_loses_a_node_goes_on_by_itself(
    tmp_path, undisturbed, three_nodes, monkeypatch, capsys
):
    """Not one death is allowed for a bug."""
    monkeypatch.setattr(deaths, "MAX_DEATHS", 0)
    cluster, nodes = three_nodes
    run = ending_child.recipe(tmp_path / "run", 2, CHECKPOINT_EVERY)
    where = tmp_path / "where"
    where.mkdir()
    done = trained_while(
        run, where, lambda used: cluster.remove_node(used[0], allow_graceful=False), nodes
    )
    assert len(nodes_of(where)) == 3
    assert CHECKPOINT_EVERY <= done.first_step < STEPS
    assert done.checkpoint.step == STEPS
    sentence = f"others begin from the checkpoint of step {done.first_step} once there is room for"
    assert sentence in capsys.readouterr().err
    assert losses(run) == undisturbed(2)


@pytest.mark.slow
@pytest.mark.ray
def test_a_training_leaves_a_node_that_is_being_drained(
    tmp_path, undisturbed, three_nodes, monkeypatch, capsys
):
    """Its only checkpoints are the last step's and that which the drain is answered with."""
    monkeypatch.setattr(deaths, "MAX_DEATHS", 0)
    cluster, nodes = three_nodes
    run = ending_child.recipe(tmp_path / "run", 2)
    where = tmp_path / "where"
    where.mkdir()
    drained = list[str]()

    def drain(used: list[Any]) -> None:
        last = max(path.name for path in where.iterdir()).split()[1]  # of the highest rank
        there = [node.node_id for node in used]
        drained.append(last if last in there else there[0])
        draining.drain(cluster.address, drained[0])

    done = trained_while(run, where, drain, nodes)
    assert CHECKPOINT_EVERY < done.first_step < STEPS
    assert done.checkpoint.step == STEPS
    began = f"others begin from the checkpoint of step {done.first_step} once there is room for 2"
    told = capsys.readouterr().err
    assert f"stage2: a node is being drained; {began}" in told
    assert told.count("is being drained") == 1
    assert "did not say which folders it sees" not in told
    assert len(nodes_of(where)) == 3
    assert drained[0] in nodes_of(where)[:2]
    assert losses(run) == undisturbed(2)
