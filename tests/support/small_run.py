"""A whole run in small: 48 emoji, EfficientNet-Lite0 at 64 pixels, a student of two blocks."""

from pathlib import Path

from pipelines.recipe.config import EvaluationConfig, Recipe
from pipelines.recipe.stores import cache_jobs
from support import small_caches, small_recipe

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "emoji.parquet"


def recipe(directory: Path) -> Recipe:
    """Return the run; its images and everything it writes are below a folder."""
    stage = small_recipe.stage(
        {"lite0": (64,)}, (64,), steps=8, log_every=2, checkpoint_every=4, evaluate_every=4
    )
    return small_recipe.recipe(
        directory,
        [small_caches.teacher()],
        [stage],
        name="small_run",
        num_views=2,
        evaluation=EvaluationConfig(label="label", k=3, resolution=64, batch=7),
    )


def build(run: Recipe, directory: Path) -> None:
    """Write the images and build the caches, in this process."""
    write_images(directory)
    for job in cache_jobs(run):
        small_caches.build(job)


def write_images(directory: Path) -> None:
    """Write the images of a run in a folder."""
    pictures = list(small_caches.pictures(EMOJI, 48).items())
    small_caches.write_parquet(directory / "train.parquet", dict(pictures[:32]))
    small_caches.write_parquet(directory / "held-out.parquet", dict(pictures[32:]))
