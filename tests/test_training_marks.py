"""Identity moves the figures of a stage, execution does not: every field, as it is marked.

Six steps of a tiny student, its two tiny teachers in the loop, one field changed at a time.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from support import small_caches, small_recipe, stage_runs

from cache.store import Store
from eupe.spec import AugmentedView, CentreView
from eupe.teachers import load_teacher
from pipelines.features.live import LiveSource
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe.config import (
    PROXY,
    ExtractionConfig,
    Recipe,
    StudentConfig,
)
from pipelines.recipe.marks import EXECUTION, IDENTITY, Mark, mark_of
from pipelines.recipe.stage import LossConfig, OptimizerConfig, StageConfig
from pipelines.records import tracking
from pipelines.training import inputs
from pipelines.training.feeds import Feed
from pipelines.training.loop import train_stage

STEPS = 6
SIDES = (16, 32)
# Gradients of micro-batches are added in another order; everything else is the same arithmetic.
RTOL = {"micro_batch": 2e-4}
VIEWS = AugmentedView(seed=3, canvas=32, solarize_probability=0.5)
STAGE = small_recipe.stage(
    {"near": SIDES, "far": SIDES[1:]},
    SIDES,
    steps=STEPS,
    global_batch=4,
    micro_batch=4,
    head_hidden=16,
    optimizer=OptimizerConfig(lr=3e-3, clip_norm=0.3),
    warmup_steps=2,
)
Model = TypeVar("Model", bound=BaseModel)
Changes = Mapping[str, object]
"""Fields of one model -> another value; more than one where one alone would contradict others."""
CHANGED: dict[type[BaseModel], dict[str, Changes]] = {
    StageConfig: {
        "name": {"name": "stage3"},
        "teachers": {"teachers": ("near",), "teacher_resolutions": {"near": SIDES}},
        "student": {"student": "proxy"},
        "teacher_resolutions": {"teacher_resolutions": {"near": SIDES[:1], "far": SIDES[1:]}},
        "student_resolutions": {"student_resolutions": SIDES[1:]},
        "steps": {"steps": STEPS + 2},
        "global_batch": {"global_batch": 5},
        "micro_batch": {"micro_batch": 2},
        "head_hidden": {"head_hidden": 24},
        "normaliser": {"normaliser": "phi-s"},
        "warmup_steps": {"warmup_steps": 0},
        "precision": {"precision": "bfloat16"},
        "activation_checkpointing": {"activation_checkpointing": True},
        "on_missing": {"on_missing": "wait"},
        "patience_seconds": {"patience_seconds": 5.0},
        "log_every": {"log_every": 3},
        "evaluate_every": {"evaluate_every": 2},
        "checkpoint_every": {"checkpoint_every": 1},
        "keep_checkpoints": {"keep_checkpoints": 1, "checkpoint_every": 2},
        "initial": {"initial": "stage1"},
    },
    LossConfig: {
        "alpha": {"alpha": 0.5},
        "beta": {"beta": 0.5},
        "smooth_l1_beta": {"smooth_l1_beta": 0.3},
        "gamma": {"gamma": {"far": 2.0}},
    },
    OptimizerConfig: {
        "lr": {"lr": 1e-3},
        "lr_scaling": {"lr_scaling": "sqrt"},
        "weight_decay": {"weight_decay": 0.1},
        "betas": {"betas": (0.8, 0.9)},
        "clip_norm": {"clip_norm": None},
    },
    AugmentedView: {
        "kind": {"kind": "centre"},
        "seed": {"seed": 4},
        "canvas": {"canvas": 48},
        "background": {"background": (0, 0, 255)},
        "crop_area": {"crop_area": (0.9, 1.0)},
        "crop_aspect": {"crop_aspect": (1.0, 1.0)},
        "flip_probability": {"flip_probability": 1.0},
        "jitter_probability": {"jitter_probability": 0.0},
        "brightness": {"brightness": 0.0},
        "contrast": {"contrast": 0.0},
        "saturation": {"saturation": 0.0},
        "hue": {"hue": 0.0},
        "blur_probability": {"blur_probability": 0.0},
        "blur_sigma": {"blur_sigma": (3.0, 4.0)},
        "solarize_probability": {"solarize_probability": 0.0},
        "solarize_threshold": {"solarize_threshold": 30},
    },
    CentreView: {
        "kind": {"kind": "augmented"},
        "canvas": {"canvas": 48},
        "background": {"background": (0, 0, 255)},
        "share": {"share": 0.5},
    },
}
ELSEWHERE = {
    "compile": "test_training_loop.test_a_compiled_stage_learns_as_one_that_is_not",
    "strategy": "test_training_distributed.test_two_workers_and_one_process_agree",
}
"""Execution fields of a stage that want a compiler, or several processes -> the test of each."""
HOLDERS = {"loss": LossConfig, "optimizer": OptimizerConfig}
CASES = [(model, field) for model, fields in CHANGED.items() for field in fields]


class Small:
    """A run whose samples are listed and whose teachers are measured once."""

    def __init__(self, directory: Path, emoji: Path) -> None:
        images = small_caches.pictures(emoji, 12)
        small_caches.write_parquet(directory / "train.parquet", images)
        self.run = recipe(directory)
        job = stage_runs.training_job(self.run, STAGE)
        self.stores: list[Store] = small_caches.build(job)
        self.teachers = {
            each.name: load_teacher(each.name, each.encoder, each.weights)
            for each in self.run.teachers.values()
        }
        first = self.run.stages["stage1"]
        train_stage(
            self.run, first, self.given(self.run, first), self.run.stage_directory("stage1")
        )

    def given(self, run: Recipe, stage: StageConfig) -> inputs.Inputs:
        """Return a stage's inputs, its views drawn and seen by its teachers as it goes."""
        normalisers = inputs.normalisers_of(stage, [(1.0, self.stores)])
        images = ImageReader(base(run.train["train"].source))
        source = LiveSource(
            {name: self.teachers[name] for name in stage.teachers},
            self.stores[0].samples,
            images,
            run.views,
            normalisers,
            compute_batch=4,
        )
        feeds = {"train": Feed(source, images, run.views)}
        return inputs.of_feeds(run, stage, feeds, normalisers, {})

    def losses(self, directory: Path, model: type[BaseModel], changes: Changes) -> np.ndarray:
        """Return the losses of the first six steps, or their means between two logs."""
        stage, views = STAGE, VIEWS if model is not CentreView else CentreView(canvas=32)
        if model is StageConfig:
            stage = altered(stage, changes)
        elif model in HOLDERS.values():
            (holder,) = (name for name, each in HOLDERS.items() if each is model)
            stage = altered(stage, {holder: altered(getattr(stage, holder), changes)})
        elif "kind" in changes:
            views = VIEWS if model is CentreView else CentreView(canvas=32)
        else:
            views = altered(views, changes)
        run = self.run.model_copy(update={"views": views})
        train_stage(run, stage, self.given(run, stage), directory, evaluate=evaluate)
        lines = tracking.read(directory / tracking.METRICS_FILE)
        return np.array([line["loss/total"] for line in lines if "loss/total" in line][:STEPS])


