"""Decodes by the kernels of CUDA on a CPU: Triton's interpreter, which wants its own process.

Prints JSON: what was decoded -> its largest difference to the numpy oracle, in root mean squares of
its token.
"""

import json
import os

import numpy as np
import torch

from cache.codec.known import default_codec, make_codec
from cache.codec.quantised import QUANTISATIONS
from eupe.moments import Moments
from eupe.normalise import Normaliser, phi_s, zscore
from pipelines.features import fused
from pipelines.features.codec_torch import Decoder
from support.smooth_pictures import grid_codec, pictures, token_error

GRIDS = (((2, 5), 20), ((1, 3), 56), ((1, 1), 8))
OF_NO_BASIS = 10
NUM_ROWS = 9
"""More than one program looks up."""
NAMES = ("grid1", "grid4")


def wanted(decoded: np.ndarray, normaliser: Normaliser | None) -> np.ndarray:
    """Return what an oracle decoded, normalised."""
    if normaliser is None:
        return decoded
    whole = normaliser.double()(torch.from_numpy(decoded).double())
    normaliser.float()
    return whole.numpy()


def main() -> None:
    """Decode by every codec that has kernels."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, which is later
    fused.usable = lambda device: True
    found = {}
    for name in NAMES:
        for measured in (10_000, OF_NO_BASIS):
            for grid, dim in GRIDS if name == "grid1" else GRIDS[:1]:
                oracle = grid_codec(name, grid, dim, measured)
                rows = pictures(grid, dim, NUM_ROWS, seed=3)
                rows[1] *= 1e-4
                rows[2] *= 1e4
                encoded = oracle.encode(rows)
                moments = Moments.of(rows[:1].reshape(-1, dim))
                normalisers = (None, zscore(moments), phi_s(moments))
                for normaliser in normalisers[: 3 if grid == GRIDS[0][0] else 1]:
                    theirs = wanted(oracle.decode(encoded.data, encoded.escapes), normaliser)
                    ours = Decoder(oracle, normaliser)(encoded.data, encoded.escapes).numpy()
                    which = "none" if normaliser is None else str(normaliser.rotation is not None)
                    found[f"{name} {grid} {dim} {measured} {which}"] = token_error(ours, theirs)
    rng = np.random.default_rng(0)
    for name in QUANTISATIONS:
        for dim in (7, 40):
            rows = rng.standard_t(4, (3, 11, dim)).astype(np.float32)
            moments = Moments.of(rows.reshape(-1, dim))
            oracle = make_codec(default_codec(name), (moments.count, moments.mean, moments.scatter))
            encoded = oracle.encode(rows)
            theirs = oracle.decode(encoded.data, encoded.escapes)
            ours = Decoder(oracle)(encoded.data, encoded.escapes).numpy()
            found[f"{name} {dim}"] = token_error(ours, theirs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
