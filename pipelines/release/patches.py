"""Patches as one plain Zarr v3 array: [picture, row, column, channel], float32, a chunk a batch.

No codec, no shard: any Zarr reader opens it, and a chunk is the bytes of its pictures. The last
chunk is filled up with NaN, as Zarr has chunks whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache.files import atomic
from eupe.errors import BadInput


class PatchesWriter:
    """Writes patches batch after batch; the array can be opened when the block has ended.

    Args:
        folder: of the array, new or empty.
        shape: (rows, columns, channels) of one picture.
        chunk: pictures a chunk.
        attributes: plain data, what made them.

    Raises:
        BadInput: something is in the folder.
    """

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, int, int],
        chunk: int,
        attributes: Mapping[str, object],
    ) -> None:
        if folder.exists() and (not folder.is_dir() or next(folder.iterdir(), None) is not None):
            raise BadInput(f"--patches {folder}: something is there; wants a new or empty folder")
        self._folder, self._shape, self._attributes = folder, shape, dict(attributes)
        self._chunk = np.full((chunk, *shape), np.nan, np.float32)
        self._num_rows = 0

    def __enter__(self) -> "PatchesWriter":
        return self

    def append(self, patches: npt.NDArray[np.float32]) -> None:
        """Write the patches of some pictures, float32 [n, rows, columns, channels]."""
        while len(patches):
            size = len(self._chunk)
            begin = self._num_rows % size
            some, patches = patches[: size - begin], patches[size - begin :]
            self._chunk[begin : begin + len(some)] = some
            self._num_rows += len(some)
            if self._num_rows % size == 0:
                self._flush(self._num_rows // size - 1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            return
        size = len(self._chunk)
        if self._num_rows % size:
            self._chunk[self._num_rows % size :] = np.nan
            self._flush(self._num_rows // size)
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        metadata = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self._num_rows, *self._shape],
            "data_type": "float32",
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [size, *self._shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN",
            "codecs": [little, {"name": "crc32c"}],
            "attributes": self._attributes,
            "dimension_names": ["picture", "row", "column", "channel"],
        }
        self._put("zarr.json", json.dumps(metadata, indent=2).encode() + b"\n")

    def _flush(self, number: int) -> None:
        content = self._chunk.astype("<f4", copy=False).tobytes()
        checksum: int = google_crc32c.value(content)
        self._put(f"c/{number}/0/0/0", content + checksum.to_bytes(4, "little"))

    def _put(self, name: str, content: bytes) -> None:
        atomic.write(self._folder / name, [content], scratch=self._folder)