def evaluate(student: object, done: int) -> dict[str, float]:
    torch.rand(3)  # draws from the global state, as an evaluation may
    return {}


def altered(model: Model, changes: Changes) -> Model:
    """Return a model with fields changed, and checked as a whole."""
    fields = {name: getattr(model, name) for name in type(model).model_fields}
    return type(model)(**{**fields, **changes})


def recipe(directory: Path) -> Recipe:
    return small_recipe.recipe(
        directory,
        [
            small_recipe.random_teacher(name, SIDES, small_recipe.vit(patch_size=patch, depth=1))
            for name, patch in (("near", 8), ("far", 16))
        ],
        [altered(STAGE, {"name": "stage1", "steps": 2}), STAGE],
        canvas=32,
        seed=5,
        views=VIEWS,
        proxy=StudentConfig(name=PROXY, encoder=small_recipe.vit(patch_size=8, depth=3)),
        student=StudentConfig(name="student", encoder=small_recipe.vit(patch_size=8)),
        extraction=ExtractionConfig(rows_per_shard=6, moments_samples=12, compute_batch=4),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Small:
    return Small(tmp_path_factory.mktemp("marks"), emoji)


@pytest.fixture(scope="module")
def unchanged(small: Small, tmp_path_factory: pytest.TempPathFactory):
    """Return the losses of the stage as it is, by the model that is going to be changed."""
    where = tmp_path_factory.mktemp("unchanged")

    @functools.cache
    def losses(views: type[BaseModel]) -> np.ndarray:
        return small.losses(where / views.__name__, views, {})

    return lambda model: losses(model if model is CentreView else AugmentedView)


def mark(model: type[BaseModel], field: str) -> Mark | None:
    """Return a field's mark; a view policy is identity as a whole."""
    declared = model.model_fields[field]
    return mark_of(declared) if model.__module__.startswith("pipelines.") else IDENTITY


def has_one_value(annotation: object) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def without_change(model: type[BaseModel], changed: Mapping[str, Changes]) -> set[str]:
    """Return the marked fields of a model that the table changes nowhere, although it could."""
    marked = {
        name
        for name, declared in model.model_fields.items()
        if mark(model, name) is not None and not has_one_value(declared.annotation)
    }
    return marked - {name for name, changes in changed.items() if name in changes}


@pytest.mark.parametrize(
    ("model", "field"), CASES, ids=[f"{model.__name__}.{field}" for model, field in CASES]
)
def test_a_field_moves_the_figures_if_it_is_identity(small, unchanged, tmp_path, model, field):
    before = unchanged(model)
    assert len(before) == STEPS
    after = small.losses(tmp_path, model, CHANGED[model][field])
    if mark(model, field) is EXECUTION:
        wanted = before.reshape(len(after), -1).mean(1)
        np.testing.assert_allclose(after, wanted, rtol=RTOL.get(field, 1e-6))
    else:
        assert len(after) == STEPS
        assert np.abs(after / before - 1).max() > 1e-5


@pytest.mark.parametrize("model", CHANGED, ids=lambda model: model.__name__)
def test_every_field_is_changed_somewhere(model):
    elsewhere = set(ELSEWHERE) if model is StageConfig else set()
    assert without_change(model, CHANGED[model]) == elsewhere
    assert all(mark(model, field) is EXECUTION for field in elsewhere)


@pytest.mark.parametrize("name", ELSEWHERE.values())
def test_a_field_tested_elsewhere_is_tested_there(name):
    module, _, test = name.partition(".")
    assert f"def {test}(" in (Path(__file__).parent / f"{module}.py").read_text()


def test_a_field_that_the_table_forgets_is_noticed():
    table = dict(CHANGED[OptimizerConfig])
    assert without_change(OptimizerConfig, table) == set()
    del table["betas"]
    assert without_change(OptimizerConfig, table) == {"betas"}
