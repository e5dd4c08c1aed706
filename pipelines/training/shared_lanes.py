"""Lanes that several workers read, where the number of workers does not divide them."""

import math

from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.training.batches import Loader


def told(recipe: Recipe, stage: StageConfig) -> str | None:
    """Say in a sentence what workers read more than once; None if that is nothing.

    Args:
        recipe: whose lanes and workers.
        stage: whose batch they share.
    """
    lanes, count, batch = recipe.lanes, recipe.workers.count, stage.global_batch
    stretches = [Loader(recipe.workers, rank, count).stretch(batch) for rank in range(count)]
    read = sum(
        -(-stop * lanes // batch) - start * lanes // batch
        for start, stop in stretches
        if start < stop
    )
    if read == lanes:
        return None
    divisors = [number for number in range(1, lanes + 1) if lanes % number == 0]
    below = max(number for number in divisors if number < count)
    above = min((number for number in divisors if number > count), default=None)
    right = f"workers.count = {below}" + (f" or {above}" if above else "")
    common = math.gcd(batch, math.lcm(lanes, count))
    if common % count == 0:
        right += f", or in a run from its beginning lanes = {common},"
    return (
        f"{stage.name}: workers.count = {count} does not divide lanes = {lanes}, so that on "
        f"machines of their own workers read the caches {read / lanes:.2f} times together; "
        f"{right} would read them once"
    )
