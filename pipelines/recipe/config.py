"""Run configuration: what a recipe says, typed and frozen.

A configuration says where things lie and how fast to work. The part of it that a feature depends
on is turned into an `eupe.spec` (identity) when weights have been read and hashed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_validator,
)

from eupe.errors import BadInput
from eupe.spec import (
    CentreView,
    CodecName,
    DatasetName,
    Dtype,
    EncoderSpec,
    Name,
    Spec,
    ViewPolicy,
)
from pipelines.recipe.mix import Mix

StageName = Literal["stage1", "stage2", "stage3"]
PROXY = "proxy"
"""Name under which a stage lists the proxy as its teacher."""
PIXELS = "pixels"
"""Name under which the views' own pixels are cached."""


def _give_names(items: object) -> object:
    """Put each key of a mapping into its item as `name`."""
    if not isinstance(items, Mapping):
        raise BadInput("wants a mapping, each item under its name")
    given: dict[object, object] = {}
    for name, item in items.items():
        if isinstance(item, Mapping):
            if "name" in item:
                raise BadInput(f"{name}: its key is its name; leave `name` out")
            item = {**item, "name": name}
        elif getattr(item, "name", name) != name:
            raise BadInput(f"{name}: holds an item named {item.name!r}")
        given[name] = item
    return given


def _drop_names(items: object, plain: SerializerFunctionWrapHandler) -> dict[str, object]:
    """Leave out of each item the name that its key says."""
    return {
        name: {field: value for field, value in item.items() if field != "name"}
        for name, item in plain(items).items()
    }


Key = TypeVar("Key")
Item = TypeVar("Item")
Named = Annotated[dict[Key, Item], BeforeValidator(_give_names), WrapSerializer(_drop_names)]
"""Items by name. In Python an item knows its name; as data the name is its key alone."""


