"""Bounds of what codecs keep, against cases worked out by hand and against codecs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import saved_run, small_recipe

from benchmarks import codec
from benchmarks.codec_bounds import (
    cosines,
    grid_variances,
    scalar_r2,
    tokens_r2,
    uniform_quantiser,
    water_filled_r2,
)
from cache.codec.known import default_codec, make_codec
from pipelines.caching.quality import quality

RTOL = 1e-6  # bisection to float64, but for the last digits


@pytest.mark.parametrize("bits", [1.0, 2.0, 4.125])
def test_white_tokens_lose_a_quarter_a_bit(bits):
    assert 1 - tokens_r2(3.0 * np.eye(5), bits) == pytest.approx(4**-bits, rel=RTOL)


def test_water_is_poured_over_both_channels_or_over_one():
    covariance = np.diag([16.0, 1.0])
    # Both above the water w: (log2(16 / w) + log2(1 / w)) / 4 = bits, so w = 4 / 4^bits.
    assert tokens_r2(covariance, 2.0) == pytest.approx(1 - 2 * 0.25 / 17, rel=RTOL)
    # One bit a coefficient: w = 1, the weaker channel has just drowned.
    assert tokens_r2(covariance, 1.0) == pytest.approx(1 - 2 / 17, rel=RTOL)
    # Half a bit: all of it to the stronger, log2(16 / w) / 4 = 0.5, so w = 4.
    assert tokens_r2(covariance, 0.5) == pytest.approx(1 - 5 / 17, rel=RTOL)


def test_correlation_is_worth_bits_and_no_codec_of_single_tokens_passes_the_bound():
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((16, 16))
    tokens = (rng.standard_normal((20_000, 16)) @ mixing).astype(np.float32)
    covariance = np.cov(tokens.T, bias=True)
    alone = np.diag(np.diag(covariance))
    moments = len(tokens), tokens.mean(0).astype(np.float64), covariance * len(tokens)
    for name in ("rot2", "rot3", "rot4", "int8"):
        kept = quality(make_codec(default_codec(name), moments), tokens[None])
        best = tokens_r2(covariance, kept.bits_per_coefficient)
        assert kept.r2 < best
        assert tokens_r2(alone, kept.bits_per_coefficient) < best


def test_what_the_grid_has_in_common_is_worth_bits():
    """By hand: of a 2 x 1 grid with correlation 0.6, the mean has variance 1.6, the rest 0.4."""
    rng = np.random.default_rng(0)
    pair = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 200_000)
    rows = pair.reshape(-1, 2, 1, 1)
    variances = grid_variances(rows, np.zeros(1), np.eye(1))
    np.testing.assert_allclose(variances, [[1.6], [0.4]], rtol=0.02)
    # Half a bit each: all of it to the mean, 0.5 log2(1.6 / w) / 2 = 0.5, so w = 0.4.
    assert water_filled_r2(np.array([1.6, 0.4]), 0.5) == pytest.approx(1 - 0.8 / 2, rel=RTOL)
    np.testing.assert_allclose(cosines(3) @ cosines(3).T, np.eye(3), atol=1e-12)


def test_rounding_with_ideal_entropy_coding_loses_a_quarter_of_a_bit():
    """At high rates pi e / 6 of the squared error (Gish and Pierce 1968), 0.2546 bits."""
    entropy, distortion = uniform_quantiser(0.05)
    assert entropy == pytest.approx(np.log2(np.sqrt(2 * np.pi * np.e) / 0.05), abs=1e-3)
    assert distortion == pytest.approx(0.05**2 / 12, rel=1e-3)
    for bits in (2.0, 4.0):
        loss = (1 - scalar_r2(np.ones(3), bits)) * 4**bits
        assert loss == pytest.approx(np.pi * np.e / 6, rel=0.03)
    variances = np.array([4.0, 1.0, 0.01, 0.0])
    for bits in (0.25, 1.0, 3.0):
        assert scalar_r2(variances, bits) < water_filled_r2(variances, bits)


def test_codecs_are_measured_on_a_recipes_teacher_and_on_any_model(tmp_path: Path, emoji: Path):
    recipe = saved_run.recipe(tmp_path, emoji, small_recipe.vit())
    saved_run.saved(recipe)
    pixels = torch.zeros(1, 3, 64, 64)
    for named in ("demo:efficientnet_lite0", str(recipe.directory)):
        assert codec.teacher_of(named)(pixels).patches.isfinite().all()


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("demo:dinov3", "--teacher demo:dinov3: demo has efficientnet_lite0, efficientnet_lite2"),
        ("runs/nothing", "no model 'runs/nothing': wants a run directory"),
    ],
)
def test_who_is_nobody_is_refused_in_a_sentence(named, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        codec.main(["--teacher", named])
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
