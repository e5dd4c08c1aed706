"""What each stage made of its student: losses, and held-out cosine at every pyramid scale."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pipelines.evaluation.compare import FINAL, Seen, look, teacher_at
from pipelines.evaluation.frozen import FrozenStudent, over_pyramid
from pipelines.machines.progress import track
from pipelines.recipe.config import PROXY
from pipelines.recipe.resolutions import Resolutions
from pipelines.records import tracking

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
        matrix: scale of the student -> scale of the proxy -> the same at that pair of scales; of a
            stage that draws both, else empty.
    """

    steps: int
    loss: dict[str, float]
    cosine: dict[str, dict[str, float]]
    matrix: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def stage_figures(student: FrozenStudent) -> StageFigures:
    """Look at a finished stage.

    Stages 2 and 3 are looked at at every scale that the proxy is cached at, whichever they drew
    from, so that what stage 3 adds can be read off (EUPE, arXiv:2603.22387, Table 2).

    Args:
        student: that the stage trained.

    Raises:
        BadInput: a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    recipe, stage, device = student.recipe, student.stage, student.device
    whole, held_out = over_pyramid(recipe, stage), recipe.held_out.name
    rows = student.images.rows(held_out)
    drawn = stage.teacher_resolutions.get(PROXY, ())
    cosine = dict[str, dict[str, float]]()
    matrix = dict[str, dict[str, dict[str, float]]]()
    with track(len(rows) * len(whole.student_resolutions), f"Figures of {stage.name}") as progress:
        for ours in whole.student_resolutions:
            at = {who: _nearest(ours, of) for who, of in whole.teacher_resolutions.items()}
            others = [its for its in drawn if len(drawn) > 1 and its != ours]
            seen = look(
                student.images.batches(held_out, rows, Resolutions(ours, at)),
                {FINAL: student.final},
                others={
                    its: student.images.tokens(held_out, rows, {PROXY: its}, device)
                    for its in others
                },
                device=device,
                advance=progress.advance,
            )
            cosine[str(ours)] = _means(seen, stage.teachers)
            if others and ours in stage.student_resolutions:
                matrix[str(ours)] = {
                    str(its): _means(seen, [teacher_at(PROXY, its) if its in others else PROXY])
                    for its in drawn
                }
    metrics = recipe.stage_directory(stage.name) / tracking.METRICS_FILE
    losses = [line[LOSS] for line in tracking.read(metrics) if LOSS in line]
    return StageFigures(
        student.saved.step,
        {"before": losses[0], "after": losses[-1]},
        cosine,
        matrix,
    )


def _means(seen: Seen, teachers: Sequence[str]) -> dict[str, float]:
    """Return mean cosines over images and teachers, of summaries and of patches."""
    both = torch.stack([seen.cosines[FINAL, who].mean(0) for who in teachers])
    summary, patches = both.mean(0).tolist()
    return {"summary": summary, "patches": patches}


def _nearest(scale: int, cached: tuple[int, ...]) -> int:
    return scale if scale in cached else max(cached)
