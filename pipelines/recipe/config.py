"""Run configuration: what a recipe says, typed and frozen, each field marked and described.

A configuration says where things lie and how fast to work. The part of it that a feature depends
on is turned into an `eupe.spec` (identity) when weights have been read and hashed.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cache.codec.known import OF_PATCHES, default_codec, kind
from cache.files import copies
from eupe.errors import BadInput
from eupe.spec import (
    CentreView,
    DatasetName,
    Dtype,
    EncoderSpec,
    Name,
    Spec,
    ViewPolicy,
)
from pipelines.recipe import places
from pipelines.recipe.marks import EXECUTION, IDENTITY, OneOf
from pipelines.recipe.mix import Mix, per_lane
from pipelines.recipe.named import Named
from pipelines.recipe.stage import MOST_VIEWS, StageConfig, StageName


def _known_codec(name: str) -> str:
    default_codec(name)
    if not kind(name).bits:
        raise BadInput(f"codec = {name!r}: keeps no patches; wants one of {', '.join(OF_PATCHES)}")
    return name


def _as_label(value: object) -> object:
    """Labels are text; YAML makes a number of what looks like one."""
    return str(value) if isinstance(value, int | float) else value


def _list_codecs(schema: dict[str, object]) -> None:
    schema["examples"] = OF_PATCHES


CodecName = Annotated[
    str, AfterValidator(_known_codec), OneOf(OF_PATCHES), Field(json_schema_extra=_list_codecs)
]
"""A codec of patches that `cache.codec.known` has, or one that is derived, as "rot4 of float16"."""
PROXY = "proxy"
"""Name under which a stage lists the proxy as its teacher."""
PIXELS = "pixels"
"""Name under which the views' own pixels are cached."""
ROW_KEY = "__row__"
"""The key column that stands for a row's number in its file."""
WEIGHTS = (
    "package:<python package>/<file>; file:<path> (safetensors, a weights-only checkpoint, or a "
    "folder with one, as a snapshot of the Hugging Face hub); hub or hub:<tag> (timm's or "
    "open_clip's own download); hf-hub:<owner>/<name>; random:<seed>; checkpoint:<directory> of "
    "one of ours; or sha256:<digest> for weights that are not here: enough to train from their "
    "features"
)
"""What the field `weights` takes."""

_FIELDS_OF_KIND = {
    "webdataset": ("key", "image_member", "classes"),
    "parquet": ("image_column", "key_column", "label_columns"),
}


class SourceConfig(Spec):
    """Where images lie: class folders, WebDataset tars or Parquet files with image bytes."""

    kind: Annotated[Literal["folder", "webdataset", "parquet"], IDENTITY] = Field(
        description="what the images are kept in; it decides how samples are keyed"
    )
    path: Annotated[str, EXECUTION] = Field(
        description="folder, file, or pattern of files, as train-{000..099}.tar or *.tar; relative "
        "to the working folder"
    )
    key: Annotated[Literal["name", "shard", "path"], IDENTITY] = Field(
        "name",
        description="webdataset: a sample is what shares a path up to the first dot of its base "
        "name, and that path its id; shard: with the tar's name before it, where keys are unique "
        "in a tar only; path: every picture is a sample, its id the path without the extension",
    )
    image_member: Annotated[str | None, IDENTITY] = Field(
        None,
        description="webdataset: field of a key that is its picture, as jpg, or jpg;png in order "
        "of preference; null: its only picture, or the only one without a dot (jpg, not seg.png)",
    )
    classes: Annotated[Literal["folder", "tar"], IDENTITY] = Field(
        "folder",
        description="webdataset: the label `label` is the top folder in the tar; or the tar's name",
    )
    image_column: Annotated[str, IDENTITY] = Field(
        "image", description="parquet: struct {bytes, path} or binary"
    )
    key_column: Annotated[str | None, IDENTITY] = Field(
        None, description=f"parquet: sample_id; {ROW_KEY}: file and row number; null: image's path"
    )
    label_columns: Annotated[tuple[str, ...], IDENTITY] = Field(
        (),
        description="parquet: columns kept as labels, nested ones as meta.wnid; class names are "
        "the file's own; a null is no label",
    )
    where: Annotated[dict[str, Annotated[str, BeforeValidator(_as_label)]], IDENTITY] = Field(
        {}, description="keep samples whose labels equal these"
    )

    @model_validator(mode="after")
    def _nothing_is_dropped(self) -> "SourceConfig":
        for theirs, fields in _FIELDS_OF_KIND.items():
            for field in fields if theirs != self.kind else ():
                if getattr(self, field) != type(self).model_fields[field].default:
                    raise BadInput(
                        f"{self.path}: {field} = {getattr(self, field)!r} is for {theirs} sources; "
                        f"this one's kind is {self.kind}"
                    )
        return self


