"""THE training loop: a student learns normalised teacher tokens, whoever serves them (Eq. 6).

A step of the loop is one global batch. Its micro-batches come from `Inputs.batches`; the loss of
each is a sum over rows divided by the size of the global batch, so gradients of micro-batches and
workers simply add up, and are scaled once by (rows / valid rows) before the optimizer steps. Every
draw is addressed by the step, so a run that is killed and resumed repeats what it would have done.
"""

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cache.files import atomic, trees
from cache.files.refused import writing
from eupe.drop_path import RowDraws
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.heads import DistillationModel
from eupe.losses import RowLosses, row_losses, teacher_loss, total_loss
from eupe.schedules import warmup_cosine
from pipelines.machines.progress import track
from pipelines.recipe import whole_batches
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint, tracking, whole_state
from pipelines.records.checkpoint import Checkpoint, Contents
from pipelines.training import compiled, precision, start
from pipelines.training.ahead import Ahead
from pipelines.training.batches import Batch
from pipelines.training.inputs import Inputs
from pipelines.training.meters import TERMS, Pace, Window, in_words
from pipelines.training.workers import OneProcess, Workers, from_first, on_first

Evaluate = Callable[[DistillationModel, int], Mapping[str, float]]
"""(model, steps done) -> held-out figures; the one named SCORE compares checkpoints."""

SCORE = "held_out/score"


@dataclass(frozen=True)
class StageResult:
    """A stage that is done.

    Attributes:
        checkpoint: its last.
        first_step: step this process began at; 0 unless it resumed.
        seconds: this process took, evaluation included; 0.0 if all of it was there.
        images_per_second: over this process's steps; 0.0 if there were none to do.
        wait_share: share of that time spent waiting for data.
        invalid_rows: rows skipped, over this process's steps and all workers.
    """

    checkpoint: Checkpoint
    first_step: int
    seconds: float
    images_per_second: float
    wait_share: float
    invalid_rows: int


def train_stage(
    recipe: Recipe,
    stage: StageConfig,
    inputs: Inputs,
    directory: Path,
    *,
    resume: bool = True,
    workers: Workers | None = None,
    device: str | torch.device = "cpu",
    evaluate: Evaluate | None = None,
    ending: Callable[[], bool] = lambda: False,
    lock_seconds: float = 0.0,
) -> StageResult:
    """Train a stage to its end, from its newest checkpoint if there is one.

    A stage that had ended and is asked for more steps goes on with its schedule begun anew.

    Args:
        recipe: the run.
        stage: one of its stages.
        inputs: what it trains on.
        directory: of the stage: checkpoints/, metrics.jsonl and tensorboard/ go there.
        resume: go on from a checkpoint; if False, one that is there is refused, never removed.
        workers: the processes that train together; None for this one alone.
        device: to train on.
        evaluate: called every `stage.evaluate_every` steps, and after the last, on rank 0; the
            other workers wait, and must be given one too.
        ending: asked at every step. Once it says True to one of the workers, all save what they
            have at the end of that step, leave it unjudged, and return.
        lock_seconds: for which the lock of a worker that died may outlive it.

    Returns:
        what was done; nothing is trained when the last step has its checkpoint already.

    Raises:
        BadInput: a checkpoint of another run (named field by field) or length, pins of other
            manifest versions, a directory that another process trains in, a batch without a valid
            row, or a gradient that is not finite.
    """
    workers = workers or OneProcess()
    with _locked(directory, workers.rank, lock_seconds):
        run = _Run(recipe, stage, inputs, directory, workers, torch.device(device), ending)
        return run.train(resume, evaluate)


