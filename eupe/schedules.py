"""Learning rate: linear warm-up, then half a cosine to zero, as a pure function of the step."""

import math


def warmup_cosine(step: int, *, steps: int, warmup_steps: int = 0) -> float:
    """Return the factor of the base learning rate at a step.

    EUPE (arXiv:2603.22387), Stage 2: cosine. Assumed: linear warm-up, and an end at zero.

    Args:
        step: number of the step, from 0.
        steps: of the whole run.
        warmup_steps: over which the factor rises; the first step has 1 / warmup_steps.

    Raises:
        ValueError: a step outside the run, or a warm-up longer than it.
    """
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps = {warmup_steps}: wants 0 to steps = {steps}")
    if not 0 <= step < steps:
        raise ValueError(f"step {step}: wants 0 to {steps - 1}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
