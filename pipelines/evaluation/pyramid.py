"""What each stage made of its student: losses, and held-out cosine at every pyramid scale."""

from dataclasses import dataclass

import torch

from pipelines.evaluation import evaluate
from pipelines.evaluation.compare import look
from pipelines.machines.progress import track
from pipelines.recipe.config import PROXY, Recipe, StageConfig
from pipelines.recipe.scales import Scales
from pipelines.records import checkpoint, tracking
from pipelines.training import inputs, start

LOSS = "loss/total"


@dataclass(frozen=True)
class StageFigures:
    """What a stage did to the network it trained.

    Attributes:
        steps: trained.
        loss: `before` and `after`, the total of Eq. 6: means over the first and last logged steps.
        cosine: scale in pixels -> mean held-out cosine to the stage's teachers' normalised
            `summary` and `patches`, teacher and student both at that scale; a teacher that is not
            cached there at its largest.
    """

    steps: int
    loss: dict[str, float]
    cosine: dict[str, dict[str, float]]


def stage_figures(
    recipe: Recipe, stage: StageConfig, device: str | torch.device = "cpu"
) -> StageFigures:
    """Look at a finished stage.

    Stages 2 and 3 are looked at at every scale that the proxy is cached at, whichever they drew
    from, so that what stage 3 adds can be read off (EUPE, arXiv:2603.22387, Table 2).

    Args:
        recipe: the run.
        stage: one of its stages, trained.
        device: to compute on.

    Raises:
        BadInput: the stage has no checkpoint.
        StoreError: a cache cannot be read.
    """
    directory = recipe.stage_directory(stage.stage)
    saved = checkpoint.require(directory)
    whole = over_pyramid(recipe, stage)
    opened = inputs.from_caches(recipe, whole)
    model = start.untrained_model(recipe, stage, opened.dims)
    start.load(model, saved)
    model.eval().to(device)
    name = recipe.held_out.name
    feed = inputs.centre_feeds(recipe, whole, opened.normalisers)[name]
    sweeps = {}
    for scale in whole.student_scales:
        at = Scales(scale, {who: _nearest(scale, of) for who, of in whole.teacher_scales.items()})
        sweeps[scale] = evaluate.sweep(recipe, whole, name, feed, at=at)
    cosine = {}
    total = sum(len(rows) for rows, _ in sweeps.values())
    with track(total, f"Figures of {stage.stage}") as progress:
        for scale, (_, batches) in sweeps.items():
            seen = look(
                batches,
                {evaluate.FINAL: model},
                opened,
                device=device,
                advance=progress.advance,
            )
            both = torch.stack([seen.cosines[evaluate.FINAL, who].mean(0) for who in opened.dims])
            summary, patches = both.mean(0).tolist()
            cosine[str(scale)] = {"summary": summary, "patches": patches}
    losses = [
        line[LOSS] for line in tracking.read(directory / tracking.METRICS_FILE) if LOSS in line
    ]
    return StageFigures(saved.step, {"before": losses[0], "after": losses[-1]}, cosine)


def over_pyramid(recipe: Recipe, stage: StageConfig) -> StageConfig:
    """Return a stage that learns from the proxy as if it drew from all of the proxy's scales."""
    if PROXY not in stage.teachers:
        return stage
    scales = tuple(
        sorted({side for s in recipe.stages for side in s.teacher_scales.get(PROXY, ())})
    )
    return stage.model_copy(update={"teacher_scales": {PROXY: scales}, "student_scales": scales})


def _nearest(scale: int, cached: tuple[int, ...]) -> int:
    return scale if scale in cached else max(cached)