class DatasetConfig(Spec):
    """A named set of images and, in a mix, the share of heterogeneous batches it fills."""

    name: Annotated[DatasetName, IDENTITY] = Field(
        description="of its folder in the cache root; the order of its samples is drawn by it"
    )
    source: SourceConfig = Field(description="where its images lie")
    share: Annotated[float, IDENTITY] = Field(
        1.0, gt=0, description="of a heterogeneous batch, relative to the other sets"
    )
    num_views: Annotated[int | None, IDENTITY] = Field(
        None, ge=1, le=MOST_VIEWS, description="of each train image; null: the recipe's num_views"
    )
    licence: Annotated[str | None, EXECUTION] = Field(
        None, description="of its images, by SPDX name where there is one; null: not known"
    )


class TeacherConfig(Spec):
    """A teacher as a recipe names it. Its identity in a store is the digest of its weights.

    A pixel mean and std that the recipe does not name are those of the weights' own record.
    """

    name: Annotated[Name, IDENTITY] = Field(description="of its folders in the cache root")
    encoder: Annotated[EncoderSpec, IDENTITY] = Field(description="its network")
    weights: Annotated[str, IDENTITY] = Field(description=WEIGHTS)
    dtype: Annotated[Dtype, IDENTITY] = Field("float32", description="it computes in")
    resolutions: Annotated[tuple[int, ...], IDENTITY] = Field(
        min_length=1, description="cached at these, pixels"
    )
    codec: Annotated[CodecName, IDENTITY] = Field(
        "float16", description="its features are stored in"
    )
    licence: Annotated[str | None, EXECUTION] = Field(
        None, description="of its weights, by SPDX name if it has one; null: as timm has on record"
    )

    @model_validator(mode="before")
    @classmethod
    def _pixels_of_the_weights(cls, said: object) -> object:
        if not isinstance(said, dict) or not isinstance(said.get("weights"), str):
            return said
        encoder = said.get("encoder")
        if isinstance(encoder, dict):
            encoder = EncoderSpec.model_validate(encoder)
        if not isinstance(encoder, EncoderSpec):
            return said
        if not {"pixel_mean", "pixel_std"} - encoder.model_fields_set:
            return said
        from eupe.preprocessing import normalisation  # timm and open_clip: seconds

        if (record := normalisation(encoder, said["weights"])) is not None:
            named = {name: getattr(encoder, name) for name in encoder.model_fields_set}
            pixels = dict(zip(("pixel_mean", "pixel_std"), record, strict=True))
            encoder = EncoderSpec(**(pixels | named))
        return {**said, "encoder": encoder}


class StudentConfig(Spec):
    """A network to train."""

    name: Annotated[Name, EXECUTION] = Field(description="in tables and reports")
    encoder: Annotated[EncoderSpec, IDENTITY] = Field(description="its network")
    weights: Annotated[str | None, IDENTITY] = Field(
        None, description=f"null: timm's initialisation under the seed; else {WEIGHTS}"
    )
    licence: Annotated[str | None, EXECUTION] = Field(
        None, description="of its first weights; null: as timm has on record"
    )


