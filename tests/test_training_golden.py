"""Losses of a small stage: equal to those of a plain loop of torch, and to those written down.

`python tests/test_training_golden.py` writes the plain loop's figures down again.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import pytest
import torch
from support import plain_loop, small_stage

from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import LossConfig, OptimizerConfig
from pipelines.records import tracking
from pipelines.training import start
from pipelines.training.loop import train_stage

GOLDEN = Path(__file__).parent / "golden" / "small_stage.json"
INVALID = (2, 7)
# Float32 sums in another order, 1e-6 of a loss, grown over ten steps of AdamW, which divides small
# gradients by their own size. Each fault of tests/mutants moves a figure by over ten times as much.
RTOL = 3e-4
# The same kernels under the same autocast. What differs is the order of float32 sums; where a sum
# falls between two values of 8 bits, another value is taken, which training then makes more of.
BFLOAT16_RTOL = 1e-3
BFLOAT16_STEPS = 3
SETTINGS = {
    "steps": 10,
    "warmup_steps": 3,
    "micro_batch": 3,
    "loss": LossConfig(alpha=0.6, beta=0.7, smooth_l1_beta=0.3, gamma={"far": 2.5}),
    "optimizer": OptimizerConfig(lr=4e-3, weight_decay=0.05, betas=(0.7, 0.93), clip_norm=0.3),
}
"""Every setting far from where it would change nothing."""


def small(directory: Path, **stage: object) -> Recipe:
    return small_stage.recipe(directory, drop_path=0.0, **{**SETTINGS, **stage})


def trained(
    directory: Path, invalid: Sequence[int] = INVALID, **stage: object
) -> list[dict[str, float]]:
    """Return what the trainer wrote down, step by step."""
    run = small(directory, **stage)
    inputs = small_stage.inputs(run, invalid=invalid)
    train_stage(run, run.stage("stage2"), inputs, directory)
    return tracking.read(directory / tracking.METRICS_FILE)


def reference(invalid: Sequence[int] = INVALID, **stage: object) -> list[dict[str, float]]:
    """Return the figures of the plain loop, from the same weights, pixels and targets."""
    run = small(Path("nowhere"), **stage)
    weights = start.initial_model(run, run.stage("stage2"), small_stage.TEACHERS).state_dict()
    prefix = "encoder.network."
    network = plain_loop.vit(
        run.student.encoder.model_arguments,
        {key.removeprefix(prefix): v for key, v in weights.items() if key.startswith(prefix)},
    )
    heads = {
        name: tuple(
            plain_loop.head(weights, f"heads.{name}.{kind}") for kind in ("summary", "patches")
        )
        for name in small_stage.TEACHERS
    }
    return plain_loop.train(run.stage("stage2"), network, heads, steps(run, invalid))


def steps(run: Recipe, invalid: Sequence[int]) -> Iterator[list[plain_loop.Micro]]:
    """Yield the micro-batches of every step."""
    inputs = small_stage.inputs(run, invalid=invalid)
    batches = inputs.batches(range(run.stage("stage2").steps))
    for _, group in groupby(batches, key=lambda batch: batch.step):
        yield [
            plain_loop.Micro(
                batch.pixels,
                {name: (each.summary, each.patches) for name, each in batch.targets().items()},
                torch.from_numpy(batch.valid),
            )
            for batch in group
        ]


def check(ours: list[dict[str, float]], theirs: list[dict[str, float]], rtol: float) -> None:
    """Compare every figure of the second with the first's."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert {name: mine[name] for name in other} == pytest.approx(other, rel=rtol, abs=0)


def test_the_trainer_does_what_the_paper_says(tmp_path):
    check(trained(tmp_path), reference(), RTOL)


def test_losses_are_those_written_down(tmp_path):
    check(trained(tmp_path), json.loads(GOLDEN.read_text()), RTOL)


@pytest.mark.parametrize("scaling", ["sqrt", "linear"])
def test_a_base_rate_is_scaled_by_the_batch(scaling, tmp_path):
    steeper = OptimizerConfig(lr=0.05, lr_scaling=scaling, betas=(0.7, 0.93), clip_norm=0.3)
    check(trained(tmp_path, optimizer=steeper), reference(optimizer=steeper), RTOL)


def test_bfloat16_is_entered_and_changes_what_it_should(tmp_path):
    """Every row valid: the trainer's mean over the others multiplies what 8 bits have rounded."""
    half = trained(tmp_path, (), precision="bfloat16")[:BFLOAT16_STEPS]
    check(half, reference((), precision="bfloat16")[:BFLOAT16_STEPS], BFLOAT16_RTOL)
    with pytest.raises(AssertionError):
        check(half, reference(())[:BFLOAT16_STEPS], BFLOAT16_RTOL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text(json.dumps(reference(), indent=1) + "\n")
