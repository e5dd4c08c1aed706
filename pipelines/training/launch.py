"""Launching a stage: here with one worker, else as Ray Train's; what they run is the same loop."""

import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from eupe.errors import BadInput
from eupe.heads import DistillationModel
from pipelines.machines import cluster, job_folder, lease
from pipelines.machines.errors import bad_input, keeping_traceback
from pipelines.machines.progress import followed
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.training import distributed, outputs, start
from pipelines.training.batches import Loader
from pipelines.training.inputs import Inputs, from_caches
from pipelines.training.loop import Evaluate, StageResult, train_stage
from pipelines.training.outputs import Output
from pipelines.training.workers import OneProcess, Workers

MakeInputs = Callable[[Recipe, StageConfig, Mapping[str, int] | None, Loader], Inputs]
"""(recipe, stage, pins, loader) -> this worker's inputs; as `inputs.from_caches`."""

MakeEvaluate = Callable[[Recipe, StageConfig, Inputs], Evaluate]
"""(recipe, stage, inputs) -> what judges the model; made on rank 0 only."""

RAY_FOLDER = "ray"
"""Below the stage's directory: what Ray Train keeps of its runs. Nothing of ours is in it."""


@dataclass(frozen=True)
class _Job:
    """What a worker is told, whichever process it is in."""

    recipe: Recipe
    stage: StageConfig
    make_inputs: MakeInputs
    make_evaluate: MakeEvaluate | None
    pins: Mapping[str, int] | None
    resume: bool
    output: Output
    folder: Path | None = None

    @property
    def directory(self) -> Path:
        return self.output.directory

    def train(self, workers: Workers, device: torch.device) -> StageResult:
        """Do one worker's share."""
        loader = Loader(self.recipe.workers, workers.rank, workers.world_size)
        inputs = self.make_inputs(self.recipe, self.stage, self.pins, loader)
        if workers.rank == 0:  # what could be refused was: what the run has is left for this
            outputs.begin(self.recipe, self.output)
        evaluate = None
        if self.make_evaluate is not None:  # all workers pause for it, one does it
            make = self.make_evaluate if workers.rank == 0 else _on_rank_0
            evaluate = make(self.recipe, self.stage, inputs)
        done = train_stage(
            self.recipe,
            self.stage,
            inputs,
            self.directory,
            resume=self.resume,
            workers=workers,
            device=device,
            evaluate=evaluate,
        )
        # Of all workers, as the figures are while it runs: shares are equal, but for a row.
        return replace(done, images_per_second=done.images_per_second * workers.world_size)


def train(
    recipe: Recipe,
    stage: StageConfig,
    *,
    make_inputs: MakeInputs = from_caches,
    make_evaluate: MakeEvaluate | None = None,
    resume: bool = True,
    wait: bool = True,
) -> StageResult:
    """Train a stage with the workers that the recipe asks for.

    Args:
        recipe: the run; `workers.count` of 1 trains in this process, more start Ray Train.
        stage: one of its stages.
        make_inputs: a function that every worker can import: it opens what the stage trains on,
            at the manifest versions of the checkpoint that is resumed.
        make_evaluate: likewise, of what judges the model as it goes.
        resume: as in `train_stage`.
        wait: for another process that trains it; False: do not.

    Returns:
        what was done, as rank 0 saw it; images per second are those of all workers.

    Raises:
        BadInput: as for `train_stage`, or more workers than there is room for.
        StoreError: a cache cannot be read.
        Busy: another process trains it, and `wait` is False.
        WorkerGroupError: of Ray Train: a worker raised anything else; its notes say all of it.
    """
    outputs.check_earlier(recipe, stage)
    output = outputs.asked(recipe, stage)
    with lease.held(output.directory, wait):
        return _train(recipe, stage, output, make_inputs, make_evaluate, resume)