class ExtractionConfig(Spec):
    """How caches are built. What is identity here is fixed when a dataset or store is begun."""

    rows_per_shard: Annotated[int | None, IDENTITY] = Field(
        None,
        ge=1,
        description="null: as many whole compute batches as make 256 MB of the largest patches "
        "array, at least one; fixed when a dataset is first indexed, and shuffled by from then on",
    )
    moments_samples: Annotated[int, IDENTITY] = Field(
        1024,
        ge=2,
        description="samples that moments are measured on; fixed when a store is made",
    )
    compute_batch: Annotated[int, EXECUTION] = Field(
        32, ge=1, description="padded batch of the teacher's forward"
    )
    actors: Annotated[int, EXECUTION] = Field(
        1, ge=1, description="processes that extract, at most; fewer where there is no room"
    )
    cpus_per_actor: Annotated[float, EXECUTION] = Field(
        2, gt=0, description="that Ray reserves; the whole ones are the threads it computes on"
    )
    gpus_per_actor: Annotated[float, EXECUTION] = Field(
        0, ge=0, description="that Ray reserves; 0: it computes on CPUs"
    )
    decode_threads: Annotated[int, EXECUTION] = Field(
        2, ge=1, description="of each actor, that decode images and draw views"
    )
    order: Annotated[Literal["stored", "drawn"], EXECUTION] = Field(
        "stored",
        description="in which shards are built; drawn: as stages draw them, for one that waits "
        "(on_missing); Parquet files of large row groups are then read many times",
    )
    everything: Annotated[bool, EXECUTION] = Field(
        False, description="all views of all samples, not only those that the stages will draw"
    )
    max_failure_share: Annotated[float, EXECUTION] = Field(
        0.01, ge=0, le=1, description="of images or features that are unusable; more is an error"
    )

    @property
    def device(self) -> str:
        """Device that extractors compute on, as torch names it."""
        return "cuda" if self.gpus_per_actor > 0 else "cpu"

    @property
    def compute_threads(self) -> int:
        """Threads that an extractor computes on: the CPUs that Ray reserves for it."""
        return max(1, int(self.cpus_per_actor))


class WorkersConfig(Spec):
    """How training is spread: one process here, or Ray Train workers."""

    count: Annotated[int, EXECUTION] = Field(
        1, ge=1, description="processes; 1 trains in the process that is asked"
    )
    use_gpu: Annotated[bool, EXECUTION] = Field(False, description="one GPU a worker")
    loader_threads: Annotated[int, EXECUTION] = Field(
        2, ge=1, description="of each worker, that make batches"
    )
    prefetch_batches: Annotated[int, EXECUTION] = Field(
        4, ge=1, description="made ahead of the step that is computed"
    )
    store_access: Annotated[Literal["map", "read"], EXECUTION] = Field(
        "map", description="read: by position, for file systems where maps are slow (NFS, Lustre)"
    )
    copy_threads: Annotated[int, EXECUTION] = Field(
        1, ge=1, description="that copy one batch out of a store"
    )


class EvaluationConfig(Spec):
    """kNN by a label over held-out queries, and cosine to the teachers on held-out images."""

    label: Annotated[str | None, IDENTITY] = Field(
        "label", description="what kNN predicts; null: no kNN"
    )
    bank: Annotated[tuple[str, ...] | None, IDENTITY] = Field(
        None,
        min_length=1,
        description="train sets that kNN looks among and the baseline is fitted to; null: all",
    )
    k: Annotated[int, IDENTITY] = Field(10, ge=1, description="neighbours that vote")
    resolution: Annotated[int, IDENTITY] = Field(ge=1, description="of the student's input, pixels")
    batch: Annotated[int, EXECUTION] = Field(
        64, ge=1, description="images that go through the student at once"
    )


