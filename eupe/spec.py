"""Specs: the frozen, fingerprinted description of everything a cached feature depends on.

Torch-free, so that `cache` may import it. A *Spec* is identity; a *Config*
(`pipelines.recipe.config`) also says where things lie and how fast to work, which is never
identity (docs/design.md, law 1).
"""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eupe import by_path
from eupe import fingerprint as fp
from eupe.errors import BadInput

Dtype = Literal["float32", "float16", "bfloat16"]
Library = Literal["timm", "open_clip", "transformers", "python", "pixels"]
SummaryKind = Literal["class_token", "attention_pool", "average_pool", "mean_patches"]
CodecName = Annotated[str, Field(pattern=r"^[a-z0-9_.]+$")]
"""One of `cache.codec.known.KNOWN`, which this room does not know."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.]*$", max_length=80)]
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=80)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


class Spec(BaseModel):
    """A frozen value that refuses unknown fields and infinite numbers, and has a fingerprint."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def fingerprint(self) -> str:
        """Return the sha256 of this spec's canonical JSON (64 hexadecimal digits)."""
        return fp.fingerprint(self.model_dump(mode="json"))


class DatasetSpec(Spec):
    """A set of samples: a name and the rule that turns a stored image into its sample_id."""

    name: DatasetName
    key_rule: Literal["path-stem"] = "path-stem"


class CentreView(Spec):
    """One view a sample: the centre square, resized to the canvas."""

    kind: Literal["centre"] = Field("centre", description="one view, nothing drawn")
    canvas: int = Field(512, ge=16, description="side of the square canvas, pixels")
    background: tuple[int, int, int] = Field((255, 255, 255), description="under transparency, RGB")
    share: float = Field(
        1.0,
        ge=0.01,
        le=1,
        description="side of the square over the shorter side; 0.875: 256 to 224",
    )


class AugmentedView(Spec):
    """The paper's five augmentations (EUPE, arXiv:2603.22387), drawn once per view on the canvas.

    Deviation: the paper names the augmentations and not their ranges; the defaults are the usual
    ones of self-distillation (DINO's first global view), marked assumed in docs/paper_map.md.
    """

    kind: Literal["augmented"] = Field("augmented", description="views that are drawn")
    seed: int = Field(0, description="that views are drawn by")
    canvas: int = Field(512, ge=16, description="side of the square canvas, pixels")
    background: tuple[int, int, int] = Field((255, 255, 255), description="under transparency, RGB")
    crop_area: tuple[float, float] = Field((0.32, 1.0), description="share of the picture's area")
    crop_aspect: tuple[float, float] = Field((3 / 4, 4 / 3), description="width over height")
    flip_probability: float = Field(0.5, ge=0, le=1, description="of left for right")
    jitter_rule: Literal["hsv"] = Field("hsv", description="what the factors mean: eupe.colours")
    jitter_probability: float = Field(0.8, ge=0, le=1, description="of other colours")
    brightness: float = Field(0.4, ge=0, le=1, description="factor drawn from 1 -+ this")
    contrast: float = Field(0.4, ge=0, le=1, description="factor drawn from 1 -+ this")
    saturation: float = Field(0.2, ge=0, le=1, description="factor drawn from 1 -+ this")
    hue: float = Field(0.1, ge=0, le=0.5, description="turn of HSV's circle, drawn from -+")
    blur_probability: float = Field(0.5, ge=0, le=1, description="of a Gaussian blur")
    blur_sigma: tuple[float, float] = Field((0.2, 4.0), description="range, canvas pixels")
    solarize_probability: float = Field(0.1, ge=0, le=1, description="of bright inverted")
    solarize_threshold: int = Field(128, ge=0, le=255, description="inverted from here up")

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentedView":
        for field in ("crop_area", "crop_aspect", "blur_sigma"):
            low, high = getattr(self, field)
            if not 0 < low <= high:
                raise BadInput(f"{field} = ({low}, {high}): wants 0 < low <= high")
        if self.crop_area[1] > 1:
            raise BadInput(f"crop_area = {self.crop_area}: wants at most 1, the whole picture")
        return self


