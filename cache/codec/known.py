"""The codecs there are, by name, and how a spec becomes one (law 10).

A codec undoes itself: decoding returns the teacher's features. What the loss wants of them (a
normaliser) is another matter (law 9).

Another codec is one file beside this one, with its `KINDS`, and its line in `KNOWN`. Its twin in
torch has a line in `pipelines.features.codec_torch.TWINS`; a codec without one is slower there.
"""

from collections.abc import Mapping

import numpy as np

from cache.codec import plain, quantised
from cache.codec.encoded import Codec, Kind, Moments
from eupe.errors import BadInput
from eupe.spec import CodecSpec

KNOWN: dict[str, Kind] = {**plain.KINDS, **quantised.KINDS}
"""Every codec by name."""


def kind(name: str) -> Kind:
    """Return what is known of a codec before it is fitted to a store.

    Raises:
        BadInput: no codec has that name.
    """
    if name not in KNOWN:
        raise BadInput(f"codec = {name!r}: wants one of {', '.join(KNOWN)}")
    return KNOWN[name]


def default_codec(name: str) -> CodecSpec:
    """Return the spec of a codec by name, with the rule that fits its scaling.

    Raises:
        BadInput: no codec has that name.
    """
    return CodecSpec(name=name, fit=kind(name).fit)


def make_codec(spec: CodecSpec, moments: Moments | None = None) -> Codec:
    """Build the codec of a spec, fitted to the moments of the patches where it is fitted.

    Args:
        spec: name and fit rule.
        moments: of the patches: count, mean [D], scatter [D, D]; plain dtypes need none.

    Raises:
        ValueError: the fit rule is not the codec's, or moments are needed and not given.
    """
    _check_fit(spec)
    if spec.fit is not None and moments is None:
        raise ValueError(f"codec {spec.name}: is fitted to the moments of the patches; give them")
    return kind(spec.name).fitted(moments)


def stored_codec(spec: CodecSpec, said: Mapping[str, object]) -> Codec:
    """Return the codec that a store was created with, from what its spec.json says of it.

    Raises:
        ValueError: the fit rule is not the codec's.
    """
    _check_fit(spec)
    return kind(spec.name).stored(said)


def _check_fit(spec: CodecSpec) -> None:
    rule = default_codec(spec.name).fit
    if spec.fit != rule:
        raise BadInput(f"codec {spec.name}: fit = {spec.fit!r}, this version knows {rule!r}")


def row_bytes(name: str, num_tokens: int, dim: int) -> int:
    """Return the bytes of one row of N tokens [D] in a codec that is not fitted yet.

    Raises:
        ValueError: no codec has that name.
    """
    spec = default_codec(name)
    unit = None if spec.fit is None else (2, np.zeros(dim), np.eye(dim))
    codec = make_codec(spec, unit)
    return int(np.prod(codec.storage_shape(num_tokens, dim))) * codec.storage_dtype.itemsize
