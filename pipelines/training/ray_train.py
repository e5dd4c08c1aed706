"""Training by several workers: Ray Train starts them, joins them and ends them together.

Workers that died are followed by others, which go on from the newest checkpoint. Ray's own
`FailureConfig` counts a lost node and a bug alike, and for ever; here bad input and a bug end it at
once, a death counts by the hour, and one that a lost node explains for nothing, as in a pool of
actors (pipelines.machines.pool). Workers of which one's node is being drained save what they have
at the end of their step, and others follow them elsewhere.
"""

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from signal import SIGINT
from typing import Any

from cache.files import copies
from eupe.errors import BadInput
from pipelines.machines import (
    cluster,
    deaths,
    every_node,
    interrupt,
    job_folder,
    shared_folders,
)
from pipelines.machines.deaths import Deaths, Drained
from pipelines.machines.errors import RemoteBug, bad_input, keeping_traceback
from pipelines.machines.interrupt import Terminated
from pipelines.machines.progress import followed
from pipelines.recipe.config import Recipe
from pipelines.training import distributed, shared_lanes
from pipelines.training.batches import Loader
from pipelines.training.job import Job
from pipelines.training.loop import StageResult

ANSWER_SECONDS = 120.0
"""For a node to say which folders it sees: it starts a process for it."""
RAY_FOLDER = "ray"
"""Below the stage's directory: what Ray Train keeps of its runs. Nothing of ours is in it."""
LOCK_SECONDS = 120.0
"""For which the lock of a worker that died may outlive it: on a network drive, its lease."""
SEEN_SECONDS = 5.0
"""Until Ray Train, which looks every two, has seen that a worker is dead."""


def train(job: Job) -> StageResult:
    """Train a stage with the workers that its recipe asks for; see `launch.train`."""
    # Opened here first: what is wrong with a cache is said before any worker starts, and all
    # workers read the versions that are the newest now, whatever a builder commits meanwhile.
    first = Loader(job.recipe.workers, 0, job.recipe.workers.count)
    inputs = job.make_inputs(job.recipe, job.stage, job.pins, first)
    with (
        job_folder.made(job.directory, "workers") as folder,
        cluster.connect(),
        interrupt.in_order(partial(job_folder.end, folder)) as ending,
    ):
        job = replace(job, pins=dict(inputs.pins), folder=folder)
        _check_room(job.recipe)
        _say_what_is_shared(job)
        return job.ended(_to_the_end(job, ending), ending())


def _to_the_end(job: Job, ending: Callable[[], bool]) -> StageResult:
    """Have workers train, and others follow those that die."""
    # Imported only now: Ray reads its settings then, and `connect` settles them.
    from ray.train import TrainingFailedError

    dead, seconds = Deaths(), 0.0
    while True:
        _check_folders(job.recipe)
        nodes = deaths.nodes_alive()
        try:
            done = _fit(job)
            seconds += done.seconds
            if _whole(job, done) or ending():
                return replace(done, seconds=seconds)
            why = "a node is being drained"
        except TrainingFailedError as error:
            if ending():
                raise Terminated(f"{job.stage.name}: {_newest(job)} is kept") from error
            _refuse(error, nodes, dead)
            why = "a worker died"
        print(
            f"{job.stage.name}: {why}; others begin from {_newest(job)} once there is room for "
            f"{job.recipe.workers.count}",
            file=sys.stderr,
        )
        job = replace(job, resume=True, lock_seconds=LOCK_SECONDS)


def _whole(job: Job, done: StageResult) -> bool:
    """Return True if nothing is left to be trained, nor to be judged by whoever comes after."""
    if done.checkpoint.step < job.stage.steps:
        return False
    judged = job.make_evaluate is None or done.checkpoint.score is not None
    return judged or done.first_step == job.stage.steps  # no score comes of its evaluation


def _newest(job: Job) -> str:
    saved = job.output.newest()
    return "step 0" if saved is None else f"the checkpoint of step {saved.step}"


def _fit(job: Job) -> StageResult:
    """Have one group of workers train to the end, or until one of them fails."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    assert job.folder is not None
    trainer = TorchTrainer(
        # Ray hands on what it returns, though it asks for a function of no result.
        _worker,  # type: ignore[arg-type]
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=job.recipe.workers.count, use_gpu=job.recipe.workers.use_gpu
        ),
        # A name of its own: Ray Train restores the result of a name that it knows, and trains
        # nothing. Going on is the loop's affair, from its own checkpoint.
        run_config=RunConfig(
            name=f"{job.stage.name}-{secrets.token_hex(6)}",
            storage_path=str(job.directory.absolute() / RAY_FOLDER),
            failure_config=FailureConfig(0, max_preemption_failures=0),  # type: ignore[call-arg]
        ),
    )
    with _own_interrupts(), followed(job.folder):
        result: Any = trainer.fit()  # Ray's annotations lack return_value
    done: StageResult = result.return_value
    return done


@keeping_traceback()
def _worker(config: dict[str, Job]) -> StageResult:
    """Run in each of Ray Train's workers, in a process group that Ray Train has made."""
    import ray
    from ray.train.torch import get_device

    job, device = config["job"], get_device()
    workers = distributed.of_process_group(job.stage, device)
    # Rank 0 tells the launching process, once for all workers.
    os.environ[job_folder.VARIABLE] = "" if workers.rank else str(job.folder)
    asked = job_folder.Ending(job_folder.ours())
    drained = Drained(ray.get_runtime_context().get_node_id())
    try:
        return job.train(workers, device, lambda: asked() or drained())
    except Exception as error:
        if bad_input(error) is None:  # of a peer that died, perhaps, and that is what is to be told
            time.sleep(SEEN_SECONDS)
        raise


