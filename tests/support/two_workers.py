"""Two gloo workers kept warm for a test module, and what they are asked to do in it.

A worker is a process with its own interpreter; what it runs is a function of this module. The two
meet through a file, and talk over the loopback device only.
"""

import io
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from torch._dynamo.backends.debugging import aot_eager

from cache.shard_ranges import ShardRange
from eupe.heads import DistillationModel
from eupe.weights import state_digest
from pipelines.features.sources import Fetched, Normalisers, Targets
from pipelines.images.reader import ImageReader
from pipelines.recipe.config import Recipe
from pipelines.recipe.resolutions import Resolutions
from pipelines.recipe.stage import StageConfig
from pipelines.training import compiled, distributed, inputs
from pipelines.training.batches import Batch, Loader
from pipelines.training.feeds import Feed, Part
from pipelines.training.inputs import Inputs
from pipelines.training.loop import Evaluate, StageResult, train_stage
from pipelines.training.workers import OneProcess, Workers, on_first
from support import small_stage

WORLD = 2
NUM_SAMPLES = 53  # divides by nothing: epochs end inside batches
GIVE_UP_SECONDS = 300


class Stopped(Exception):
    """A run was interrupted where the test wanted it."""


class Pair:
    """Two worker processes that have joined one process group."""

    def __init__(self, workers: "list[subprocess.Popen[bytes]]") -> None:
        self._workers = workers

    def run(self, work: Callable[..., Any], *arguments: object) -> list[Any]:
        """Run `work(*arguments)` in both at once; return what each returned, by rank.

        Raises:
            Exception: what the first of them raised.
        """
        for worker in self._workers:
            assert worker.stdin is not None
            pickle.dump((work, arguments), worker.stdin)
            worker.stdin.flush()
        answers = [pickle.load(worker.stdout) for worker in self._workers]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


@contextmanager
def pair(meeting_point: Path) -> Iterator[Pair]:
    """Start two workers and end them with the block."""
    with ExitStack() as stack:
        workers = []
        for rank in range(WORLD):
            command = [sys.executable, __file__, str(rank), str(meeting_point)]
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            workers.append(stack.enter_context(child))
        yield Pair(workers)  # leaving the stack closes each one's input, at which it ends


