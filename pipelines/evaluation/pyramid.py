"""What each stage made of its student: losses, and held-out cosine at every pyramid scale."""

from dataclasses import dataclass, field

import torch

from pipelines.evaluation.compare import FINAL, look
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
    pairs = {
        (scale, scale): {who: _nearest(scale, of) for who, of in whole.teacher_resolutions.items()}
        for scale in whole.student_resolutions
    }
    drawn = stage.teacher_resolutions.get(PROXY, ())
    if len(drawn) > 1:
        pairs |= {(ours, its): {PROXY: its} for ours in stage.student_resolutions for its in drawn}
    cosine = {}
    with track(len(rows) * len(pairs), f"Figures of {stage.name}") as progress:
        for (ours, its), teachers in pairs.items():
            seen = look(
                student.images.batches(held_out, rows, Resolutions(ours, teachers)),
                {FINAL: student.final},
                device=device,
                advance=progress.advance,
            )
            both = torch.stack([seen.cosines[FINAL, who].mean(0) for who in stage.teachers])
            summary, patches = both.mean(0).tolist()
            cosine[ours, its] = {"summary": summary, "patches": patches}
    metrics = recipe.stage_directory(stage.name) / tracking.METRICS_FILE
    losses = [line[LOSS] for line in tracking.read(metrics) if LOSS in line]
    return StageFigures(
        student.saved.step,
        {"before": losses[0], "after": losses[-1]},
        {str(scale): cosine[scale, scale] for scale in whole.student_resolutions},
        {
            str(ours): {str(its): cosine[ours, its] for its in drawn}
            for ours in stage.student_resolutions
            if len(drawn) > 1
        },
    )


def _nearest(scale: int, cached: tuple[int, ...]) -> int:
    return scale if scale in cached else max(cached)
