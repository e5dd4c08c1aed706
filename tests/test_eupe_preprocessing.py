"""Pixels go in as the weights' own record says, and who says otherwise is told."""

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from eupe.errors import BadInput
from eupe.preprocessing import normalisation
from eupe.spec import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from pipelines.recipe.config import TeacherConfig

HALF = (0.5, 0.5, 0.5)
OPENAI = (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("library", "architecture", "weights", "mean"),
    [
        ("timm", "vit_tiny_patch16_224", "hub:augreg_in21k", HALF),
        ("timm", "vit_tiny_patch16_224.augreg_in21k", "file:somewhere.pth", HALF),
        ("timm", "vit_huge_plus_patch16_dinov3", "hub", IMAGENET_MEAN),
        ("open_clip", "ViT-B-32", "hub:openai", OPENAI),
        ("open_clip", "ViT-B-32", "hub:laion2b_s34b_b79k", OPENAI),
    ],
)
def test_what_a_recipe_does_not_name_is_the_weights_own(library, architecture, weights, mean):
    encoder = EncoderSpec(library=library, architecture=architecture)
    teacher = TeacherConfig(name="t", encoder=encoder, weights=weights, resolutions=(224,))
    assert teacher.encoder.pixel_mean == mean
    plain = TeacherConfig.model_validate(teacher.model_dump(mode="json"))
    assert plain == teacher


@pytest.mark.parametrize("weights", ["random:1", "checkpoint:runs/x", "hub:no_such_tag"])
def test_without_a_record_it_is_imagenets(weights):
    encoder = EncoderSpec(architecture="vit_tiny_patch16_224")
    teacher = TeacherConfig(name="t", encoder=encoder, weights=weights, resolutions=(224,))
    assert (teacher.encoder.pixel_mean, teacher.encoder.pixel_std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert normalisation(encoder, weights) is None


def test_what_a_recipe_names_stays():
    encoder = EncoderSpec(architecture="vit_tiny_patch16_224", pixel_mean=(0.1, 0.2, 0.3))
    teacher = TeacherConfig(name="t", encoder=encoder, weights="hub", resolutions=(224,))
    assert teacher.encoder.pixel_mean == (0.1, 0.2, 0.3)
    assert teacher.encoder.pixel_std == HALF


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}),
        ("open_clip_config.json", {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}),
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}),
        ("config.json", {"model_type": "other"}),
    ],
)
def test_a_folder_of_weights_has_its_own_record(tmp_path, name, record):
    (tmp_path / name).write_text(json.dumps(record))
    found = normalisation(EncoderSpec(architecture="vit_tiny_patch16_224"), f"file:{tmp_path}")
    own = ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert found == ((HALF, HALF) if "model_type" in record else own)


def downloaded(downloads: Path, repository: str, files: dict[str, str]) -> None:
    """Write a repository as huggingface_hub lays out its downloads."""
    folder = downloads / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    for name, content in files.items():
        file = folder / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_a_repository_of_the_hub_has_its_own_record(tmp_path, monkeypatch):
    """The architecture's usual weights may want other pixels."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    downloaded(tmp_path, "someone/dino", {"config.json": json.dumps(own)})
    encoder = EncoderSpec(architecture="vit_tiny_patch16_224")
    asked = {"name": "t", "weights": "hf-hub:someone/dino", "resolutions": (224,)}
    teacher = TeacherConfig(encoder=encoder, **asked)
    assert teacher.encoder.pixel_mean == (0.1, 0.2, 0.3)
    asked["weights"] = "hf-hub:someone/unknown"
    with pytest.raises(
        BadInput, match=r"unknown'.*cannot be asked there.*name encoder\.pixel_mean"
    ):
        normalisation(encoder, asked["weights"])
    both = encoder.model_copy(update={"pixel_mean": HALF, "pixel_std": HALF})
    both = EncoderSpec(**both.model_dump())
    assert TeacherConfig(encoder=both, **asked).encoder == both  # needs no record
