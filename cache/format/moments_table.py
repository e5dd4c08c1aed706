"""moments.arrow: count, mean and scatter of a store's summaries and patches, as measured once."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.codec.encoded import Moments
from cache.errors import Corrupt
from cache.format import arrow_tables
from eupe.spec import StoreSpec

KINDS = ("summary", "patches")
SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("count", pa.int64()),
        ("mean", pa.list_(pa.float64())),
        ("scatter", pa.list_(pa.float64())),
    ]
)
"""One record a token kind; `scatter` is D x D, row-major."""


def check_widths(spec: StoreSpec, moments: Mapping[str, Moments]) -> None:
    """Refuse moments of other tokens than the spec's.

    Raises:
        ValueError: a kind is missing, or of another width.
    """
    dims = {"summary": spec.summary_dim, "patches": spec.patch_dim}
    for kind, dim in dims.items():
        if kind not in moments:
            raise ValueError(f"moments: {kind!r} is missing; a store wants summary and patches")
        _, mean, scatter = moments[kind]
        if np.shape(mean) != (dim,) or np.shape(scatter) != (dim, dim):
            raise ValueError(
                f"moments of {kind}: mean {np.shape(mean)}, scatter {np.shape(scatter)}; "
                f"the spec wants ({dim},) and ({dim}, {dim})"
            )


def to_bytes(moments: Mapping[str, Moments]) -> memoryview:
    """Return the file: equal moments, equal bytes."""
    table = pa.table(
        {
            "kind": list(KINDS),
            "count": [int(moments[kind][0]) for kind in KINDS],
            "mean": _lists([moments[kind][1] for kind in KINDS]),
            "scatter": _lists([moments[kind][2] for kind in KINDS]),
        },
        schema=SCHEMA,
    )
    return arrow_tables.to_bytes(table)


def parse(content: bytes | memoryview | pa.Buffer, path: Path) -> dict[str, Moments]:
    """Read the file's contents: kind -> count, mean [D], scatter [D, D], float64.

    Raises:
        Corrupt: the file is not one of moments.
    """
    table = arrow_tables.parse_table(pa.py_buffer(content), str(path))
    if table.schema != SCHEMA or table["kind"].to_pylist() != list(KINDS):
        raise Corrupt(f"{path}: wants the moments of {' and '.join(KINDS)}")
    out: dict[str, Moments] = {}
    for position, kind in enumerate(KINDS):
        mean = np.array(arrow_tables.to_numpy(table["mean"][position].values))
        scatter = np.array(arrow_tables.to_numpy(table["scatter"][position].values))
        dim = len(mean)
        out[kind] = table["count"][position].as_py(), mean, scatter.reshape(dim, dim)
    return out


def _lists(arrays: Sequence[npt.NDArray[np.float64]]) -> pa.Array:
    """Return one Arrow list of float64 an array, flattened."""
    flat = [np.asarray(array, np.float64).reshape(-1) for array in arrays]
    offsets = np.cumsum([0, *(len(part) for part in flat)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        arrow_tables.from_numpy(offsets), arrow_tables.from_numpy(np.concatenate(flat))
    )
