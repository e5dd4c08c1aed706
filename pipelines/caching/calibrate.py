"""Rates as this machine has them, by a short run: `eupe plan --measure` takes these."""

import io
import time

import numpy as np
from PIL import Image

from eupe import views
from pipelines.caching.sizes import SIDES
from pipelines.recipe.config import Recipe

SECONDS = 3.0
"""Of measuring."""


def rates(recipe: Recipe) -> dict[str, float]:
    """Measure how many views a second one core of this machine decodes, draws and resizes.

    The picture is a JPEG of ImageNet's usual size, made here: smooth, as photographs are.
    """
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (15, 20, 3), np.uint8))
    data = io.BytesIO()
    coarse.resize(SIDES, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    wanted = {side for teacher in recipe.teachers.values() for side in teacher.resolutions}
    durations = list[float]()
    until = time.perf_counter() + SECONDS
    while len(durations) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        canvas = views.make_view(data.getvalue(), recipe.views, str(len(durations)), 0).canvas
        for side in wanted:
            views.resize(canvas, side)
        durations.append(time.perf_counter() - started)
    return {"decode_views": 1 / float(np.median(durations))}
