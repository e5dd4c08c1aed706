"""docs/extending.md, followed: what somebody adds is in one place, and trains a student."""

from pathlib import Path

import pytest
import torch
from support import small_caches, small_run
from support.stage_runs import from_cache, live, losses
from timm.models import register_model
from torch import Tensor, nn

from eupe.spec import EncoderSpec
from pipelines.recipe.config import Recipe, TeacherConfig
from pipelines.recipe.named import by_name


class ToyNetwork(nn.Module):
    """One convolution of 16 x 16 patches: the least that `eupe.encoders.Encoder` reads as a CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 64, 64)}
        self.feature_info = [{"num_chs": 12, "reduction": 16, "module": "stem"}]
        self.stem = nn.Conv2d(3, 12, 16, 16)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.stem(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))


@register_model
def toy_network(**_: object) -> ToyNetwork:
    return ToyNetwork()


def with_toy_teacher(directory: Path) -> Recipe:
    """The small run, two steps of it, taught by the toy network."""
    run = small_run.recipe(directory)
    toy = TeacherConfig(
        name="toy",
        encoder=EncoderSpec(architecture="toy_network", summary="average_pool"),
        weights="random:3",
        resolutions=(64,),
        codec="float32",
    )
    stage = run.stage("stage2").model_copy(
        update={
            "teachers": ("toy",),
            "teacher_scales": {"toy": (64,)},
            "steps": 2,
            "log_every": 1,
            "evaluate_every": None,
        }
    )
    return Recipe.model_validate({**dict(run), "teachers": by_name(toy), "stages": by_name(stage)})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    directory = tmp_path_factory.mktemp("toy")
    run = with_toy_teacher(directory)
    small_run.build(run, directory)
    return run


def test_a_toy_teacher_is_cached_and_taught_from(built: Recipe, tmp_path: Path):
    stage = built.stage("stage2")
    cached = from_cache(built, stage, tmp_path / "cached")
    given = live(built, stage, small_caches.COMPUTE_BATCH)
    assert cached == losses(built, stage, given, tmp_path / "live")
    assert len(set(cached)) == 2
