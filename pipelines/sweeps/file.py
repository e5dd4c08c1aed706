"""A sweep file: a base recipe, axes with named values, exclusions and seeds; the runs of it.

    recipe: demo
    set: {num_views: 1}                      # of every run
    axes:
      stages:                                # of the name of an axis nothing depends
        1-2-3: {}                            # a value: fields and what they become
        1-2: {stages: [stage1, stage2]}      # `stages` and `teachers`: those that are kept
      gamma:
        "1": {}
        "2": {stages.stage1.loss.gamma.efficientnet_lite2: 2}
    exclude: [{stages: 1-2, gamma: "2"}]
    seeds: [0, 1, 2]

The first value of every axis is the base, which the others are compared with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError

from cache.files import copies
from eupe.errors import BadInput
from eupe.spec import Spec
from pipelines.recipe import recipes, yaml_file
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.override import changed, override, validated

KEPT = ("stages", "teachers")
"""Fields of a recipe that map names to configurations, of which a value may keep some."""

GIVEN = {
    "seed": "the sweep file lists those of all runs, `seeds: [0, 1, 2]`",
    "name": "it is the sweep's own",
}
"""Fields of a recipe that a sweep gives each run -> what to do instead of setting one."""
PLACES = {
    "run_directory": "each run has a folder of its own; `set` may say beside what they lie",
    "stage_root": "runs share their stages; `set` may say where",
}
"""Those that it gives each run, from the one that is set for all."""


def _as_text(name: object) -> object:
    """Names are text; YAML makes a number of what looks like one."""
    return str(name) if isinstance(name, int | float) else name


ValueName = Annotated[
    str, BeforeValidator(_as_text), StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
]
AxisName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class Sweep(Spec):
    """What a sweep file says."""

    name: ValueName = Field(description="of the file; its runs lie in a folder of that name")
    recipe: str = Field(description="name of the base recipe, or a YAML file that changes one")
    set: dict[str, Any] = Field({}, description="fields of every run")
    axes: dict[AxisName, dict[ValueName, dict[str, Any]]] = Field(
        description="axis -> name of a value -> the fields that it changes"
    )
    exclude: tuple[dict[AxisName, ValueName], ...] = Field(
        (), description="combinations of values that are left out"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="of every setting")


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        values: axis -> name of its value.
        seed: of the run.
        recipe: what it is asked to do.
    """

    values: dict[str, str]
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        """Its folder below the sweep's."""
        return self.recipe.directory.name


def read(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        BadInput: there is none, or a fault in it.
    """
    said = yaml_file.read(path, "sweep")
    if not isinstance(said, dict):
        raise BadInput(f"{path}: wants `recipe: NAME` and `axes: {{AXIS: {{VALUE: FIELDS}}}}`")
    try:
        sweep = Sweep.model_validate({"name": path.stem, **said})
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'sweep'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise BadInput(f"{path}: {faults}") from error
    for name, values in sweep.axes.items():
        if not values:
            raise BadInput(f"{path}: axes.{name} has no value")
    for excluded in sweep.exclude:
        for axis, value in excluded.items():
            if value not in sweep.axes.get(axis, {}):
                raise BadInput(f"{path}: exclude names {axis}: {value}, which no axis has")
    return sweep


def is_sweep(path: Path) -> bool:
    """Return True if a file is there that has axes, as no recipe file has."""
    said = yaml_file.read(path, "sweep") if path.is_file() else None
    return isinstance(said, dict) and "axes" in said


def base(sweep: Sweep) -> dict[str, str]:
    """Return the setting that others are compared with: the first value of every axis."""
    return {axis: next(iter(values)) for axis, values in sweep.axes.items()}


def runs(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Run]:
    """List the runs of a sweep, the base's first.

    Args:
        sweep: the sweep.
        overrides: fields of every run, path.to.field=value, after the sweep's own.

    Raises:
        BadInput: a field that does not exist, or a run that does not fit together.
    """
    _check_own(sweep, {item.partition("=")[0].strip() for item in overrides})
    asked = recipes.get(sweep.recipe)
    try:
        asked = changed(asked, [*sweep.set.items()])
    except BadInput as error:
        raise BadInput(f"{sweep.name}, set: {error}") from error
    asked = recipes.placed(override(asked, overrides))
    if copies.remote(asked.directory) is not None:
        raise BadInput(
            f"run_directory = {asked.run_directory!r}: the runs of a sweep lie in a folder that "
            "its machines share, not in a bucket; name a folder, or run one setting by `eupe run`"
        )
    return [
        Run(values, seed, _recipe(sweep, asked, values, seed))
        for values in _settings(sweep)
        for seed in sweep.seeds
    ]


def _check_own(sweep: Sweep, said: set[str]) -> None:
    """Refuse fields that a sweep itself gives each run: another value would be dropped."""
    of_axes = {path for axis in sweep.axes.values() for fields in axis.values() for path in fields}
    wrong = (of_axes | said | {*sweep.set}) & GIVEN.keys() | of_axes & PLACES.keys()
    for field in sorted(wrong):
        raise BadInput(f"{sweep.name}: {field} is not to be set: {(GIVEN | PLACES)[field]}")


def _settings(sweep: Sweep) -> Iterator[dict[str, str]]:
    for names in product(*sweep.axes.values()):
        values = dict(zip(sweep.axes, names, strict=True))
        if not any(excluded.items() <= values.items() for excluded in sweep.exclude if excluded):
            yield values


def _recipe(sweep: Sweep, asked: Recipe, values: Mapping[str, str], seed: int) -> Recipe:
    """Return the recipe of a run."""
    fields = dict[str, Any]()
    for axis, value in values.items():
        own = sweep.axes[axis][value]
        if twice := fields.keys() & own.keys():
            raise BadInput(f"{sweep.name}, {axis}: {value}: another axis sets {sorted(twice)} too")
        fields |= own
    kept = {name: fields.pop(name) for name in KEPT if isinstance(fields.get(name), list)}
    setting = "_".join(values.values())
    try:
        whole = changed(asked, [*fields.items(), ("seed", seed)])
        run = _keeping(whole, kept)
    except BadInput as error:
        raise BadInput(f"{sweep.name}, {setting}: {error}") from error
    folder = f"{setting}_seed{seed}" if setting else f"seed{seed}"
    places: dict[str, object] = {
        "name": sweep.name,
        "run_directory": str(asked.directory.parent / sweep.name / folder),
        "stage_root": str(asked.outputs),
    }
    if any(PROXY in stage.teachers for stage in run.stages.values()):
        # One normaliser over what the base caches: with fewer stages a proxy teaches the same.
        scales = {*asked.scales_of_proxy, *run.scales_of_proxy}
        places["proxy_resolutions"] = run.proxy_resolutions or tuple(sorted(scales))
    return run.model_copy(update=places)


def _keeping(recipe: Recipe, kept: Mapping[str, list[str]]) -> Recipe:
    """Return a recipe with some of its stages and teachers alone."""
    if not kept:
        return recipe
    tree = recipe.model_dump(mode="json")
    for field, names in kept.items():
        if unknown := [name for name in names if name not in tree[field]]:
            raise BadInput(f"{field}: {unknown} of {[*tree[field]]}")
        tree[field] = {name: each for name, each in tree[field].items() if name in names}
    if "teachers" in kept:
        there = {*kept["teachers"], PROXY}
        for stage in tree["stages"].values():
            stage["teachers"] = [name for name in stage["teachers"] if name in there]
            for of_teacher in (stage["teacher_resolutions"], stage["loss"]["gamma"]):
                for name in of_teacher.keys() - there:
                    del of_teacher[name]
    return validated(tree)
