"""What the pixels of cached views take in one coding or another: bytes, PSNR, and time to decode.

    python -m benchmarks.pixels [--images FOLDER] [--views 20] [--resolution 256] [--json FILE]

A training run from caches reads its student's views, 3 bytes a pixel, from a store of their own;
with features at one bit a value they are most of what a recipe stores. Here the augmented views of
a folder's photographs (else scikit-learn's two) are coded as image files are, and by the grid
codecs, for which 16 x 16 pixels are a token of 768 values. The latter are fitted to the views of
every other photograph and, as all others, judged on the rest.

of_raw are a view's bytes over those of its pixels; psnr_db is over all views' pixels, as bytes
(none: equal); worst_db is that of the worst view. decode_ms is one thread's, of a view, median of
REPEATS; views_a_core are how many of them one core decodes in a second.
"""

import io
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from PIL import Image

from benchmarks import tables
from benchmarks.pairs import median_seconds
from cache.codec.known import default_codec, make_codec
from eupe.moments import Moments
from eupe.spec import AugmentedView
from eupe.views import make_view, resize
from pipelines.features.codec_torch import Decoder, encode
from pipelines.images.walks import IMAGE_SUFFIXES

PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"
REPEATS = 5
PATCH = 16
OFFSET = 127.5
"""Added to bytes before a grid codec has them: errors are bounded relative to a token, and a black
one would have no room for any."""
FILES: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG"},
    "WebP, lossless": {"format": "WEBP", "lossless": True},
    "WebP 90": {"format": "WEBP", "quality": 90},
    "JPEG 95, 4:4:4": {"format": "JPEG", "quality": 95, "subsampling": 0},
    "JPEG 90, 4:2:0": {"format": "JPEG", "quality": 90},
}
GRIDS = ("grid4", "grid3", "grid2", "grid1")
COLUMNS = {
    "coding": "",
    "of_raw": ".3f",
    "psnr_db": ".1f",
    "worst_db": ".1f",
    "decode_ms": ".2f",
    "views_a_core": ",.0f",
}


def views(paths: Sequence[Path], count: int, resolution: int) -> np.ndarray:
    """Draw augmented views of pictures, uint8 [n, R, R, 3]."""
    policy, drawn = AugmentedView(), []
    for path in paths:
        data = path.read_bytes()
        canvases = (make_view(data, policy, path.name, view).canvas for view in range(count))
        drawn += [resize(canvas, resolution) for canvas in canvases]
    return np.stack(drawn)


def row(
    coding: str, num_bytes: float, wanted: np.ndarray, got: np.ndarray, seconds: float
) -> tables.Row:
    """Compare views uint8 [n, R, R, 3] with what a coding gives back."""
    squared = (wanted.astype(np.float64) - got).reshape(len(wanted), -1) ** 2
    with np.errstate(divide="ignore"):
        found, worst = 10 * np.log10(255**2 / np.array([squared.mean(), squared.mean(1).max()]))
    return {
        "coding": coding,
        "of_raw": num_bytes / wanted.nbytes,
        "psnr_db": float(found),
        "worst_db": float(worst),
        "decode_ms": seconds * 1e3,
        "views_a_core": 1 / seconds,
    }


def of_file(coding: str, settings: dict[str, Any], wanted: np.ndarray) -> tables.Row:
    """Code views as image files, each by itself."""
    files = []
    for view in wanted:
        file = io.BytesIO()
        Image.fromarray(view).save(file, **settings)
        files.append(file.getvalue())

    def decoded() -> np.ndarray:
        return np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])

    return row(
        coding,
        sum(map(len, files)),
        wanted,
        decoded(),
        median_seconds(decoded, REPEATS) / len(wanted),
    )


def of_grid(name: str, fitted_on: np.ndarray, wanted: np.ndarray) -> tables.Row:
    """Code views by a grid codec."""
    sample, side = tokens(fitted_on), wanted.shape[1] // PATCH
    moments = Moments.of(sample.flatten(0, 1).numpy())
    stored = moments.count, moments.mean, moments.scatter
    codec = make_codec(default_codec(name), stored, (side, side), sample.numpy())
    encoded, decode = encode(codec, tokens(wanted)), Decoder(codec, None)

    def decoded() -> np.ndarray:
        return pictures(decode(encoded.data, encoded.escapes), wanted.shape[1])

    num_bytes = encoded.bits_per_coefficient(side**2, 3 * PATCH**2) / 8 * wanted.size
    return row(name, num_bytes, wanted, decoded(), median_seconds(decoded, REPEATS) / len(wanted))


def tokens(canvases: np.ndarray) -> torch.Tensor:
    """Cut uint8 [n, R, R, 3] into tokens float32 [n, (R / 16)^2, 768]."""
    pixels = torch.from_numpy(canvases).permute(0, 3, 1, 2).float() + OFFSET
    return torch.nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).contiguous()


def pictures(found: torch.Tensor, side: int) -> np.ndarray:
    """Undo `tokens`, rounding."""
    folded = torch.nn.functional.fold(found.transpose(1, 2), side, PATCH, stride=PATCH) - OFFSET
    return folded.round_().clamp_(0, 255).byte().permute(0, 2, 3, 1).numpy()


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("pixels", __doc__)
    parser.add_argument("--images", type=Path, default=PHOTOGRAPHS, help="a folder of photographs")
    parser.add_argument("--views", type=int, default=20, help="of each photograph")
    parser.add_argument("--resolution", type=int, default=256, help="pixels, a multiple of 16")
    arguments = parser.parse_args(argv)
    paths = sorted(each for each in arguments.images.iterdir() if each.suffix in IMAGE_SUFFIXES)
    if len(paths) < 2 or arguments.resolution % PATCH:
        parser.error("wants two pictures at least, and a resolution that 16 divides")
    torch.set_num_threads(1)
    drawn = partial(views, count=arguments.views, resolution=arguments.resolution)
    fitted_on, wanted = drawn(paths[::2]), drawn(paths[1::2])
    table = [
        row(
            "raw", wanted.nbytes, wanted, wanted, median_seconds(wanted.copy, REPEATS) / len(wanted)
        )
    ]
    table += [of_file(coding, settings, wanted) for coding, settings in FILES.items()]
    table += [of_grid(name, fitted_on, wanted) for name in GRIDS]
    title = f"{len(wanted)} views of {arguments.resolution} px, {platform.machine()}"
    tables.show(table, COLUMNS, title, tables.console(), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