class _Run:
    """One process's training of one stage."""

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        inputs: Inputs,
        directory: Path,
        workers: Workers,
        device: torch.device,
        ending: Callable[[], bool],
    ) -> None:
        self.recipe, self.stage, self.inputs = recipe, stage, inputs
        self.ending, self.ends = ending, False
        self.directory, self.workers, self.device = directory, workers, device
        initial = from_first(workers, lambda: start.initial_digest(recipe, stage))
        self.identity = start.identity(recipe, stage, inputs, initial)
        model = start.drawn_model(recipe, stage, inputs.dims)
        if initial is not None:  # `wrap` gives the others what rank 0 has
            on_first(workers, partial(self._load_initial, model))
        # Channels last: a convolution takes half the time on a CPU, and is the faster one on a GPU.
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        if stage.activation_checkpointing:
            network: Any = model.encoder.network  # timm's and open_clip's have it
            network.set_grad_checkpointing(True)
        self.draws = RowDraws(model.encoder.network)
        whole_batches.check(model.encoder.network, stage, workers.world_size)
        self.address = f"network/{recipe.seed}/{stage.name}"
        self.wrapped = workers.wrap(self.model)
        self.row_losses: RowLosses = row_losses
        if compiled.pays(stage, device):
            compiled.compile_regions(self.model)
            self.row_losses = compiled.row_losses()
        self.optimizer = start.optimizer(self.model, stage)
        self.window = Window.empty(inputs.dims, device)
        self.schedule_start = 0
        self.ahead = Ahead(device)

    def _load_initial(self, model: DistillationModel) -> None:
        """Load what the stage starts from, unless it goes on from a checkpoint."""
        if checkpoint.latest(self.directory) is None:
            start.load_initial(model, self.recipe, self.stage)

    def train(self, resume: bool, evaluate: Evaluate | None) -> StageResult:
        stage, started = self.stage, time.perf_counter()
        # On a network drive another machine may not see yet what was saved a moment ago.
        saved = from_first(self.workers, partial(checkpoint.latest, self.directory))
        if saved is not None:
            self._restore(saved, resume)
        first = saved.step if saved is not None else 0
        # Killed between saving and judging: what an undisturbed run has is made up for.
        unjudged = None
        if evaluate is not None and saved is not None and self._due(first):
            unjudged = saved if saved.score is None else None
        trackers = tracking.Trackers()
        if self.workers.rank == 0 and (unjudged is not None or first < stage.steps):
            trackers = tracking.open_trackers(self.directory, first + 1)
        pace = Pace()
        try:
            if evaluate is not None and unjudged is not None:
                saved = self._judged(evaluate, unjudged, trackers)
            with (
                track(stage.steps, f"Training {stage.name}", "steps", first) as progress,
                closing(_steps(self.inputs.batches(range(first, stage.steps)))) as steps,
            ):
                for micros in steps:
                    done = self._step(micros, pace) + 1
                    progress.advance()
                    last = done == stage.steps
                    if done % stage.log_every == 0 or last:
                        figures = self._figures(done, pace)
                        trackers.log(done, figures)
                        progress.note(in_words(figures, self.inputs.dims))
                    judge = evaluate if self._due(done) and not self.ends else None
                    due = last or done % stage.checkpoint_every == 0
                    if judge is not None or due or self.ends:
                        saved = self._save(done, trackers)
                        if judge is not None:  # what it raises must lose nothing
                            saved = self._judged(judge, saved, trackers)
                    if self.ends:
                        break
                    pace.mark()
        finally:
            trackers.close()
        assert saved is not None  # every stage has a step, and the last one saves
        seconds = time.perf_counter() - started
        return StageResult(
            saved,
            first,
            seconds,
            pace.images_per_second,
            pace.wait_share,
            pace.invalid,
        )

    def _step(self, micros: Iterable[Batch], pace: Pace) -> int:
        """Do one global step; return its number."""
        step, rows, valid = 0, self.stage.global_batch, 0
        sums = torch.zeros_like(self.window.sums)
        for batch in micros:
            step = batch.step
            self.draws.draw(f"{self.address}/{step}", batch.places, self.device)
            with self.workers.accumulate(self.wrapped, batch.last):
                sums += self._backward(batch, rows)
            self.ahead.send(batch.coming)
            valid += int(batch.valid.sum())
            pace.add(len(batch), batch.wait_seconds)
        num_valid, num_ending = self.workers.count((valid, self.ending()), self.device)
        self.ends = num_ending > 0  # on all workers at the same step
        if not num_valid:
            raise BadInput(f"step {step}: none of the batch's {rows} rows is valid in all stores")
        factor = rows / num_valid
        if factor != 1:  # rows that are not valid: the mean is over the others
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        limit = self.stage.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), float("inf") if limit is None else limit
        )
        if isinstance(norm, DTensor):  # of sharded gradients: every worker has a part
            norm = norm.full_tensor()
        if not bool(norm.isfinite()):  # looked at before the weights are touched
            raise BadInput(
                f"step {step}: the gradient's norm is {norm.item()}; weights and checkpoints are "
                "still sound; a lower optimizer.lr, float32 precision or clipping may help"
            )
        rate = self.stage.peak_lr * warmup_cosine(
            step - self.schedule_start,
            steps=self.stage.steps - self.schedule_start,
            warmup_steps=self.stage.warmup_steps,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window.add(sums * factor, norm, rows - num_valid)
        pace.invalid += rows - num_valid
        pace.add()
        return step

    def _backward(self, batch: Batch, rows: int) -> Tensor:
        """Add one micro-batch's gradients; return its terms, a part of the batch's mean [T, 4]."""
        stage, loss = self.stage, self.stage.loss
        arrived = self.ahead.take(batch)
        with precision.products(self.device), precision.autocast(stage, self.device):
            _, predicted = self.wrapped(arrived.pixels())
        tokens, valid = arrived.targets()
        targets = {name: Features(each.summary, each.patches) for name, each in tokens.items()}
        losses = [
            teacher_loss(
                predicted[name],
                targets[name],
                valid,
                alpha=loss.alpha,
                beta=loss.beta,
                smooth_l1_beta=loss.smooth_l1_beta,
                gamma=loss.gamma.get(name, 1.0),
                count=float(rows),
                row_losses=self.row_losses,
            )
            for name in self.inputs.dims
        ]
        # Gradients are averaged over workers, the loss is a sum over them.
        with precision.products(self.device):
            (total_loss(losses) * self.workers.world_size).backward()
        return torch.stack([torch.stack(terms) for terms in losses]).detach()

    def _figures(self, done: int, pace: Pace) -> dict[str, float]:
        """Return the means since the last log and start over."""
        terms, norm, invalid = self.window.take(self.workers)
        figures = {"loss/total": float(terms[:, -1].sum())}
        for name, values in zip(self.inputs.dims, terms.tolist(), strict=True):
            figures |= {f"loss/{name}/{t}": v for t, v in zip(TERMS, values, strict=True)}
        figures["lr"] = self.optimizer.param_groups[0]["lr"]
        figures["gradient_norm"] = norm
        figures["invalid_rows"] = float(invalid)
        return {**figures, **pace.since(self.workers.world_size)}

    def _due(self, done: int) -> bool:
        """Whether the student is judged after so many steps."""
        every = self.stage.evaluate_every
        return done == self.stage.steps or (every is not None and done % every == 0)

    def _judged(
        self, evaluate: Evaluate, saved: Checkpoint, trackers: tracking.Trackers
    ) -> Checkpoint:
        """Judge the student as it was just saved, and write the figures down."""
        self.inputs.wait_to_judge()  # on every worker, so that none waits in a collective
        figures: Mapping[str, float] = {}
        with self.workers.whole(self.model) as model:
            if self.workers.rank == 0:
                model.eval()
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    figures = evaluate(model, saved.step)
                model.train()
        trackers.log(saved.step, figures)
        if SCORE in figures:  # on rank 0 alone
            keep = self.stage.keep_checkpoints
            saved = checkpoint.judge(self.directory, saved, figures[SCORE], keep)
            trackers.flush()
            trees.publish(self.directory)
        self.workers.barrier()
        return saved

    def _restore(self, saved: Checkpoint, resume: bool) -> None:
        if not resume:
            raise BadInput(
                f"{self.directory} has a checkpoint of step {saved.step}; resume it, or give "
                "another run directory"
            )
        anew = start.begins_anew(saved, self.identity)
        if anew and self.workers.rank == 0:
            print(
                f"{self.stage.name} was trained to its end, step {saved.step}: it goes on to "
                f"{self.stage.steps}, its learning rate's schedule begun anew",
                file=sys.stderr,
            )
        moved = any(self.inputs.pins.get(name, pin) != pin for name, pin in saved.pins.items())
        if moved and not anew:
            raise BadInput(
                f"{saved.directory} reads manifest versions {saved.pins}, this run "
                f"{dict(self.inputs.pins)}; open the stores at the checkpoint's versions"
            )
        for read, module in (
            (saved.encoder, self.model.encoder.network),
            (saved.heads, self.model.heads),
        ):
            fitting = partial(start.fitting, saved, read, module)
            whole_state.load_weights(module, on_first(self.workers, fitting) or {})
        state = on_first(self.workers, saved.state) or {}
        optimizer = state.pop("optimizer", {})
        whole_state.load_optimizer_state(self.model, self.optimizer, optimizer)
        small = self.workers.tell(state)
        self.window = Window(**small["window"]).part(self.workers).to(self.device)
        self.schedule_start = saved.step if anew else int(small.get("schedule_start", 0))

    def _save(self, done: int, trackers: tracking.Trackers) -> Checkpoint:
        encoder = whole_state.weights(self.model.encoder.network)
        heads = whole_state.weights(self.model.heads)
        optimizer = whole_state.optimizer_state(self.model, self.optimizer)
        window = self.window.state(self.workers)

        def write() -> Checkpoint:
            contents = Contents(
                step=done,
                identity=self.identity,
                pins=self.inputs.pins,
                encoder=encoder,
                heads=heads,
                normalisers=start.normaliser_state(self.inputs),
                state={
                    "optimizer": optimizer,
                    "window": window,
                    "schedule_start": self.schedule_start,
                },
                recipe=self.recipe.model_dump(mode="json"),
            )
            saved = checkpoint.save(self.directory, contents, self.stage.keep_checkpoints)
            trackers.flush()
            trees.publish(self.directory)
            return saved

        return from_first(self.workers, write)


def _steps(batches: Iterable[Batch]) -> Generator[Iterator[Batch]]:
    """Group micro-batches by step; each group must be used up before the next is asked for."""
    stream = iter(batches)

    def rest(batch: Batch) -> Iterator[Batch]:
        yield batch
        while not batch.last:
            batch = next(stream)
            yield batch

    for batch in stream:
        yield rest(batch)


@contextmanager
def _locked(directory: Path, rank: int, seconds: float) -> Iterator[None]:
    """Let one process (of rank 0) write below a stage's directory.

    On a file system without locks its lease alone (`pipelines.machines.lease`) sees to that: a file
    in a lock's place would stay when its process is killed, and no other machine could tell.
    """
    if rank:
        yield
        return
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "train.lock", fallback_to_soft=False)
        try:
            lock.acquire(timeout=seconds)
        except Timeout as error:  # an OSError, too
            raise BadInput(
                f"{directory}: another process is training there; wait for it, or give another "
                "run directory"
            ) from error
        except OSError as error:
            if error.errno not in atomic.NO_LOCKS:
                raise
    try:
        yield
    finally:
        lock.release()