class Recipe(Spec):
    """Everything a distillation run does, from images to report."""

    name: Annotated[Name, EXECUTION] = Field(description="of the recipe, in reports")
    run_directory: Annotated[str, EXECUTION] = Field(
        description="folder, or one in a bucket: reports are written below it, its stages linked"
    )
    cache_root: Annotated[str, EXECUTION] = Field(description="of caches; a folder or in a bucket")
    pixels: Annotated[tuple[int, ...] | Literal["all"], EXECUTION] = Field(
        (),
        description="student scales at which the views themselves are cached too, as uint8; all: "
        "every one that a stage has",
    )
    stage_root: Annotated[str | None, EXECUTION] = Field(
        None,
        description="folder of the outputs of stages, each at the address of what made it, which "
        "runs share; null: `stages` beside the run directory",
    )
    seed: Annotated[int, IDENTITY] = Field(
        0, description="of networks, order, mix and scales; views have their own"
    )
    lanes: Annotated[int, IDENTITY] = Field(
        1,
        ge=1,
        description="that the shards of each train set are dealt to; a global batch takes an equal "
        "part of every lane, so that a worker reads the shards of its own lanes only, if the "
        "number of workers divides them",
    )
    train: Named[DatasetName, DatasetConfig] = Field(
        min_length=1, description="data sets that are trained on, by name"
    )
    homogeneous: Annotated[dict[str, float], IDENTITY] = Field(
        {}, description="dataset -> chance of a batch of its own"
    )
    held_out: DatasetConfig = Field(description="data set that is judged on")
    views: Annotated[ViewPolicy, IDENTITY] = Field(description="of the train sets")
    num_views: Annotated[int, IDENTITY] = Field(
        1, ge=1, le=MOST_VIEWS, description="of each train image, if its set says no other"
    )
    held_out_views: Annotated[CentreView, IDENTITY] = Field(
        description="of the held-out set, and of the bank"
    )
    teachers: Named[Name, TeacherConfig] = Field(
        min_length=1, description="frozen networks that stages learn from, by name"
    )
    proxy: StudentConfig | None = Field(
        None, description="network of stage 1, which teaches stages 2 and 3; null: none"
    )
    proxy_dtype: Annotated[Dtype, IDENTITY] = Field(
        "bfloat16", description="the proxy computes in, as a teacher"
    )
    proxy_codec: Annotated[CodecName, IDENTITY] = Field(
        "float16", description="the proxy's features are stored in"
    )
    proxy_resolutions: Annotated[tuple[int, ...] | None, IDENTITY] = Field(
        None,
        min_length=1,
        description="the proxy's features are cached and normalised over these, pixels; null: "
        "those that the stages draw",
    )
    student: StudentConfig = Field(description="network of stages 2 and 3")
    stages: Named[StageName, StageConfig] = Field(
        min_length=1, description="in the order in which they are trained, by name"
    )
    extraction: ExtractionConfig = Field(ExtractionConfig(), description="how caches are built")
    workers: WorkersConfig = Field(WorkersConfig(), description="how training is spread")
    evaluation: EvaluationConfig = Field(description="how a student is judged")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.held_out.name in self.train:
            raise BadInput(
                f"{[self.held_out.name]}: more than one data set of that name; every train set "
                "and the held-out set wants a name of its own"
            )
        places.check(self.run_directory, self.stage_root)
        Mix(self.shares, self.homogeneous, 1, self.seed)
        for stage in self.stages.values():
            try:
                per_lane(stage.global_batch, self.lanes)
            except BadInput as error:
                raise BadInput(f"{stage.name}: {error}") from error
        if unknown := set(self.evaluation.bank or ()) - set(self.train):
            raise BadInput(
                f"evaluation.bank names {sorted(unknown)}; the train sets are {list(self.train)}"
            )
        cached = {name: set(teacher.resolutions) for name, teacher in self.teachers.items()}
        if PIXELS in cached:
            raise BadInput(f"a teacher is named {PIXELS!r}: that name is the views' own")
        if unused := set(self.pixel_scales) - self._student_scales:
            raise BadInput(f"pixels at {sorted(unused)}: no stage has a student at that scale")
        earlier = list[StageName]()
        for stage in self.stages.values():
            if stage.initial is not None and stage.initial not in earlier:
                raise BadInput(
                    f"{stage.name}: initial names {stage.initial}; it wants a stage that is "
                    f"trained before it, of {list(self.stages)}"
                )
            earlier.append(stage.name)
            for name in stage.teachers:
                if name == PROXY:
                    if "stage1" not in earlier:
                        raise BadInput(
                            f"{stage.name}: learns from the proxy, and no stage 1 is "
                            f"trained before it, of {list(self.stages)}"
                        )
                    continue
                if name not in cached:
                    raise BadInput(f"{stage.name}: teacher {name!r} is none of {sorted(cached)}")
                missing = set(stage.teacher_resolutions[name]) - cached[name]
                if missing:
                    raise BadInput(
                        f"{stage.name}: teacher {name!r} is not cached at {sorted(missing)}"
                    )
        if not self._drawn_of_proxy <= {*self.scales_of_proxy}:
            raise BadInput(
                f"proxy_resolutions = {self.proxy_resolutions}: the stages draw from "
                f"{sorted(self._drawn_of_proxy)}"
            )
        for name in self.train:
            if self.views_of(name) > 1 and self.views.kind == "centre":
                raise BadInput(f"num_views = {self.views_of(name)}: a centre view has only view 0")
        if self.held_out.num_views is not None:
            raise BadInput(
                f"held_out.num_views = {self.held_out.num_views}: that set has one centre view"
            )
        if self.held_out.share != DatasetConfig.model_fields["share"].default:
            raise BadInput(
                f"held_out.share = {self.held_out.share:g}: that set fills no part of a batch"
            )
        return self

    def stage(self, name: str) -> StageConfig:
        """Return the stage of that name.

        Raises:
            BadInput: this recipe has no such stage.
        """
        if name not in self.stages:
            raise BadInput(f"recipe {self.name} has no {name}; it has {', '.join(self.stages)}")
        return self.stages[name]

    @property
    def last(self) -> StageConfig:
        """The stage that makes what the recipe is run for."""
        return next(reversed(self.stages.values()))

    def views_of(self, name: DatasetName) -> int:
        """Return how many views a sample of a train set has."""
        own = self.train[name].num_views
        return self.num_views if own is None else own

    @property
    def shares(self) -> dict[str, float]:
        """Train set -> the share of heterogeneous batches that it fills."""
        return {name: dataset.share for name, dataset in self.train.items()}

    def trained_by(self, stage: StageConfig) -> StudentConfig:
        """Return the network that a stage trains.

        Raises:
            BadInput: the stage trains the proxy and the recipe has none.
        """
        if stage.student == "student":
            return self.student
        if self.proxy is None:
            raise BadInput(f"recipe {self.name}: {stage.name} trains a proxy and there is none")
        return self.proxy

    @property
    def bank(self) -> tuple[DatasetConfig, ...]:
        """The train sets that evaluations look among."""
        wanted = self.evaluation.bank
        return tuple(each for each in self.train.values() if wanted is None or each.name in wanted)

    def mix(self, stage: StageConfig) -> Mix:
        """Return which data set fills which slot of a stage's global batches."""
        return Mix(self.shares, self.homogeneous, stage.global_batch, self.seed, self.lanes)

    @property
    def pixel_scales(self) -> tuple[int, ...]:
        """The student scales at which the views themselves are cached, pixels."""
        return tuple(sorted(self._student_scales)) if self.pixels == "all" else self.pixels

    @property
    def _student_scales(self) -> set[int]:
        return {scale for stage in self.stages.values() for scale in stage.student_resolutions}

    @property
    def scales_of_proxy(self) -> tuple[int, ...]:
        """The resolutions at which the proxy's features are cached, pixels."""
        return tuple(sorted(self.proxy_resolutions or self._drawn_of_proxy))

    @property
    def _drawn_of_proxy(self) -> set[int]:
        return {
            scale
            for stage in self.stages.values()
            for scale in stage.teacher_resolutions.get(PROXY, ())
        }

    @property
    def directory(self) -> Path:
        """The run directory; of one in a bucket the copy here."""
        return copies.local(self.run_directory)

    @property
    def outputs(self) -> Path:
        """The folder of the outputs of stages, which runs share; likewise."""
        return copies.local(self.stage_root or self.directory.parent / "stages")

    def stage_directory(self, name: StageName) -> Path:
        """Where a run finds the output of its stage: a link to its address."""
        return self.directory / name
