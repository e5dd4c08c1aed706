"""Mappings by name: as data a name is a key, in Python each item knows its own."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, SerializerFunctionWrapHandler, WrapSerializer

from eupe.errors import BadInput


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
