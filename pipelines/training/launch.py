"""Launching a stage: here with one worker, else as Ray Train's; what they run is the same loop."""

import torch

from cache.files import trees
from eupe.errors import BadInput
from pipelines.machines import interrupt, lease
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.training import outputs, ray_train, start
from pipelines.training.arrivals import Arrivals
from pipelines.training.batches import Loader
from pipelines.training.inputs import from_caches
from pipelines.training.job import Job, MakeEvaluate, MakeInputs
from pipelines.training.loop import StageResult
from pipelines.training.outputs import Output
from pipelines.training.workers import OneProcess


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

    SIGTERM has it save what it has at the end of its step; the same call goes on from there.

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
        Terminated: SIGTERM came, and what is done is saved.
        WorkerGroupError: of Ray Train: a worker raised anything else; its notes say all of it.
    """
    outputs.bring(recipe.directory)
    outputs.check_earlier(recipe, stage)
    if stage.on_missing == "wait":  # for the samples too, which its address counts
        Arrivals(recipe, stage).stores()
    output = outputs.asked(recipe, stage)
    with lease.held(output.directory, wait):
        trees.bring(output.directory)  # another machine may have had the lease
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
    job = Job(recipe, stage, make_inputs, make_evaluate, pins, resume, output)
    judged = make_evaluate is None or (saved is not None and saved.score is not None)
    if saved is not None and saved.step >= stage.steps and judged and resume:
        alone = make_inputs(recipe, stage, pins, Loader(recipe.workers))
        initial = start.initial_digest(recipe, stage)
        start.begins_anew(saved, start.identity(recipe, stage, alone, initial))  # or is refused
        outputs.begin(recipe, output)
        return StageResult(saved, saved.step, 0.0, 0.0, 0.0, 0)
    return ray_train.train(job) if recipe.workers.count > 1 else _train_here(job)


def _train_here(job: Job) -> StageResult:
    recipe = job.recipe
    if recipe.workers.use_gpu and not torch.cuda.is_available():
        raise BadInput(
            "workers.use_gpu = true: this node has no GPU that torch sees; set it to false, or "
            "train on a node that has one"
        )
    device = torch.device("cuda" if recipe.workers.use_gpu else "cpu")
    with interrupt.in_order() as ending:
        return job.ended(job.train(OneProcess(), device, ending), ending())
