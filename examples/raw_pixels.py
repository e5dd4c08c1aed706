"""The demo's kNN on raw pixels: what a student has to beat. About five seconds.

    python examples/raw_pixels.py

Pictures of examples/emoji over white, resized to 16 x 16 by bicubic interpolation, compared by L2;
bank, queries, label and k are those of `make demo`.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from eupe.probes import knn_predict, top1

EMOJI = Path(__file__).parent / "emoji" / "emoji.parquet"
LABEL = "category"
SIDE = 16
K = 10


def pixels(data: bytes) -> np.ndarray:
    """Return a picture over white as float32 [16 * 16 * 3], 0 to 255."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    over_white = Image.new("RGBA", picture.size, "white")
    over_white.alpha_composite(picture)
    small = over_white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(small, np.float32).ravel()


def main() -> int:
    """Print the share of held-out pictures whose category their neighbours tell."""
    table = pq.read_table(EMOJI).to_pylist()
    classes = sorted({row[LABEL] for row in table})
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for split in ("train", "test"):
        rows = [row for row in table if row["split"] == split]
        vectors = np.stack([pixels(row["image"]["bytes"]) for row in rows])
        labels = [classes.index(row[LABEL]) for row in rows]
        seen[split] = torch.from_numpy(vectors), torch.tensor(labels)
    (bank, known), (queries, wanted) = seen["train"], seen["test"]
    right = top1(knn_predict(bank, known, queries, K), wanted)
    print(
        f"kNN top-1 of raw {SIDE} x {SIDE} pixels: {right:.1%} "
        f"({LABEL}, k = {K}, {len(queries)} held-out queries, {len(bank)} in the bank)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
