"""What each field of a recipe is: identity or execution, its description and allowed values.

The mark stands where the field is declared, `Annotated[int, IDENTITY]`. A field whose type is a
configuration has none: the fields of that configuration have theirs. A field whose type is a spec
(`eupe.spec`) is identity as a whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Mark(Enum):
    """Whether a field may move the figures of a run."""

    IDENTITY = "identity"
    EXECUTION = "execution"


IDENTITY = Mark.IDENTITY
"""What is learnt, or judged, depends on it: another value is another run."""
EXECUTION = Mark.EXECUTION
"""Where things lie, how fast the work goes, what is said and kept: free to change on resuming."""


BOUNDS = {
    "ge": "at least",
    "gt": "above",
    "le": "at most",
    "lt": "below",
    "min_length": "length at least",
}
"""How pydantic names a bound -> how it is said."""


class OneOf(NamedTuple):
    """In a field's metadata: it takes one of these names. Whatever checks them stands beside it."""

    names: Iterable[str]


class Leaf(NamedTuple):
    """One field of a model that holds no other fields.

    Attributes:
        path: dotted, as `--set` takes it.
        value: plain.
        mark: of the field, or of the field that the leaf lies in.
        description: for whoever sets it.
        allowed: what values it takes, in words.
    """

    path: str
    value: object
    mark: Mark
    description: str
    allowed: str


def leaves(model: BaseModel, path: str = "", mark: Mark | None = None) -> Iterator[Leaf]:
    """Yield every leaf of a model, in the order of declaration.

    Args:
        model: a recipe, or a part of one.
        path: prefix of the paths.
        mark: of the field that holds the model, if it has one.

    Raises:
        TypeError: a field without a mark.
    """
    plain = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        here, own, value = f"{path}{name}", mark or mark_of(field), getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{here}.", own)
            continue
        named = isinstance(value, Mapping) and all(isinstance(i, BaseModel) for i in value.values())
        if named and value:
            for key, item in value.items():
                inside = leaves(item, f"{here}.{key}.", own)
                yield from (leaf for leaf in inside if leaf.path != f"{here}.{key}.name")
            continue
        if own is None:
            if value is None:  # a configuration that is left out
                continue
            raise TypeError(f"{type(model).__name__}.{name} is marked neither way")
        said = field.description or "", allowed(field.annotation, field.metadata)
        if isinstance(plain[name], dict) and plain[name]:
            for key, item in plain[name].items():
                yield Leaf(f"{here}.{key}", item, own, *said)
        else:
            yield Leaf(here, plain[name], own, *said)


def marks(model: BaseModel) -> Iterator[tuple[str, Mark]]:
    """Yield (path, mark) of every leaf of a model."""
    yield from ((leaf.path, leaf.mark) for leaf in leaves(model))


def mark_of(field: FieldInfo) -> Mark | None:
    """Return the mark a field is declared with, None for one that holds a configuration.

    Raises:
        TypeError: it has several.
    """
    found = [each for each in field.metadata if isinstance(each, Mark)]
    if len(found) > 1:
        raise TypeError(f"a field marked {' and '.join(each.value for each in found)}")
    return found[0] if found else None


def identity(model: BaseModel) -> dict[str, Any]:
    """Return a configuration as plain data, without its execution fields."""
    plain = model.model_dump(mode="json")
    kept: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        mark, value = mark_of(field), getattr(model, name)
        if mark is IDENTITY:
            kept[name] = plain[name]
        elif mark is None and isinstance(value, BaseModel):
            kept[name] = identity(value)
    return kept


def allowed(annotation: Any, metadata: list[Any]) -> str:
    """Say in words which values a field takes, from its type and its bounds."""
    bounds = [
        f"{words} {bound}"
        for each in metadata
        for kind, words in BOUNDS.items()
        if (bound := getattr(each, kind, None)) is not None
    ]
    names = [" | ".join(each.names) for each in metadata if isinstance(each, OneOf)]
    return ", ".join([*(names or [_kind(annotation)]), *bounds])


def _kind(annotation: Any) -> str:
    """Name a type for somebody who writes YAML."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in inner)
    if origin in (Union, UnionType):
        words = [_kind(each) for each in inner if each is not NoneType]
        return " | ".join([*words, "null"] if NoneType in inner else words)
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kind(inner[0])
    if origin is tuple:
        if Ellipsis in inner:
            return f"a list: {_kind(inner[0])}"
        return f"{len(inner)} values: {_kind(inner[0])}"
    if origin is dict:
        return f"a mapping: {_kind(inner[0])} to {_kind(inner[1])}"
    plain = {bool: "true | false", int: "a whole number", float: "a number", str: "text"}
    return plain.get(annotation, "a mapping")
