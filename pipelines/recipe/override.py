"""Fields of a recipe changed by their dotted paths, and the whole checked again."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from eupe.errors import BadInput
from pipelines.recipe.config import Recipe

FREE = ("where", "gamma", "homogeneous", "model_arguments", "teacher_resolutions")
"""Fields that map names to plain values."""
NAMED = (["stages"], ["teachers"], ["train"])
"""Paths of the fields that map names to configurations."""
OF_PROXY = ("proxy_dtype", "proxy_codec", "proxy_resolutions")
"""Fields that a recipe without a proxy has no use for."""

Override = Annotated[str, Field(pattern=r"^[^=]+=.*$")]


def override(recipe: Recipe, overrides: Sequence[Override]) -> Recipe:
    """Return the recipe with `path.to.field=value` overrides applied and checked.

    Stages, teachers and train sets are addressed by name (`stages.stage2.steps=10`). Values are
    YAML; a list or a mapping takes the place of the one that was there.

    Raises:
        BadInput: a field that does not exist (naming the nearest that does) or a value that does
            not fit it.
    """
    fields = list[tuple[str, object]]()
    for item in overrides:
        path, separator, text = item.partition("=")
        if not separator:
            raise BadInput(f"override {item!r}: wants path.to.field=value")
        try:
            update = OmegaConf.from_dotlist([f"value={text}"])
            value = OmegaConf.to_container(update, resolve=True)["value"]  # type: ignore[index, call-overload]
        except (OmegaConfBaseException, YAMLError) as error:
            raise BadInput(f"override {item!r}: {' '.join(str(error).split())}") from error
        fields.append((path.strip(), value))
    return changed(recipe, fields)


def changed(recipe: Recipe, fields: Sequence[tuple[str, object]]) -> Recipe:
    """Return the recipe with fields changed, (path, plain value), and checked as a whole.

    A warm-up that fewer steps have no room for keeps its share of them, unless it is changed too.

    Raises:
        BadInput: as `override`.
    """
    tree = recipe.model_dump(mode="json")
    for path, value in fields:
        _set(tree, path, value)
    named = {path for path, _ in fields}
    for name, stage in recipe.stages.items():
        steps, warmup = f"stages.{name}.steps", f"stages.{name}.warmup_steps"
        if steps not in named or warmup in named:
            continue
        wanted = tree["stages"][name]["steps"]
        if isinstance(wanted, int) and wanted < stage.warmup_steps:
            _set(tree, warmup, stage.warmup_steps * wanted // stage.steps)
    whole = validated(tree)
    for path in named.intersection(OF_PROXY) if whole.proxy is None else ():
        raise BadInput(f"override {path!r}: recipe {whole.name} has no proxy")
    return whole


def validated(tree: object) -> Recipe:
    """Build a recipe from plain data, with every fault in one sentence.

    Raises:
        BadInput: what is wrong and where.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'recipe'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise BadInput(faults) from error


def _set(tree: dict[str, Any], path: str, value: object) -> None:
    """Put a value where a dotted path says, refusing a field that is not there."""
    *parents, last = path.split(".")
    node: Any = tree
    free = False  # below a field that maps names to values, new names are allowed
    for parent in parents:
        _check(node, parent, path, free=False)  # what is new has nothing in it yet
        free = parent in FREE
        node = node[parent]
        if not isinstance(node, dict):
            raise BadInput(f"override {path!r}: {parent!r} is a plain value, nothing is in it")
    # A whole item may be added to a mapping by name: the recipe is checked afterwards.
    _check(node, last, path, free or (parents[-1:] in NAMED and isinstance(value, dict)))
    node[last] = value


def _check(node: Mapping[str, object], part: str, path: str, free: bool) -> None:
    if part not in node and not free:
        raise BadInput(_no_such(path, part, list(node)))


def _no_such(path: str, part: str, names: list[str]) -> str:
    near = difflib.get_close_matches(part, names, n=1)
    there = ", ".join(sorted(names)) or "none"
    hint = f"did you mean {near[0]!r}?" if near else f"there are {there}"
    return f"override {path!r}: no field {part!r}; {hint}"
