"""The codecs there are, by name, and how a spec becomes one (law 10).

A codec undoes itself: decoding returns the teacher's features. What the loss wants of them (a
normaliser) is another matter (law 9).

Another codec is one file beside this one, with its `KINDS`, and its line in `KNOWN`. Its twin in
torch has a line in `pipelines.features.codec_torch.TWINS`; a codec without one is slower there.
"""

from collections.abc import Mapping

import numpy as np

from cache.codec import grid as grids
from cache.codec import nothing, plain, quantised
from cache.codec.encoded import Arrays, Codec, Fitting, Floats, Kind, Moments
from eupe.errors import BadInput
from eupe.spec import CodecSpec

KNOWN: dict[str, Kind] = {
    **plain.KINDS,
    **quantised.KINDS,
    **grids.KINDS,
    **nothing.KINDS,
}
"""Every codec by name."""
OF_PATCHES = [name for name in KNOWN if name not in nothing.KINDS]
"""Those of which a student can learn: they keep patches."""
OF = " of "
"""Between a codec and that of the store that its features were taken from: rot4 of float16."""
ROUNDED = "rounded"
"""The fit rule of a derived codec that is fitted to nothing."""


def kind(name: str) -> Kind:
    """Return what is known of a codec before it is fitted to a store.

    Raises:
        BadInput: no codec has that name.
    """
    own, _, source = name.partition(OF)
    if own not in KNOWN:
        raise BadInput(f"codec = {name!r}: wants one of {', '.join(KNOWN)}")
    if source:
        kind(source)
    return KNOWN[own]


def default_codec(name: str) -> CodecSpec:
    """Return the spec of a codec by name, with the rule that fits its scaling.

    Args:
        name: of a codec, or of a derived one, as "rot4 of float16".

    Raises:
        BadInput: no codec has that name.
    """
    own, of, source = name.partition(OF)
    rule = kind(name).fit
    return CodecSpec(name=own, fit=f"{rule or ROUNDED}{of}{source}" if of else rule)


def source_of(spec: CodecSpec) -> str | None:
    """Return the codec that a derived one's features were taken from; None if from the teacher."""
    return (spec.fit or "").partition(OF)[2] or None


def name_of(spec: CodecSpec) -> str:
    """Return the name that `default_codec` makes a spec of."""
    source = source_of(spec)
    return spec.name if source is None else f"{spec.name}{OF}{source}"


def make_codec(
    spec: CodecSpec,
    moments: Moments | None = None,
    grid: tuple[int, int] | None = None,
    rows: Floats | None = None,
) -> Codec:
    """Build the codec of a spec, fitted to what was measured of the patches where it is fitted.

    Args:
        spec: name and fit rule.
        moments: of the patches: count, mean [D], scatter [D, D]; plain dtypes need none.
        grid: (H, W) of a row's tokens.
        rows: float32 [r, N, D], whole rows of the sample; few codecs need them (`Kind.of_rows`).

    Raises:
        ValueError: the fit rule is not the codec's, or what it is fitted to is not given.
    """
    _check_fit(spec)
    if kind(spec.name).fit is not None and moments is None:
        raise ValueError(f"codec {spec.name}: is fitted to the moments of the patches; give them")
    if kind(spec.name).of_rows and (grid is None or rows is None):
        raise ValueError(f"codec {spec.name}: is fitted to whole rows of patches too; give them")
    return kind(spec.name).fitted(Fitting(moments, grid, rows))


def stored_codec(spec: CodecSpec, said: Mapping[str, object], arrays: Arrays) -> Codec:
    """Return the codec that a store was created with, from what its files say of it.

    Args:
        spec: name and fit rule.
        said: of it, in spec.json.
        arrays: `Codec.arrays`, from codec.arrow; none where there is no such file.

    Raises:
        ValueError: the fit rule is not the codec's.
    """
    _check_fit(spec)
    return kind(spec.name).stored(said, arrays)


def _check_fit(spec: CodecSpec) -> None:
    rule = default_codec(name_of(spec)).fit
    if spec.fit != rule:
        raise BadInput(f"codec {spec.name}: fit = {spec.fit!r}, this version knows {rule!r}")


def row_bytes(name: str, num_tokens: int, dim: int) -> int:
    """Return the bytes of one row of N tokens [D] in a codec that is not fitted yet.

    Raises:
        ValueError: no codec has that name.
    """
    spec, cheap = default_codec(name), kind(name).row_bytes
    if cheap is not None:
        return cheap(num_tokens, dim)
    unit = None if spec.fit is None else (2, np.zeros(dim), np.eye(dim))
    codec = make_codec(spec, unit)
    return int(np.prod(codec.storage_shape(num_tokens, dim))) * codec.storage_dtype.itemsize
