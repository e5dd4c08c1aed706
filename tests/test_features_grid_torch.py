"""Grid codecs on the device agree with the numpy oracle, normaliser fused or not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import devices
from support.smooth_pictures import grid_codec, pictures, token_error

from cache.codec.grid import RATES
from cache.codec.quantised import unpack
from eupe.moments import Moments
from eupe.normalise import phi_s, zscore
from pipelines.features import codec_steps, grid_torch
from pipelines.features.codec_torch import Decoder, encode

FLOAT16_STEP = 2.0**-10
"""Relative; of the token's root mean square, as rounding errors of a transform spread over it."""
FUSED_RTOL = 1e-4
OTHER_BYTES = 0.001  # coefficients within float32 rounding of an edge between two codes are rare
BOUND_RTOL = 1e-4

rates = pytest.mark.parametrize("name", list(RATES))
turns = pytest.mark.parametrize("measured", [10_000, 10], ids=["basis", "rotation"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in a small test."""
    monkeypatch.setattr(grid_torch, "CPU_CHUNK", 4096)


@devices
@rates
@turns
@pytest.mark.parametrize(("grid", "dim"), [((8, 8), 40), ((5, 7), 24), ((1, 3), 96), ((1, 1), 8)])
def test_the_twin_is_the_oracle(name, measured, grid, dim, device):
    oracle = grid_codec(name, grid, dim, measured)
    rows = pictures(grid, dim, 5, seed=3)
    rows[1, 0] *= 1e5  # a token that is taken out
    theirs = oracle.encode(rows)
    ours = encode(oracle, torch.from_numpy(rows).to(device))
    assert ours.data.shape == theirs.data.shape
    assert ours.data.dtype == theirs.data.dtype
    assert (ours.data != theirs.data).sum() <= max(2, OTHER_BYTES * theirs.data.size)
    for field in ("row", "token", "values"):
        np.testing.assert_array_equal(getattr(ours.escapes, field), getattr(theirs.escapes, field))
    decoded = Decoder(oracle)(theirs.data, theirs.escapes, device).cpu().numpy()
    wanted = oracle.decode(theirs.data, theirs.escapes)
    assert token_error(decoded, wanted) < FLOAT16_STEP
    none = Decoder(oracle)(theirs.data[:0])
    assert none.shape == (0, *rows.shape[1:])
    assert encode(oracle, torch.from_numpy(rows[:0])).data.shape == theirs.data[:0].shape


@rates
@turns
@pytest.mark.parametrize("normalise", [zscore, phi_s])
def test_the_fused_normaliser_is_the_normaliser_afterwards(name, measured, normalise):
    grid, dim = (6, 4), 32
    oracle, rows = grid_codec(name, grid, dim, measured), pictures(grid, dim, 4, seed=3)
    normaliser = normalise(Moments.of(rows.reshape(-1, dim)))
    encoded = oracle.encode(rows)
    ours = Decoder(oracle, normaliser)(encoded.data, encoded.escapes)
    wanted = normaliser(torch.from_numpy(oracle.decode(encoded.data, encoded.escapes)))
    size = float(wanted.square().mean().sqrt())
    torch.testing.assert_close(ours, wanted, rtol=FUSED_RTOL, atol=FUSED_RTOL * size)
    apart = Decoder(oracle, torch.nn.Sequential(normaliser))(encoded.data, encoded.escapes)
    torch.testing.assert_close(apart, wanted, rtol=FUSED_RTOL, atol=FUSED_RTOL * size)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(RATES)),
    kind=st.sampled_from(["like", "gauss", "tails", "zeros", "outlier", "constant"]),
    exponent=st.integers(-44, 38),
    grid=st.sampled_from([(1, 1), (2, 3), (4, 4)]),
    dim=st.sampled_from([7, 24]),
    measured=st.sampled_from([10_000, 10]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bounds_hold_for_what_the_device_encoded(
    name, kind, exponent, grid, dim, measured, seed
):
    rng = np.random.default_rng(seed)
    oracle = grid_codec(name, grid, dim, measured, seed)
    rows = rng.standard_normal((2, grid[0] * grid[1], dim))
    if kind == "like":
        rows = pictures(grid, dim, 2, seed + 1)
    elif kind == "tails":
        rows = rng.standard_cauchy(rows.shape).clip(-1e6, 1e6)
    elif kind == "zeros":
        rows[:, : len(rows[0]) // 2 + 1] = 0
    elif kind == "outlier":
        rows[0, 0, 0] = 1e6
    elif kind == "constant":
        rows[:] = oracle.transform.mean
    largest = np.finfo(np.float32).max
    patches = np.clip(rows * 10.0**exponent, -largest, largest).astype(np.float32)
    encoded = encode(oracle, torch.from_numpy(patches))
    assert encoded.valid.all()
    got = Decoder(oracle)(encoded.data, encoded.escapes).numpy().astype(np.float64)
    wanted = patches.astype(np.float64)
    for axis, bound in ((-1, oracle.rate.worst_error), ((1, 2), oracle.rate.worst_row_error)):
        error, size = (np.sqrt(np.square(x).sum(axis)) for x in (got - wanted, wanted))
        assert (error <= bound * (1 + BOUND_RTOL) * size).all()


def test_rows_that_are_not_finite_are_invalid_and_harm_no_other():
    grid, dim = (4, 4), 24
    oracle, rows = grid_codec("grid2", grid, dim), pictures(grid, dim, 3, seed=3)
    clean = encode(oracle, torch.from_numpy(rows))
    rows[1, 4, 7] = np.inf
    spoilt = encode(oracle, torch.from_numpy(rows))
    assert spoilt.reasons == [None, "patches are not finite", None]
    assert spoilt.valid.tolist() == [True, False, True]
    assert 1 not in spoilt.escapes.row
    np.testing.assert_array_equal(spoilt.data[[0, 2]], clean.data[[0, 2]])


def test_codes_are_unpacked_as_they_were_packed_whatever_their_width():
    oracle = grid_codec("grid4", (4, 4), 24)
    data = oracle.encode(pictures((4, 4), 24, 3, seed=3)).data.reshape(3, -1)
    assert len(oracle.packed) >= 6
    for each in oracle.packed:
        planes = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}.get(each.width, (each.width,))
        section = data[:, each.start : each.start + each.num_bytes]
        theirs = unpack(section, planes, len(each.places))
        ours = codec_steps.unpack(torch.from_numpy(section), planes, len(each.places))
        np.testing.assert_array_equal(ours.numpy(), theirs)


@devices
@pytest.mark.parametrize("width", [1, 2, 4])
def test_fields_are_the_same_in_turn_and_at_once(width, device):
    plane = torch.arange(256, dtype=torch.uint8).view(32, 8)[:, :7]
    theirs = codec_steps.fields_in_turn(plane, width)
    assert torch.equal(codec_steps.fields_at_once(plane.to(device), width).cpu(), theirs)
    assert theirs.shape == (32, 7 * 8 // width)
    assert int(theirs.max()) == 2**width - 1
