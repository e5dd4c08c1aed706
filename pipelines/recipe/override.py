"""Fields of a recipe changed by their dotted paths, and the whole checked again."""

import difflib
import re
from collections.abc import Sequence
from typing import Annotated

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from eupe.errors import BadInput
from pipelines.recipe.config import Recipe

Override = Annotated[str, Field(pattern=r"^[^=]+=.*$")]


def override(recipe: Recipe, overrides: Sequence[Override]) -> Recipe:
    """Return the recipe with `path.to.field=value` overrides applied and checked.

    List items are addressed by number (`stages.0.steps=10`) or, for stages, teachers and train
    sets, by name (`stages.stage2.steps=10`). Values are YAML.

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
            value = OmegaConf.to_container(update)["value"]  # type: ignore[index, call-overload]
        except (OmegaConfBaseException, YAMLError) as error:
            raise BadInput(f"override {item!r}: {' '.join(str(error).split())}") from error
        fields.append((path.strip(), value))
    return changed(recipe, fields)


def changed(recipe: Recipe, fields: Sequence[tuple[str, object]]) -> Recipe:
    """Return the recipe with fields changed, (path, plain value), and checked as a whole.

    Raises:
        BadInput: as `override`.
    """
    tree = recipe.model_dump(mode="json")
    for path, value in fields:
        resolved = _resolve(tree, path)
        target: object = tree
        for key in resolved[:-1]:
            target = target[key]  # type: ignore[index]
        target[resolved[-1]] = value  # type: ignore[index]
    return validated(tree)


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


def _resolve(tree: object, path: str) -> list[str | int]:
    """Turn a dotted path into keys of the tree, refusing a field that is not there."""
    node, keys = tree, list[str | int]()
    free = False  # below a field that maps names to values, new names are allowed
    for part in re.split(r"\.", path):
        if isinstance(node, dict):
            if part not in node and not free:
                raise BadInput(_no_such(path, part, [str(key) for key in node]))
            keys.append(part)
            free = part in ("where", "gamma", "homogeneous", "model_arguments", "teacher_scales")
            node = node.get(part)
        elif isinstance(node, list):
            names = [_item_name(item, index) for index, item in enumerate(node)]
            if part.isdigit() and int(part) < len(node):
                index = int(part)
            elif part in names:
                index = names.index(part)
            else:
                raise BadInput(_no_such(path, part, names))
            keys.append(index)
            node = node[index]
        else:
            raise BadInput(
                f"override {path!r}: {keys[-1]!r} is a plain value, {part!r} is not in it"
            )
    return keys


def _item_name(item: object, index: int) -> str:
    if isinstance(item, dict):
        return str(item.get("stage") or item.get("name") or index)
    return str(index)


def _no_such(path: str, part: str, names: list[str]) -> str:
    near = difflib.get_close_matches(part, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(names))}"
    return f"override {path!r}: no field {part!r}; {hint}"
