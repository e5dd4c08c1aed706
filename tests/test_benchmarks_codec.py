"""The rate-distortion bound of independent tokens, against cases worked out by hand."""

import numpy as np
import pytest

from benchmarks.codec import bound_r2
from cache.codec.known import default_codec, make_codec
from pipelines.caching.quality import quality

RTOL = 1e-6  # bisection to float64, but for the last digits


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.125])
def test_white_tokens_lose_a_quarter_a_bit(bits):
    assert 1 - bound_r2(3.0 * np.eye(5), bits) == pytest.approx(4**-bits, rel=RTOL)


def test_water_is_poured_over_both_channels_or_over_one():
    covariance = np.diag([16.0, 1.0])
    # Both above the water w: (log2(16 / w) + log2(1 / w)) / 4 = bits, so w = 4 / 4^bits.
    assert bound_r2(covariance, 2.0) == pytest.approx(1 - 2 * 0.25 / 17, rel=RTOL)
    # One bit a coefficient: w = 1, the weaker channel has just drowned.
    assert bound_r2(covariance, 1.0) == pytest.approx(1 - 2 / 17, rel=RTOL)
    # Half a bit: all of it to the stronger, log2(16 / w) / 4 = 0.5, so w = 4.
    assert bound_r2(covariance, 0.5) == pytest.approx(1 - 5 / 17, rel=RTOL)


def test_correlation_is_worth_bits_and_no_codec_of_single_tokens_passes_the_bound():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((16, 16))
    tokens = (rng.standard_normal((20_000, 16)) @ mixing).astype(np.float32)
    covariance = np.cov(tokens.T, bias=True)
    alone = np.diag(np.diag(covariance))
    moments = len(tokens), tokens.mean(0).astype(np.float64), covariance * len(tokens)
    for name in ("rot2", "rot3", "rot4", "int8"):
        kept = quality(make_codec(default_codec(name), moments), tokens[None])
        best = bound_r2(covariance, kept.bits_per_coefficient)
        assert kept.r2 < best
        assert bound_r2(alone, kept.bits_per_coefficient) < best