def _serve(rank: int, meeting_point: str) -> None:
    """Join the process group and do what comes in, until nothing more does."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a stray print is no answer
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = next(
        name for _, name in socket.if_nameindex() if name.startswith("lo")
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=GIVE_UP_SECONDS),
    )
    while True:
        try:
            work, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = work(*arguments)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()
    dist.destroy_process_group()


def workers_here(stage: StageConfig) -> Workers:
    """Return the workers that this process is one of: the pair, or itself alone."""
    if dist.is_initialized():
        return distributed.of_process_group(stage, "cpu")
    return OneProcess()


@dataclass(frozen=True)
class Trained:
    """What one worker did.

    Attributes:
        order: (step, sample ids, view numbers) of each micro-batch it was given.
        result: None if it was stopped.
        looked_at: steps at which the model was looked at, and its digest then.
    """

    order: list[tuple[int, list[str], list[int]]]
    result: StageResult | None
    looked_at: dict[int, str]


def train(
    run: Recipe,
    stop_at: int | None = None,
    look: bool = False,
    gathered: torch.dtype | None = None,
    ask: tuple[int, int] | None = None,
) -> Trained:
    """Train the recipe's stage on the noise.

    Args:
        run: of this module's `recipe`.
        stop_at: leave off before this step.
        look: evaluate, which remembers what the model was like.
        gathered: dtype of gathered shards, which is otherwise CUDA's affair.
        ask: (rank, step): ask that worker to end, in that step.
    """
    stage = run.stage("stage2")
    workers = workers_here(stage) if gathered is None else distributed.Shards(gathered)
    made = noise_inputs(run, stage, None, Loader(run.workers, workers.rank, workers.world_size))
    order, looked_at = list[tuple[int, list[str], list[int]]](), dict[int, str]()

    def told(steps: range) -> Iterator[Batch]:
        for batch in made.batches(steps):
            if batch.step == stop_at:
                raise Stopped
            order.append((batch.step, batch.sample_ids, batch.view_numbers.tolist()))
            yield batch

    def evaluate(model: DistillationModel, step: int) -> Mapping[str, float]:
        model(torch.zeros(1, 3, 32, 32))
        looked_at[step] = state_digest(model.encoder.network.state_dict())
        return {}

    result, chosen = None, evaluate if look else None
    with suppress(Stopped):
        result = train_stage(
            run,
            stage,
            replace(made, batches=told),
            Path(run.run_directory) / stage.name,
            workers=workers,
            evaluate=chosen,
            ending=lambda: (workers.rank, order[-1][0]) == ask,
        )
    return Trained(order, result, looked_at)


def train_counting(run: Recipe, below: Path, stop_at: int | None = None) -> tuple[Trained, int]:
    """Train, and count the bytes of weights and states below a folder that this worker reads.

    A file counts whole each time it is opened: by Python, or by safetensors, which maps it.
    """
    sizes = list[int]()

    def count(path: object) -> None:
        name = Path(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else Path()
        if name.is_relative_to(below) and name.suffix in (".safetensors", ".pt"):
            sizes.append(name.stat().st_size)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            count(arguments[0])

    def counted(path: Any, *arguments: Any, **named: Any) -> Any:
        count(path)
        # By its module: Ray takes this file by value, and cannot take that class so.
        return safetensors.safe_open(path, *arguments, **named)

    sys.addaudithook(heard)  # for good: `sizes` is this call's
    with mock.patch.object(safetensors.torch, "safe_open", counted):
        return train(run, stop_at), sum(sizes)


def fail_on_rank_0(error: Exception) -> str:
    """Have rank 0 raise; return what was raised here."""

    def work() -> None:
        raise error

    try:
        on_first(distributed.Copies(), work)
    except Exception as raised:
        return repr(raised)
    return "nothing"


def train_compiled(run: Recipe) -> int:
    """Train the stage by torch.compile, kernels apart; return how many graphs it traced."""
    traced = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        nonlocal traced
        traced += 1
        return aot_eager(graph, inputs)

    compiled.BACKEND = backend
    train(run)
    return traced


def noise_inputs(
    run: Recipe, stage: StageConfig, pins: Mapping[str, int] | None, loader: Loader
) -> Inputs:
    """Return inputs drawn, mixed and batched as always, from images that are noise."""
    normalisers = small_stage.normalisers()
    feed = _Here(_NoiseSource(normalisers), _NoiseImages("."), run.views)  # type: ignore[arg-type]
    return inputs.of_feeds(
        run, stage, {next(iter(run.train)): feed}, normalisers, {"source": "noise"}, loader
    )


def inputs_that_fail_on_rank_1(
    run: Recipe, stage: StageConfig, pins: Mapping[str, int] | None, loader: Loader
) -> Inputs:
    """Refuse, in one of the workers, with a reason."""
    if loader.rank == 1:
        raise ValueError("the cache of rank 1 is on fire; put it out")
    return noise_inputs(run, stage, pins, loader)


def sum_of_weights(run: Recipe, stage: StageConfig, made: Inputs) -> Evaluate:
    """Make an evaluation that any launcher can send to its workers."""

    def evaluate(model: DistillationModel, step: int) -> Mapping[str, float]:
        total = sum(float(value.double().abs().sum()) for value in model.state_dict().values())
        return {"held_out/score": total}

    return evaluate


class _Here(Feed):
    """A feed of which nothing lies in a bucket."""

    mirrored = False


class _NoiseSource(small_stage.MemorySource):
    """A dataset of noise in two shards."""

    @property
    def samples(self) -> "_NoiseSource":
        return self

    def take(self, rows: np.ndarray) -> pl.DataFrame:
        return pl.DataFrame({"sample_id": [f"noise/{row}" for row in rows.tolist()]})

    def shards(self) -> list[ShardRange]:
        return [ShardRange(0, 0, 32), ShardRange(1, 32, NUM_SAMPLES)]

    def versions(self) -> dict[str, int]:
        return {"noise": 1}


class _NoiseImages(ImageReader):
    """Reads images that are a pure function of their sample id."""

    def read(self, sample: Mapping[str, Any], verify: bool = False) -> bytes:
        number = int(str(sample["sample_id"]).rpartition("/")[2])
        generator = np.random.Generator(np.random.Philox(key=number))
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse.repeat(8, axis=0).repeat(8, axis=1)).save(out, "PNG")
        return out.getvalue()


def train_on_random_tokens(
    run: Recipe, stage: StageConfig, teachers: Mapping[str, tuple[int, int, int]]
) -> StageResult:
    """Train a stage of any size on random pixels and random tokens.

    Args:
        run: the recipe.
        stage: one of its stages.
        teachers: name -> (summary width, patch width, side of the patch grid).
    """
    workers = workers_here(stage)
    own = stage.global_batch // workers.world_size
    side = stage.student_resolutions[0]

    def batches(steps: range) -> Iterator[Batch]:
        for step in steps:
            for micro in range(0, own, stage.micro_batch):
                rows = min(stage.micro_batch, own - micro)
                generator = torch.Generator().manual_seed(
                    (step * own + micro) * workers.world_size + workers.rank
                )
                shape = (rows, 3, side, side)
                pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
                valid = np.ones(rows, bool)
                tokens = _RandomTokens(valid, None, teachers)
                yield Batch(
                    step,
                    micro // stage.micro_batch,
                    -(-own // stage.micro_batch),
                    workers.rank * own + micro,
                    Resolutions(
                        side,
                        {name: scales[0] for name, scales in stage.teacher_resolutions.items()},
                    ),
                    [f"{step}-{place}" for place in range(rows)],
                    np.zeros(rows, np.int64),
                    pixels,
                    valid,
                    [Part(np.arange(rows), tokens)],
                )

    dims = {name: widths[:2] for name, widths in teachers.items()}
    identity = torch.nn.Identity()
    normalisers = {name: Normalisers(identity, identity) for name in teachers}
    made = Inputs(batches, dims, normalisers, {"source": "random"}, {})
    directory = Path(run.run_directory) / stage.name
    return train_stage(run, stage, made, directory, workers=workers)


@dataclass(frozen=True)
class _RandomTokens(Fetched):
    """The same random tokens for every batch."""

    teachers: Mapping[str, tuple[int, int, int]]

    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        rows = len(self.valid)
        generator = torch.Generator().manual_seed(3)
        return {
            name: Targets(
                torch.randn(rows, summary, generator=generator),
                torch.randn(rows, side, side, patches, generator=generator),
                torch.from_numpy(self.valid),
            )
            for name, (summary, patches, side) in self.teachers.items()
        }


if __name__ == "__main__":
    _serve(int(sys.argv[1]), sys.argv[2])
