"""A run directory as training leaves it, with a checkpoint of a stage and no training behind it."""

import json
from pathlib import Path

from eupe.heads import DistillationModel
from eupe.spec import EncoderSpec
from eupe.students import build_student
from pipelines.recipe.config import Recipe, StudentConfig
from pipelines.records import checkpoint
from pipelines.records.checkpoint import Checkpoint, Contents
from support import small_caches, small_recipe

NUM_PICTURES = 6


def recipe(directory: Path, emoji: Path, encoder: EncoderSpec, **fields: object) -> Recipe:
    """Return a run of stage 2 from one teacher, its few pictures written below a folder."""
    pictures = dict(small_caches.pictures(emoji, NUM_PICTURES))
    for name in ("train", "held-out"):
        small_caches.write_parquet(directory / f"{name}.parquet", pictures)
    return small_recipe.recipe(
        directory,
        [small_caches.teacher()],
        [small_recipe.stage({"lite0": (64,)}, (64, 96))],
        student=StudentConfig(name="student", encoder=encoder),
        **fields,
    )


def saved(run: Recipe) -> Checkpoint:
    """Save the first stage of a run as if it had been trained to its end, and its figures."""
    (stage, *_) = run.stages.values()
    network = run.trained_by(stage)
    encoder = build_student(network.encoder, seed=3)
    model = DistillationModel(encoder, {"lite0": (7, 5)}, stage.head_hidden, seed=4)
    contents = Contents(
        stage.steps,
        {"student": network.encoder.model_dump(mode="json")},
        {},
        encoder.network.state_dict(),
        model.heads.state_dict(),
        {"lite0.summary.mean": model.head("lite0").summary[0].weight[:, 0]},
        recipe=run.model_dump(mode="json"),
    )
    found = checkpoint.save(run.stage_directory(stage.name), contents, keep=1)
    probes = {"knn_paper": {"value": 0.4321, "low": 0.4, "high": 0.5}}
    figures = {
        "titles": {"student_final": "student after stage2"},
        "encoders": {"student_final": {"resolution": 64, **probes, "cka": {"lite0": 0.5}}},
        "cosine": {"summary": {"baseline": 0.1, "init": 0.2, "final": 0.7}},
    }
    (run.directory / "summary.json").write_text(json.dumps(figures))
    return found