ViewPolicy = Annotated[CentreView | AugmentedView, Field(discriminator="kind")]


class EncoderSpec(Spec):
    """A network read as an encoder: how pixels go in and which tokens come out.

    A checkpoint of ours is the timm encoder it was trained as, with its weights.
    """

    library: Library = Field(
        "timm", description="that builds the network; pixels: none does; python: your own function"
    )
    architecture: str = Field(
        description="its name in the library (of transformers: the model type); or "
        "python:package.module:function, which is kept with its source's digest"
    )
    pixel_mean: Triple = Field(
        IMAGENET_MEAN, description="taken off each colour, on the [0, 1] scale"
    )
    pixel_std: Triple = Field(
        IMAGENET_STD, description="each colour is divided by, on the [0, 1] scale"
    )
    summary: SummaryKind = Field("class_token", description="what stands for the whole picture")
    layer: int | None = Field(
        None,
        description="of a CNN the stride of the map to take as patches (16, say), of a ViT the "
        "number of a block; null: the final features",
    )
    model_arguments: dict[str, int | float | bool | str | tuple[int, ...] | None] = Field(
        {}, description="of the library's constructor, where they are not the architecture's own"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, said: object) -> object:
        name = said.get("architecture") if isinstance(said, dict) else None
        if not isinstance(said, dict) or not isinstance(name, str):
            return said
        if name.startswith(by_path.PREFIX):
            return {**said, "library": "python", "architecture": by_path.with_digest(name)}
        if said.get("library") == "python":
            raise BadInput(f"architecture {name!r} of library python: wants {by_path.WANTED}")
        return said

    @property
    def network(self) -> "EncoderSpec":
        """The same network and pixels, with the summary and layer that are read left out."""
        return self.model_copy(update={"summary": "class_token", "layer": None})


class TeacherSpec(Spec):
    """A frozen encoder with its weights and compute dtype: who made the features."""

    name: Name
    encoder: EncoderSpec
    weights: Sha256 = Field(description="digest of the state dict, see eupe.teachers")
    dtype: Dtype = "float32"


class CodecSpec(Spec):
    """How features are stored: a codec's name, and the rule that fits its scaling."""

    name: CodecName = "float16"
    fit: str | None = Field(None, description="None for plain dtypes; set by cache.codec.known")


class StoreSpec(Spec):
    """One feature store: every (sample, view) of a dataset through a teacher at one resolution."""

    format: Literal[1] = 1
    dataset: DatasetSpec
    views: ViewPolicy
    teacher: TeacherSpec
    codec: CodecSpec
    resolution: int = Field(ge=1, description="side of the square input, pixels")
    grid: tuple[int, int] = Field(description="patch tokens, (rows, columns)")
    patch_dim: int = Field(ge=1)
    summary_dim: int = Field(ge=1)

    def views_hash(self) -> str:
        """Return the name of the views directory: the policy with its canvas and seed."""
        return views_hash(self.views)

    def teacher_directory(self) -> str:
        """Return the name of the teacher directory: everything but the resolution."""
        identity = {
            "teacher": self.teacher.model_dump(mode="json"),
            "codec": self.codec.model_dump(mode="json"),
        }
        return f"{self.teacher.name}-{fp.short(fp.fingerprint(identity))}"

    def directory(self) -> PurePosixPath:
        """Return the path of the store inside a cache root (docs/store_format.md)."""
        return PurePosixPath(
            self.dataset.name, self.views_hash(), self.teacher_directory(), str(self.resolution)
        )


def views_hash(policy: CentreView | AugmentedView) -> str:
    """Return the name of a view policy's directory inside a dataset."""
    return fp.short(policy.fingerprint())