def _train(
    recipe: Recipe,
    stage: StageConfig,
    output: Output,
    make_inputs: MakeInputs,
    make_evaluate: MakeEvaluate | None,
    resume: bool,
) -> StageResult:
    """Train a stage where its output lies; whatever is there of it is not trained again."""
    saved = output.newest()
    pins = None if saved is None else saved.pins
    job = _Job(recipe, stage, make_inputs, make_evaluate, pins, resume, output)
    judged = make_evaluate is None or (saved is not None and saved.score is not None)
    if saved is not None and saved.step >= stage.steps and judged and resume:
        alone = make_inputs(recipe, stage, pins, Loader(recipe.workers))
        start.schedule_start(saved, start.identity(recipe, stage, alone))  # refuses another run
        outputs.begin(recipe, output)
        return StageResult(saved, saved.step, 0.0, 0.0, 0.0, 0)
    done = _trained(job)
    output.add_seconds(done.seconds)
    return done


def _trained(job: _Job) -> StageResult:
    """Train here, or with Ray Train."""
    recipe = job.recipe
    if recipe.workers.count > 1:
        return _train_distributed(job)
    if recipe.workers.use_gpu and not torch.cuda.is_available():
        raise BadInput(
            "workers.use_gpu = true: this node has no GPU that torch sees; set it to false, or "
            "train on a node that has one"
        )
    return job.train(OneProcess(), torch.device("cuda" if recipe.workers.use_gpu else "cpu"))


def _train_distributed(job: _Job) -> StageResult:
    """Train with Ray Train, which starts the workers, joins them and ends them together."""
    # Opened here first: what is wrong with a cache is said before any worker starts, and all
    # workers read the versions that are the newest now, whatever a builder commits meanwhile.
    first = Loader(job.recipe.workers, 0, job.recipe.workers.count)
    inputs = job.make_inputs(job.recipe, job.stage, job.pins, first)
    with job_folder.made(job.directory, "workers") as folder, cluster.connect():
        job = replace(job, pins=dict(inputs.pins), folder=folder)
        _check_room(job.recipe)
        # Imported only now: Ray reads its settings then, and `connect` settles them.
        from ray.train import RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchTrainer

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
            ),
        )
        try:
            with _own_interrupts(), followed(folder):
                result: Any = trainer.fit()  # Ray's annotations lack return_value
        except WorkerGroupError as error:
            fault = _fault(error.worker_failures)
            if fault is not None:
                raise fault from error
            for rank, failure in sorted(error.worker_failures.items()):
                error.add_note(f"rank {rank}: {failure}")  # whole: Ray Train's own words are cut
            raise
    done: StageResult = result.return_value
    return done


@keeping_traceback()
def _worker(config: dict[str, _Job]) -> StageResult:
    """Run in each of Ray Train's workers, in a process group that Ray Train has made."""
    from ray.train.torch import get_device

    job, device = config["job"], get_device()
    workers = distributed.of_process_group(job.stage, device)
    # Rank 0 tells the launching process, once for all workers.
    os.environ[job_folder.VARIABLE] = "" if workers.rank else str(job.folder)
    return job.train(workers, device)


def _on_rank_0(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> Evaluate:
    def evaluate(model: DistillationModel, step: int) -> Mapping[str, float]:
        raise AssertionError("the model is judged on rank 0")

    return evaluate


def _check_room(recipe: Recipe) -> None:
    """Refuse workers that a Ray of this machine alone has no room for: they would wait for ever."""
    import ray

    wanted = recipe.workers.count
    if recipe.workers.use_gpu:
        cluster.require_gpus(wanted, f"workers.use_gpu = true, workers.count = {wanted}")
        return
    there = int(ray.cluster_resources().get("CPU", 0))
    if wanted > there and "RAY_ADDRESS" not in os.environ:  # a cluster may grow
        raise BadInput(
            f"workers.count = {wanted}: Ray has {there} CPU here; lower it, or name a cluster "
            "in RAY_ADDRESS"
        )


def _fault(failures: Mapping[int, Exception]) -> Exception | None:
    """Return what a worker says that the user can act on; None if nothing does."""
    faults = (failures[rank] for rank in sorted(failures))
    return next((fault for fault in faults if bad_input(fault) is not None), None)


@contextmanager
def _own_interrupts() -> Iterator[None]:
    """Keep an interrupt an interrupt: Ray Train turns it into a clean exit, and stays in charge."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if error.code == 0:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, handler)
