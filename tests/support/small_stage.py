"""A stage that trains in a second: a synthetic in-memory feature source and a tiny student."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cache.shard_ranges import ShardRange
from eupe.normalise import Normaliser
from eupe.spec import CentreView
from pipelines.features.sources import FeatureSource, Fetched, Normalisers, Targets
from pipelines.recipe import resolutions
from pipelines.recipe.config import Recipe, StudentConfig
from pipelines.training.batches import Batch
from pipelines.training.feeds import Part
from pipelines.training.inputs import Inputs
from support import small_recipe

TEACHERS = {"near": (6, 4), "far": (5, 3)}
STRIDE = 8  # of both teachers' grids, pixels


class MemorySource(FeatureSource):
    """A FeatureSource that works tokens out of the pixels it is handed: a fixed linear map."""

    def __init__(self, normalisers: Mapping[str, Normalisers]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.maps = {
            name: tuple(torch.randn(3, width, generator=generator) for width in widths)
            for name, widths in TEACHERS.items()
        }
        self.normalisers = normalisers

    def shards(self) -> list[ShardRange]:
        raise AssertionError("rows are drawn by hand")

    def dims(self) -> dict[str, tuple[int, int]]:
        return dict(TEACHERS)

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Mapping[str, int],
        canvases: np.ndarray | None = None,
    ) -> Fetched:
        assert canvases is not None
        pixels = {}
        for name, resolution in resolutions.items():
            tensor = torch.from_numpy(canvases).permute(0, 3, 1, 2).float()
            resized = F.interpolate(tensor, resolution, mode="area")
            pixels[name] = resized.permute(0, 2, 3, 1).numpy()
        return MemoryFetched(np.ones(len(rows), bool), None, pixels, self)


@dataclass(frozen=True)
class MemoryFetched(Fetched):
    """The colours of a batch, uint8 [B, R, R, 3] by teacher, and whose linear maps they meet."""

    pixels: Mapping[str, np.ndarray]
    source: MemorySource

    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        valid = torch.from_numpy(self.valid)
        out = {}
        for name, pixels in self.pixels.items():
            colours = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
            patches = F.avg_pool2d(colours, STRIDE).permute(0, 2, 3, 1) @ self.source.maps[name][1]
            summary = colours.mean((2, 3)) @ self.source.maps[name][0]
            normalised = self.source.normalisers[name]
            targets = normalised.summary(summary), normalised.patches(patches), valid
            out[name] = Targets(*(each.to(device, non_blocking=True) for each in targets))
        return out


def recipe(directory: Path, *, drop_path: float = 0.2, **stage: object) -> Recipe:
    """Return a run of one stage; fields of the stage may be given.

    Args:
        directory: of the run.
        drop_path: rate, above zero so that a test sees whether the network's draws are addressed.
        stage: fields of the stage.
    """
    settings = {"head_hidden": 16, "warmup_steps": 2, "checkpoint_every": 3, **stage}
    scales = {"near": (16, 32), "far": (32,)}
    network = small_recipe.vit(patch_size=8, drop_path_rate=drop_path)
    return small_recipe.recipe(
        directory,
        [small_recipe.random_teacher(name, (16, 32), network) for name in TEACHERS],
        [small_recipe.stage(scales, **{"student_resolutions": (16, 32), **settings})],
        canvas=32,
        run_directory=str(directory),
        views=CentreView(canvas=32),
        student=StudentConfig(name="student", encoder=network),
    )


def normalisers() -> dict[str, Normalisers]:
    """Return normalisers that change something."""
    return {
        name: Normalisers(
            *(Normaliser(torch.full((width,), 0.1), torch.full((width,), 2.0)) for width in widths)
        )
        for name, widths in TEACHERS.items()
    }


def inputs(run: Recipe, *, invalid: Sequence[int] = (), rank: int = 0, world: int = 1) -> Inputs:
    """Return inputs whose every global batch is a pure function of its step.

    Args:
        run: a recipe of this module.
        invalid: places in each global batch that are invalid.
        rank: of this worker.
        world: workers.
    """
    stage = run.stage("stage2")
    source = MemorySource(normalisers())

    def batches(steps: range) -> Iterator[Batch]:
        for step in steps:
            drawn = resolutions.draw(stage, run.seed, step)
            canvases = _canvases(run.seed, step, stage.global_batch)
            valid = np.isin(np.arange(stage.global_batch), invalid, invert=True)
            first, last = (stage.global_batch * each // world for each in (rank, rank + 1))
            size = resolutions.micro_batch(stage, drawn.student, last - first)
            starts = range(first, last, size)
            for micro, begin in enumerate(starts):
                rows = slice(begin, min(begin + size, last))
                own = canvases[rows]
                ids = [f"{step}-{place}" for place in range(rows.start, rows.stop)]
                views = np.zeros(len(own), np.int64)
                fetched = source.fetch(np.arange(len(own)), views, drawn.teachers, own)
                fetched.valid[:] = valid[rows]
                pixels = torch.from_numpy(own).permute(0, 3, 1, 2).float()
                pixels = F.interpolate(pixels, drawn.student, mode="area").to(torch.uint8)
                yield Batch(
                    step,
                    micro,
                    len(starts),
                    begin,
                    drawn,
                    ids,
                    views,
                    pixels,
                    valid[rows],
                    [Part(np.arange(len(own)), fetched)],
                )

    return Inputs(batches, source.dims(), normalisers(), {"source": "memory"}, {"memory": 1})


def _canvases(seed: int, step: int, count: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)
