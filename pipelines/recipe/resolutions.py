"""Resolutions of a step: at which teachers and student see its views (EUPE, Stage 3)."""

from typing import NamedTuple

from eupe.addressed import bits
from pipelines.recipe.stage import StageConfig


class Resolutions(NamedTuple):
    """Resolutions of one global step, sides in pixels.

    Attributes:
        student: of the student's input.
        teachers: teacher -> of its features.
    """

    student: int
    teachers: dict[str, int]


def draw(stage: StageConfig, seed: int, step: int) -> Resolutions:
    """Draw a step's scales, teacher and student each independently: a pure function, for all ranks.

    EUPE (arXiv:2603.22387), Stage 3: per iteration teacher and student each draw a scale
    of the pyramid. A stage with one scale each draws that one.

    Args:
        stage: whose `teacher_resolutions` and `student_resolutions` are drawn from, uniformly.
        seed: of the run.
        step: global step.
    """
    return Resolutions(
        student(stage, seed, step),
        {name: teacher(stage, seed, step, name) for name in stage.teachers},
    )


def student(stage: StageConfig, seed: int, step: int) -> int:
    """Draw the student's scale of a step, as `draw` does."""
    return _chosen(stage, seed, step, "student", stage.student_resolutions)


def teacher(stage: StageConfig, seed: int, step: int, name: str) -> int:
    """Draw one teacher's scale of a step, as `draw` does."""
    return _chosen(stage, seed, step, f"teacher/{name}", stage.teacher_resolutions[name])


def _chosen(stage: StageConfig, seed: int, step: int, who: str, scales: tuple[int, ...]) -> int:
    return scales[bits(f"scales/{seed}/{stage.name}/{step}/{who}") % len(scales)]


def micro_batch(stage: StageConfig, scale: int, rows: int) -> int:
    """Return how many of a worker's `rows` go through the student at once at a scale (pixels).

    `stage.micro_batch` holds at the smallest student scale; a larger input has more pixels, so
    fewer rows, at the same global batch.
    """
    smallest = min(stage.student_resolutions)
    return max(1, min(rows, stage.micro_batch * smallest**2 // scale**2))
