"""Recipes by name or from a file, their relative paths resolved once against EUPE_HOME."""

import difflib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from eupe.errors import BadInput
from pipelines.recipe import demo, family, one_node, yaml_file
from pipelines.recipe.config import DatasetConfig, Recipe, SourceConfig, StudentConfig
from pipelines.recipe.override import changed, override

DEFAULT = demo.NAME
STAGE_2_ONLY = demo.STAGE_2_ONLY
FILES = (".yaml", ".yml")


RECIPES: dict[str, Callable[[], Recipe]] = {
    DEFAULT: demo.whole,
    STAGE_2_ONLY: demo.stage_2_only,
    **{name: partial(family.full, name) for name in family.STUDENTS},
    "proxy_vitg": family.proxy,
    "imagenet1k_vits16": partial(one_node.imagenet1k, "eupe_vits16"),
    "imagenet1k_convnext_tiny": partial(one_node.imagenet1k, "eupe_convnext_tiny"),
    "permissive": one_node.permissive,
}


def _tiny(make: Callable[[], Recipe]) -> Recipe:
    return family.tiny(make())


RECIPES |= {
    f"{name}_tiny": partial(_tiny, RECIPES[name]) for name in (*family.STUDENTS, "proxy_vitg")
}


def get(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that name, its paths absolute.

    Args:
        name: of the recipe; or a YAML file that says which recipe it changes, and how.
        overrides: fields to change, path.to.field=value (see `override.override`).

    Raises:
        BadInput: there is none, naming the nearest; or a change does not fit.
    """
    named = _from_file(home() / name) if name.endswith(FILES) else _named(name)
    return placed(override(named, overrides))


def _from_file(path: Path) -> Recipe:
    """Read `recipe: NAME` and `set: {path.to.field: value}`; the new recipe has the file's name.

    Raises:
        BadInput: no such file, no YAML of that form, or a change that does not fit.
    """
    asked = yaml_file.read(path, "recipe")
    form = f"{path}: wants `recipe: NAME` and `set: {{path.to.field: value}}`"
    if not isinstance(asked, dict) or set(asked) != {"recipe", "set"}:
        raise BadInput(form)
    if not isinstance(asked["set"], dict | None):
        raise BadInput(form)
    base = _named(str(asked["recipe"]))
    fields = [("name", path.stem), *(asked["set"] or {}).items()]
    try:
        return changed(base, fields)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(RECIPES))}"
        raise BadInput(f"no recipe {name!r}; {hint}")
    return RECIPES[name]()


def home() -> Path:
    """Return the folder that relative paths mean: EUPE_HOME, or the working folder."""
    return Path(os.environ.get("EUPE_HOME") or ".").resolve()


def placed(recipe: Recipe) -> Recipe:
    """Return a recipe whose relative paths are absolute, below `home`.

    Raises:
        BadInput: a variable of the environment that a path names and that is not set.
    """
    return _placed(recipe, home())


def _expanded(path: str) -> str:
    """Return a path with `~` and `$VARIABLE` as a shell has them.

    Raises:
        BadInput: a variable that is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    if (unset := re.search(r"\$\{?\w+\}?", expanded)) is not None:
        raise BadInput(f"path {path!r}: the environment has no {unset[0].strip('${}')}")
    return expanded


def _placed(recipe: Recipe, home: Path) -> Recipe:
    def placed(path: str) -> str:
        path = _expanded(path)
        return path if "://" in path else str(home / path)

    def weights(uri: str | None) -> str | None:
        scheme, colon, path = (uri or "").partition(":")
        return f"{scheme}{colon}{placed(path)}" if scheme in ("file", "checkpoint") else uri

    def student(config: StudentConfig) -> StudentConfig:
        return config.model_copy(update={"weights": weights(config.weights)})

    def dataset(config: DatasetConfig) -> DatasetConfig:
        source: SourceConfig = config.source.model_copy(update={"path": placed(config.source.path)})
        return config.model_copy(update={"source": source})

    return recipe.model_copy(
        update={
            "run_directory": placed(recipe.run_directory),
            "cache_root": placed(recipe.cache_root),
            "stage_root": recipe.stage_root and placed(recipe.stage_root),
            "train": {name: dataset(config) for name, config in recipe.train.items()},
            "held_out": dataset(recipe.held_out),
            "teachers": {
                name: teacher.model_copy(update={"weights": weights(teacher.weights)})
                for name, teacher in recipe.teachers.items()
            },
            "proxy": recipe.proxy and student(recipe.proxy),
            "student": student(recipe.student),
        }
    )