def by_name(*items: Any) -> dict[Any, Any]:
    """Return items under their names, in their order.

    Raises:
        BadInput: two have one name.
    """
    found = {item.name: item for item in items}
    if len(found) < len(items):
        names = [item.name for item in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise BadInput(f"{twice}: more than one item of that name")
    return found


class SourceConfig(Spec):
    """Where images lie: class folders, WebDataset tars or Parquet files with image bytes."""

    kind: Literal["folder", "webdataset", "parquet"]
    path: str = Field(description="folder, file, or glob of files; relative to the working folder")
    image_column: str = Field("image", description="parquet: struct {bytes, path} or binary")
    key_column: str | None = Field(None, description="parquet: sample_id; else the image's path")
    label_columns: tuple[str, ...] = Field((), description="parquet: columns kept as labels")
    where: dict[str, str] = Field({}, description="keep samples whose labels equal these")


class DatasetConfig(Spec):
    """A named set of images and, in a mix, the share of heterogeneous batches it fills."""

    name: DatasetName
    source: SourceConfig
    share: float = Field(1.0, gt=0)


class TeacherConfig(Spec):
    """A teacher as a recipe names it; `weights` says where the file is, which is not identity.

    weights: `package:<python package>/<file>`, `file:<path>` (safetensors or a weights-only
    checkpoint), `hub` (timm's or open_clip's own download), `random:<seed>`,
    `checkpoint:<directory>` for a checkpoint of ours, or `sha256:<digest>` for weights that are
    not on this machine: enough to train from their cached features.
    """

    name: Name
    encoder: EncoderSpec
    weights: str
    dtype: Dtype = "float32"
    resolutions: tuple[int, ...] = Field(min_length=1, description="cached at these, pixels")
    codec: CodecName = "float16"


class StudentConfig(Spec):
    """A network to train. `weights` as in TeacherConfig; None starts from timm's initialisation."""

    name: Name
    encoder: EncoderSpec
    weights: str | None = None


class ExtractionConfig(Spec):
    """How caches are built: execution, never identity (but for what provenance records)."""

    rows_per_shard: int | None = Field(
        None, ge=1, description="None: the largest patches array gives about 256 MB a shard"
    )
    moments_samples: int = Field(1024, ge=2, description="samples that moments are measured on")
    compute_batch: int = Field(32, ge=1, description="padded batch of the teacher's forward")
    actors: int = Field(1, ge=1)
    cpus_per_actor: float = Field(2, gt=0)
    gpus_per_actor: float = Field(0, ge=0)
    decode_threads: int = Field(2, ge=1)
    max_failure_share: float = Field(0.01, ge=0, le=1, description="of invalid rows in a build")

    @property
    def device(self) -> str:
        """Device that extractors compute on, as torch names it."""
        return "cuda" if self.gpus_per_actor > 0 else "cpu"

    @property
    def compute_threads(self) -> int:
        """Threads that an extractor computes on: the CPUs that Ray reserves for it."""
        return max(1, int(self.cpus_per_actor))


class LossConfig(Spec):
    """Eq. 4-7 of EUPE (arXiv:2603.22387)."""

    alpha: float = Field(0.9, ge=0, description="weight of the patches' cosine loss (paper)")
    beta: float = Field(0.1, ge=0, description="weight of the patches' smooth L1 (paper)")
    smooth_l1_beta: float = Field(1.0, gt=0, description="not stated in the paper; assumed")
    gamma: dict[str, float] = Field({}, description="teacher -> factor of its patch term (Eq. 7)")


class OptimizerConfig(Spec):
    """AdamW. The paper states lr and weight decay only."""

    lr: float = Field(2e-5, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = Field(1.0, gt=0, description="None: no clipping")


class StageConfig(Spec):
    """One stage of distillation: who learns from whom, at which scales, for how long."""

    name: StageName
    teachers: tuple[str, ...] = Field(min_length=1, description=f"expert names, or ('{PROXY}',)")
    student: Literal["student", "proxy"] = "student"
    teacher_scales: dict[str, tuple[int, ...]] = Field(
        description="teacher -> resolutions drawn from; one entry means fixed"
    )
    student_scales: tuple[int, ...] = Field(min_length=1)
    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    micro_batch: int = Field(ge=1, description="at the smallest student scale")
    head_hidden: int = Field(3072, ge=1)
    normaliser: Literal["zscore", "phi-s"] = "zscore"
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warmup_steps: int = Field(0, ge=0)
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    compile: bool = False
    activation_checkpointing: bool = False
    strategy: Literal["ddp", "fsdp2"] = Field("ddp", description="with several workers")
    log_every: int = Field(10, ge=1)
    evaluate_every: int | None = Field(
        None, ge=1, description="held-out figures every so many steps; such a step is saved too"
    )
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    initial: StageName | None = Field(None, description="start from that stage's checkpoint")

    @model_validator(mode="after")
    def _complete(self) -> "StageConfig":
        if set(self.teachers) != set(self.teacher_scales):
            raise BadInput(
                f"teacher_scales names {sorted(self.teacher_scales)}, teachers {self.teachers}: "
                "every teacher needs its scales"
            )
        if self.warmup_steps > self.steps:
            raise BadInput(
                f"warmup_steps = {self.warmup_steps}, steps = {self.steps}: the warm-up is a part "
                "of the steps"
            )
        if unknown := set(self.loss.gamma) - set(self.teachers):
            raise BadInput(
                f"loss.gamma names {sorted(unknown)}; the stage's teachers are {self.teachers}"
            )
        return self


class WorkersConfig(Spec):
    """How training is spread: one process here, or Ray Train workers."""

    count: int = Field(1, ge=1)
    use_gpu: bool = False
    loader_threads: int = Field(2, ge=1)
    prefetch_batches: int = Field(4, ge=1)
    store_access: Literal["map", "read"] = Field(
        "map", description="read: by position, for file systems where maps are slow (NFS, Lustre)"
    )
    copy_threads: int = Field(1, ge=1, description="that copy one batch out of a store")


class EvaluationConfig(Spec):
    """kNN by a label over held-out queries, and cosine to the teachers on held-out images."""

    label: str | None = Field("label", description="what kNN predicts; None: no kNN")
    bank: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="train sets that kNN looks among and the baseline is fitted to; None: all",
    )
    k: int = Field(10, ge=1)
    resolution: int = Field(ge=1, description="of the student's input, pixels")
    batch: int = Field(64, ge=1)


class Recipe(Spec):
    """Everything a distillation run does, from images to report."""

    name: Name
    run_directory: str = Field(description="everything but caches is written below it")
    cache_root: str
    pixels: tuple[int, ...] = Field(
        (), description="student scales at which the views themselves are cached too, as uint8"
    )
    proxy_directory: str | None = Field(
        None,
        description="where stage 1 is kept, for recipes that share a proxy; None: with the run",
    )
    seed: int = 0
    train: Named[DatasetName, DatasetConfig] = Field(min_length=1)
    homogeneous: dict[str, float] = Field({}, description="dataset -> chance of a batch of its own")
    held_out: DatasetConfig
    views: ViewPolicy
    num_views: int = Field(1, ge=1)
    held_out_views: CentreView
    teachers: Named[Name, TeacherConfig] = Field(min_length=1)
    proxy: StudentConfig | None = None
    proxy_dtype: Dtype = "bfloat16"
    proxy_codec: CodecName = "float16"
    student: StudentConfig
    stages: Named[StageName, StageConfig] = Field(min_length=1)
    extraction: ExtractionConfig = ExtractionConfig()
    workers: WorkersConfig = WorkersConfig()
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.held_out.name in self.train:
            raise BadInput(
                f"{[self.held_out.name]}: more than one data set of that name; every train set "
                "and the held-out set wants a name of its own"
            )
        Mix(self.shares, self.homogeneous, 1, self.seed)
        if unknown := set(self.evaluation.bank or ()) - set(self.train):
            raise BadInput(
                f"evaluation.bank names {sorted(unknown)}; the train sets are {list(self.train)}"
            )
        cached = {name: set(teacher.resolutions) for name, teacher in self.teachers.items()}
        if PIXELS in cached:
            raise BadInput(f"a teacher is named {PIXELS!r}: that name is the views' own")
        drawn = {scale for stage in self.stages.values() for scale in stage.student_scales}
        if unused := set(self.pixels) - drawn:
            raise BadInput(f"pixels at {sorted(unused)}: no stage has a student at that scale")
        for stage in self.stages.values():
            if stage.initial is not None and stage.initial not in self.stages:
                raise BadInput(
                    f"{stage.name}: initial names {stage.initial}; "
                    f"the stages are {list(self.stages)}"
                )
            for name in stage.teachers:
                if name == PROXY:
                    continue
                if name not in cached:
                    raise BadInput(f"{stage.name}: teacher {name!r} is none of {sorted(cached)}")
                missing = set(stage.teacher_scales[name]) - cached[name]
                if missing:
                    raise BadInput(
                        f"{stage.name}: teacher {name!r} is not cached at {sorted(missing)}"
                    )
        if self.num_views > 1 and self.views.kind == "centre":
            raise BadInput(f"num_views = {self.num_views}: a centre view has only view 0")
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

    @property
    def directory(self) -> Path:
        """The run directory as a path."""
        return Path(self.run_directory)

    def stage_directory(self, name: StageName) -> Path:
        """Return where a stage writes checkpoints and figures."""
        shared = self.proxy_directory is not None and name == "stage1"
        return Path(self.proxy_directory or "" if shared else self.run_directory) / name