def _say_what_is_shared(job: Job) -> None:
    """Say what workers read more than once, if the recipe asks for lanes or there are machines."""
    said = shared_lanes.told(job.recipe, job.stage)
    if said is not None and (job.recipe.lanes > 1 or len(deaths.nodes_alive()) > 1):
        print(said, file=sys.stderr)


def _check_room(recipe: Recipe) -> None:
    """Refuse workers that a Ray of this machine alone has no room for: they would wait for ever."""
    import ray

    wanted = recipe.workers.count
    if recipe.workers.use_gpu:
        cluster.require_gpus(wanted, f"workers.use_gpu = true, workers.count = {wanted}")
        return
    there = int(ray.cluster_resources().get("CPU", 0))
    if wanted > there and cluster.address_named() is None:  # a cluster may grow
        raise BadInput(
            f"workers.count = {wanted}: Ray has {there} CPU here; lower it, or name a cluster "
            "in RAY_ADDRESS"
        )


def _check_folders(recipe: Recipe) -> None:
    """Refuse folders that a node where workers may come to be does not see as this machine does.

    A folder in which nothing can be written is refused by whoever wants to write there.

    Raises:
        BadInput: naming the node and the folders.
    """
    import ray

    if deaths.nodes_alive() == {ray.get_runtime_context().get_node_id()}:
        return
    if copies.remote(recipe.outputs) is not None:
        raise BadInput(
            f"run_directory = {recipe.run_directory!r}, workers.count = {recipe.workers.count}: of "
            "a run in a bucket the workers of one machine train together, and this cluster has "
            "several: name a folder that all of them share, or train with workers.count=1"
        )
    resource = "GPU" if recipe.workers.use_gpu else "CPU"
    with shared_folders.laid([str(recipe.outputs), recipe.cache_root]) as laid:
        look = partial(_unseen, probes=laid.probes)
        answers = every_node.ask(look, ANSWER_SECONDS, resource)
    for node, files in answers.said.items():
        if files:
            places = " and ".join(file.rpartition("/")[0] for file in files)
            raise BadInput(
                f"{node} does not see what this machine writes to {places}, which workers of "
                "several nodes share; mount the same file system there under the same path, name "
                "a bucket as cache_root, or train with workers.count=1"
            )
    for node, why in answers.mute.items():
        print(f"{node} did not say which folders it sees: {why}", file=sys.stderr)


def _unseen(node: str, probes: Mapping[str, bytes]) -> tuple[str, ...]:
    return shared_folders.unseen(probes)


def _refuse(error: Exception, nodes: frozenset[str], dead: Deaths) -> None:
    """Raise what ended a group of workers, unless others may follow them.

    Args:
        error: of Ray Train.
        nodes: those that lived when the group was started.
        dead: deaths of groups before it.
    """
    from ray.train import PreemptionError

    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    faults = (failures[rank] for rank in sorted(failures))
    fault = next((fault for fault in faults if bad_input(fault) is not None), None)
    if fault is not None:
        raise fault from error
    if isinstance(error, PreemptionError):
        return
    for rank, failure in sorted(failures.items()):
        error.add_note(f"rank {rank}: {failure}")  # whole: Ray Train's own words are cut
    # With one node Ray would be gone with it.
    seconds = deaths.NODE_SECONDS if len(nodes) > 1 else 0.0
    if any(not isinstance(failure, RemoteBug) for failure in failures.values()):
        if dead.add(nodes, seconds):
            error.add_note(
                f"workers died more than {deaths.MAX_DEATHS} times within the hour; often memory "
                "ran out: lower stage.micro_batch or workers.prefetch_batches"
            )
            raise error
    elif not deaths.is_lost_one(nodes, seconds):
        raise error


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Keep an interrupt an interrupt: Ray Train turns it into a clean exit, and stays in charge."""
    try:
        with interrupt.unchanged(SIGINT):
            yield
    except SystemExit as error:
        if error.code == 0:
            raise KeyboardInterrupt from error
        raise
