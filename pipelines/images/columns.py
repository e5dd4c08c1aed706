"""Columns of Parquet files by name, nested ones as `meta.wnid`: their types, values and labels."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from eupe.errors import BadInput
from pipelines.recipe.config import ROW_KEY, SourceConfig

NO_CLASS = -1
"""What Hugging Face writes for an image without a class."""


def field(schema: pa.Schema, name: str) -> pa.Field | None:
    """Return a column by its name or by the path to it; None if there is none."""
    if name in schema.names:
        return schema.field(name)
    top, *rest = name.split(".")
    found = schema.field(top) if top in schema.names else None
    for part in rest:
        if found is None or not pa.types.is_struct(found.type):
            return None
        place = found.type.get_field_index(part)
        found = found.type.field(place) if place >= 0 else None
    return found


def column(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return the values of a column; those of a field within a null are null."""
    if name in table.column_names:
        return table[name]
    top, *rest = name.split(".")
    return pc.struct_field(table[top], rest)


def checked(
    path: Path, schema: pa.Schema, config: SourceConfig, labels: Sequence[str]
) -> str | None:
    """Check the columns that a source names against a file's schema.

    Returns:
        the column of the keys; None: they are row numbers.

    Raises:
        BadInput: one is not there or is of another type.
    """
    image = _found(path, schema, config.image_column)
    key = config.key_column or f"{config.image_column}.path"
    by_row = config.key_column == ROW_KEY and field(schema, ROW_KEY) is None
    if not by_row and field(schema, key) is None and not config.key_column:
        raise BadInput(
            f"{path}: no column {key!r}; there are {_names(schema)}. The path is the sample_id: "
            f"without one, name in source.key_column a column, or {ROW_KEY} (file and row number)"
        )
    pixels = field(schema, f"{config.image_column}.bytes") or image
    if not _is_bytes(pixels.type):
        raise BadInput(
            f"{path}: column {config.image_column!r} is {_type(image)}; source.image_column wants "
            "the bytes of encoded images: binary, or a struct with bytes and path"
        )
    if not by_row and not _is_key(_found(path, schema, key).type):
        raise BadInput(
            f"{path}: column {key!r} is {_type(_found(path, schema, key))}; source.key_column "
            "wants text or integers"
        )
    for name in labels:
        kind = _found(path, schema, name).type
        if pa.types.is_nested(kind) or _is_bytes(kind):
            inside = [f"{name}.{each.name}" for each in kind] if pa.types.is_struct(kind) else []
            instead = f"; name a field of it: {', '.join(inside)}" if inside else ""
            raise BadInput(
                f"{path}: column {name!r} is {_type(_found(path, schema, name))}; a label wants "
                f"one plain value{instead}"
            )
    return None if by_row else key


def class_names(schema: pa.Schema, labels: Sequence[str]) -> dict[str, list[str] | None]:
    """Return the names of the classes of each label that has them in Hugging Face's metadata."""
    said = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(said).get("info", {}).get("features", {}) if said else {}
    return {name: _class_names(features, name) for name in labels}


def labels(
    table: pa.Table | None, names: Mapping[str, list[str] | None], num_rows: int
) -> list[dict[str, str]]:
    """Return the labels of rows; a null is none.

    Args:
        table: with the columns.
        names: column -> what its integers are called, or None.
        num_rows: of the rows.
    """
    found: list[dict[str, str]] = [{} for _ in range(num_rows)]
    for name, classes in names.items():
        assert table is not None  # it has them
        for own, value in zip(found, column(table, name).to_pylist(), strict=True):
            if value is None or (classes and value == NO_CLASS):
                continue
            known = classes and isinstance(value, int) and 0 <= value < len(classes)
            own[name] = classes[value] if classes and known else str(value)
    return found


def _class_names(features: object, name: str) -> list[str] | None:
    for part in [name] if isinstance(features, dict) and name in features else name.split("."):
        features = features.get(part) if isinstance(features, dict) else None
    if not isinstance(features, dict) or features.get("_type") != "ClassLabel":
        return None
    return [str(each) for each in features.get("names") or ()] or None


def _found(path: Path, schema: pa.Schema, name: str) -> pa.Field:
    found = field(schema, name)
    if found is None:
        raise BadInput(f"{path}: no column {name!r}; there are {_names(schema)}")
    return found


def _names(schema: pa.Schema) -> str:
    return ", ".join(sorted(_leaves(schema)))


def _leaves(fields: pa.Schema | pa.StructType, within: str = "") -> list[str]:
    names = []
    for each in fields:
        name = f"{within}{each.name}"
        is_struct = pa.types.is_struct(each.type)
        names += [name, *(_leaves(each.type, f"{name}.") if is_struct else ())]
    return names


def _type(found: pa.Field) -> str:
    return str(found.type)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_key(kind: pa.DataType) -> bool:
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(text or pa.types.is_string_view(kind) or pa.types.is_integer(kind))
