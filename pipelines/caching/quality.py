"""What a lossy codec costs a teacher: measured on tokens of its own before a store is made.

A codec documents the mean cosine it keeps (`cache.codec.encoded.Kind`). Features that it
serves worse would train students on something else than the teacher says, so the build refuses
them.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch

from cache.codec.encoded import Codec
from cache.codec.known import KNOWN, default_codec, kind, make_codec
from eupe.errors import BadInput
from eupe.spec import StoreSpec
from pipelines.caching.measure import Sample
from pipelines.features.codec_torch import Decoder, encode

DIGITS = 6  # kept in provenance


@dataclass(frozen=True)
class Quality:
    """How decoded tokens compare with the teacher's, escapes included.

    Attributes:
        codec: its name.
        cosine: mean over tokens.
        cosine_worst: smallest of any token.
        r2: 1 - squared error / squared deviation from the mean token, over all coefficients.
        bits_per_coefficient: spent, scales and escapes included.
        tokens: measured on so many.
    """

    codec: str
    cosine: float
    cosine_worst: float
    r2: float
    bits_per_coefficient: float
    tokens: int

    def to_json_dict(self) -> dict[str, object]:
        """Plain data, figures rounded."""
        return {
            name: round(value, DIGITS) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def quality(codec: Codec, patches: np.ndarray) -> Quality:
    """Encode and decode patches float32 [n, N, D] and compare."""
    features = torch.from_numpy(np.ascontiguousarray(patches, np.float32))
    encoded = encode(codec, features)
    decoded = Decoder(codec)(encoded.data, encoded.escapes).flatten(0, 1).double()
    wanted = features.flatten(0, 1).double()
    cosine = torch.nn.functional.cosine_similarity(decoded, wanted)
    # Zero tokens have no direction; those that come back as zeros are right.
    cosine = torch.where((decoded == wanted).all(1), 1.0, cosine)
    deviation = (wanted - wanted.mean(0)).square().sum()
    return Quality(
        codec=codec.name,
        cosine=float(cosine.mean()),
        cosine_worst=float(cosine.min()),
        r2=float(1 - (decoded - wanted).square().sum() / deviation.clamp_min(1e-300)),
        bits_per_coefficient=encoded.bits_per_coefficient(*patches.shape[1:]),
        tokens=len(wanted),
    )


def check(spec: StoreSpec, sample: Sample) -> Quality | None:
    """Measure the codec of a store that is to be made; None for plain codecs.

    Raises:
        BadInput: the mean cosine is below what the codec documents, with the figure and the
            codec that would serve.
    """
    name = spec.codec.name
    documented = kind(name).mean_cosine
    if documented is None:
        return None
    found = _tried(name, spec.grid, sample)
    if found.cosine < documented:
        raise BadInput(
            f"teacher {spec.teacher.name} at {spec.resolution} px: codec {name} keeps a mean "
            f"cosine of {found.cosine:.4f} on {found.tokens} of its tokens, below the "
            f"{documented:g} it documents; "
            f"{_that_serves(kind(name).bits, spec.grid, sample)} would serve"
        )
    return found


def _tried(name: str, grid: tuple[int, int], sample: Sample) -> Quality:
    """Measure a codec on a store's own sample.

    One that is fitted to whole rows is judged on others: fitted to every other one.
    """
    fitted_on, spec = sample.moments["patches"], default_codec(name)
    if not kind(name).of_rows:
        return quality(make_codec(spec, fitted_on), sample.tokens[None])
    rows = sample.rows
    if rows is None or len(rows) < 2:
        raise BadInput(f"codec {name}: is fitted to whole pictures, wants at least 2")
    return quality(make_codec(spec, fitted_on, grid, rows[::2]), rows[1::2])


def _that_serves(bits: float, grid: tuple[int, int], sample: Sample) -> str:
    """Name the narrowest wider codec that keeps what it documents, with its figure."""
    wider = [
        (each.bits, name, each.mean_cosine)
        for name, each in KNOWN.items()
        if each.mean_cosine is not None
        and each.bits > bits
        and not (each.of_rows and sample.rows is None)
    ]
    for _, name, documented in sorted(wider):
        cosine = _tried(name, grid, sample).cosine
        if cosine >= documented:
            return f"{name} ({cosine:.4f})"
    return "float16"
