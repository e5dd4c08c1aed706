"""Moments and normalisers: merging, z-score, PHI-S's equal variances, and the way back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eupe.hadamard import hadamard
from eupe.moments import Moments, merge, mixed
from eupe.normalise import phi_s, zscore

MERGE = {"rtol": 1e-9, "atol": 1e-9}  # float64 sums in another order
ORTHOGONAL = 1e-10  # float64, sums of up to 4096 products
# float32 tokens of condition number 1e3 through a rotation and back.
ROUND_TRIP = {"rtol": 1e-4, "atol": 1e-4}
VARIANCE = 1e-3  # of float32 normalised tokens, 4096 of them


def tokens(n: int, d: int, seed: int = 0) -> np.ndarray:
    """Correlated float32 tokens [n, d] with unequal variances and means, as teachers give."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(d, d)) * np.geomspace(0.03, 30, d)
    return (rng.normal(size=(n, d)) @ mixing + rng.normal(size=d) * 5).astype(np.float32)


def test_moments_are_those_of_the_tokens():
    x = tokens(50, 6)
    moments = Moments.of(x)
    assert moments.count == 50
    np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), **MERGE)
    np.testing.assert_allclose(
        moments.covariance(), np.cov(x.astype(np.float64).T, bias=True), **MERGE
    )
    np.testing.assert_allclose(moments.std(), x.astype(np.float64).std(0), **MERGE)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_in_any_order_equals_measuring_at_once(sizes, random):
    x = tokens(sum(sizes), 4)
    parts = [Moments.of(part) for part in np.split(x, np.cumsum(sizes)[:-1])]
    random.shuffle(parts)
    while len(parts) > 1:
        parts.append(merge(parts.pop(), parts.pop(0)))
    whole = Moments.of(x)
    assert parts[0].count == whole.count
    np.testing.assert_allclose(parts[0].mean, whole.mean, **MERGE)
    np.testing.assert_allclose(
        parts[0].scatter, whole.scatter, rtol=1e-9, atol=1e-9 * abs(whole.scatter).max()
    )


def test_a_large_mean_does_not_cancel():
    x = np.random.default_rng(0).normal(size=(1000, 2)) + 1e6
    halves = merge(Moments.of(x[:300]), Moments.of(x[300:]))
    np.testing.assert_allclose(halves.std(), x.std(0), rtol=1e-9)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros((0, 3)), "n > 0"),
        (np.zeros(3), r"\[n, D\]"),
        (np.array([[1.0, np.nan], [0, 0]]), "1 of 2 tokens are not finite"),
    ],
)
def test_bad_tokens_are_refused(bad, reason):
    with pytest.raises(ValueError, match=reason):
        Moments.of(bad)


@pytest.mark.parametrize("sizes", [(40, 40), (5, 400)])
def test_a_mixture_counts_sets_by_their_draws_and_not_by_what_was_measured(sizes):
    """Drawn tokens, nine of the first for one of the second, have those moments."""
    rng = np.random.default_rng(3)
    sets = [rng.normal(place, 1 + place, (n, 3)) for place, n in enumerate(sizes)]
    drawn = np.concatenate([np.repeat(sets[0], 9 * sizes[1], 0), np.repeat(sets[1], sizes[0], 0)])
    found = mixed([Moments.of(each) for each in sets], [0.9, 0.1])
    np.testing.assert_allclose(found.mean, drawn.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(drawn.T, ddof=0), rtol=1e-10)
    assert found.count == sum(sizes)


def test_one_set_is_its_own_mixture_to_the_bit():
    only = Moments.of(np.random.default_rng(0).normal(size=(7, 2)))
    assert mixed([only], [1.0]) is only


def test_different_widths_do_not_merge():
    with pytest.raises(ValueError, match="widths 2 and 3"):
        merge(Moments.of(np.zeros((1, 2))), Moments.of(np.zeros((1, 3))))


def test_zscore_gives_mean_zero_and_std_one():
    x = tokens(4096, 12)
    y = zscore(Moments.of(x))(torch.from_numpy(x)).double()
    assert y.mean(0).abs().max() < VARIANCE
    assert (y.std(0, correction=0) - 1).abs().max() < VARIANCE


def test_zscore_of_a_constant_coordinate_stays_finite():
    x = tokens(64, 3)
    x[:, 1] = 4.0
    normaliser = zscore(Moments.of(x))
    y = normaliser(torch.from_numpy(x))
    assert (y[:, 1] == 0).all()
    alive_elsewhere = torch.from_numpy(x[:1]) + torch.tensor([0.0, 1.0, 0.0])
    widest = float(Moments.of(x).std().max())
    assert normaliser(alive_elsewhere)[0, 1].item() == pytest.approx(1 / widest, rel=1e-5)
    assert normaliser.inverse(y).isfinite().all()
    assert zscore(Moments.of(x[:1]))(torch.from_numpy(x[:1])).isfinite().all()


@pytest.mark.parametrize("width", [8, 12, 20, 48, 112, 120])
def test_phi_s_gives_equal_variances_of_one(width):
    x = tokens(4096, width)
    moments = Moments.of(x)
    y = Moments.of(phi_s(moments)(torch.from_numpy(x)).numpy())
    assert np.abs(y.mean).max() < VARIANCE
    assert np.abs(np.diag(y.covariance()) - 1).max() < VARIANCE
    # The z-score equalises by stretching; PHI-S keeps the shape: one scale and a rotation.
    spectrum = np.linalg.eigvalsh(moments.covariance())
    np.testing.assert_allclose(
        np.linalg.eigvalsh(y.covariance()), spectrum / spectrum.mean(), atol=VARIANCE
    )


@pytest.mark.parametrize("kind", [zscore, phi_s])
def test_undoing_gives_the_features_back(kind):
    x = torch.from_numpy(tokens(256, 24)).view(4, 8, 8, 24)
    normaliser = kind(Moments.of(x.flatten(0, 2).numpy()))
    y = normaliser(x)
    assert y.shape == x.shape
    assert not torch.allclose(y, x)
    torch.testing.assert_close(normaliser.inverse(y), x, **ROUND_TRIP)


def test_a_normaliser_is_rebuilt_from_its_tensors():
    x = torch.from_numpy(tokens(64, 8))
    for kind in (zscore, phi_s):
        ours = kind(Moments.of(x.numpy()))
        state = ours.state_dict()
        again = type(ours)(state["mean"], state["scale"], state.get("rotation"))
        assert torch.equal(ours(x), again(x))


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 28, 36, 112, 192, 320, 768, 1152, 1280, 1536])
def test_hadamard_is_orthogonal_with_equal_magnitudes(order):
    matrix = hadamard(order)
    assert np.abs(matrix @ matrix.T - np.eye(order)).max() < ORTHOGONAL
    assert np.abs(np.abs(matrix) - order**-0.5).max() < ORTHOGONAL


@pytest.mark.parametrize("order", [0, 3, 10, 52])
def test_an_order_out_of_reach_is_refused(order):
    with pytest.raises(ValueError, match=f"order {order}"):
        hadamard(order)
