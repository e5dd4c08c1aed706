"""docs/extending.md, followed: what somebody adds is in one place, and trains a student."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_caches, small_run
from support.stage_runs import from_cache, live, losses, training_job
from timm.models import register_model
from torch import Tensor, nn

from cache.codec.encoded import NOT_FINITE, Encoded, Escapes, Kind
from cache.codec.known import KNOWN
from cache.verify import verify
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from pipelines.recipe.config import Recipe, TeacherConfig
from pipelines.recipe.named import by_name
from pipelines.recipe.override import override
from pipelines.recipe.stores import open_stores
from pipelines.training import inputs

WORST = 0.5
"""Of normalised patches: a token's step is one for all its channels, and the z-score makes the
quiet ones, which it serves worst, as loud as the rest. Not normalised they would be off by 1."""
TWO_STEPS = [
    "stages.stage2.steps=2",
    "stages.stage2.log_every=1",
    "stages.stage2.evaluate_every=null",
]


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
    run = override(small_run.recipe(directory), TWO_STEPS)
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
            "teacher_resolutions": {"toy": (64,)},
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


class Halves:
    """A toy codec: a coefficient is 8 bits, in steps of half its token's mean magnitude.

    A row is [N, D + 4]: codes, then the step as the four bytes of a float32.
    """

    name = "halves"
    has_escapes = False
    fill_value = 0
    storage_dtype = np.dtype(np.uint8)

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        return num_tokens, dim + 4

    def encode(self, patches: np.ndarray) -> Encoded:
        valid = np.isfinite(patches).all((1, 2))
        kept = np.where(valid[:, None, None], patches, 0)
        step = np.abs(kept).mean(2, keepdims=True, dtype=np.float32) / 2
        codes = np.rint(kept / np.where(step > 0, step, 1)).clip(-128, 127).astype(np.int8)
        data = np.concatenate([codes.view(np.uint8), step.view(np.uint8)], 2)
        reasons = [None if good else NOT_FINITE for good in valid]
        return Encoded(data, valid, reasons, Escapes.none(patches.shape[-1]))

    def decode(self, data: np.ndarray, escapes: Escapes | None = None) -> np.ndarray:
        step = np.ascontiguousarray(data[..., -4:]).view(np.float32)
        return data[..., :-4].view(np.int8) * step

    def to_json_dict(self) -> dict[str, object]:
        return {"name": self.name}

    def arrays(self) -> dict[str, np.ndarray]:
        return {}


def first_patches(given: inputs.Inputs) -> Tensor:
    """Normalised patches of the first batch, from whatever the inputs take them."""
    return next(iter(given.batches(range(1)))).targets("cpu")["lite0"].patches


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Kind:
    kind = Kind(bits=8, fitted=lambda _: Halves(), stored=lambda *_: Halves(), mean_cosine=0.98)
    monkeypatch.setitem(KNOWN, "halves", kind)
    return kind


def with_toy_codec(directory: Path) -> Recipe:
    return override(small_run.recipe(directory), ["teachers.lite0.codec=halves", *TWO_STEPS])


@pytest.mark.slow
def test_a_toy_codec_is_stored_read_judged_and_taught_from(halves: Kind, tmp_path: Path):
    run = with_toy_codec(tmp_path)
    small_run.build(run, tmp_path)
    stage = run.stage("stage2")
    (store,) = open_stores(training_job(run, stage))
    assert isinstance(store.codec, Halves)
    assert store.provenance["codec_quality"]["cosine"] >= halves.mean_cosine
    assert verify(store).problems == []
    exact = first_patches(live(run, stage, small_caches.COMPUTE_BATCH))
    assert 0 < relative_error(first_patches(inputs.from_caches(run, stage)), exact) < WORST
    assert len(set(from_cache(run, stage, tmp_path / "run"))) == 2


def test_a_toy_codec_that_keeps_less_than_it_documents_is_refused(
    halves: Kind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setitem(KNOWN, "halves", replace(halves, mean_cosine=0.9999))
    with pytest.raises(BadInput, match=r"codec halves keeps a mean cosine of 0\.99\d\d on"):
        small_run.build(with_toy_codec(tmp_path), tmp_path)


def test_a_codec_that_nobody_registered_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="codec = 'halves': wants one of float32, float16"):
        with_toy_codec(tmp_path)
