"""Codecs on the device agree with the numpy oracle, normaliser fused or not, and reuse buffers."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.devices import devices
from support.smooth_pictures import token_error

from cache.codec.known import default_codec, make_codec
from cache.codec.plain import PlainCodec
from cache.codec.quantised import QUANTISATIONS, unpack
from eupe.moments import Moments
from eupe.normalise import Normaliser, phi_s, zscore
from pipelines.features import codec_torch
from pipelines.features.buffers import Buffers, Crossing
from pipelines.features.codec_torch import Decoder, encode

PLAIN = ("float32", "float16", "bfloat16")
FLOAT16_STEP = 2.0**-10
"""Relative; of the token's root mean square, as rounding errors of a rotation spread over it."""
FUSED_RTOL = 1e-4  # composed modules: a float64 product of affine maps against two in float32
SAME_CODES = 0.9999  # coefficients within float32 rounding of an edge between two codes are rare
BOUND_RTOL = 1e-4  # the bound is checked in float32 arithmetic
WIDTHS = [7, 24, 120, 192, 768, 1280]

quantised = pytest.mark.parametrize("name", list(QUANTISATIONS))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks even in a small test."""
    monkeypatch.setattr(codec_torch, "CPU_CHUNK", 4096)


def features(dim: int, seed: int = 0, shape: tuple[int, ...] = (3, 10)) -> np.ndarray:
    """Patches with channels of different spread and some heavy tails."""
    rng = np.random.default_rng(seed)
    spread, mean = np.exp(rng.standard_normal(dim)), 3 * rng.standard_normal(dim)
    return (rng.standard_t(4, (*shape, dim)) * spread + mean).astype(np.float32)


def moments_of(patches: np.ndarray) -> Moments:
    return Moments.of(patches.reshape(-1, patches.shape[-1]))


def oracle_of(name: str, patches: np.ndarray):
    found = moments_of(features(patches.shape[-1], 9, (20, 40)))
    return make_codec(default_codec(name), (found.count, found.mean, found.scatter))


@devices
@quantised
@pytest.mark.parametrize("dim", WIDTHS)
def test_decoding_is_the_oracle(name, dim, device):
    patches = features(dim)
    oracle = oracle_of(name, patches)
    encoded = oracle.encode(patches)
    ours = Decoder(oracle)(encoded.data, encoded.escapes, device).cpu().numpy()
    assert ours.shape == patches.shape
    assert token_error(ours, oracle.decode(encoded.data, encoded.escapes)) < FLOAT16_STEP / 8


@settings(max_examples=80)
@example(name="int8", num_rows=1, num_tokens=1, dim=7)
@example(name="rot3", num_rows=1, num_tokens=49, dim=40)
@example(name="rot4", num_rows=0, num_tokens=3, dim=8)
@given(
    name=st.sampled_from([*PLAIN, *QUANTISATIONS]),
    num_rows=st.integers(0, 3),
    num_tokens=st.integers(1, 50),
    dim=st.integers(2, 65),
)
def test_every_shape_is_decoded_and_encoded_as_by_the_oracle(name, num_rows, num_tokens, dim):
    patches = features(dim, shape=(num_rows, num_tokens))
    oracle = oracle_of(name, patches)
    encoded = oracle.encode(patches)
    wanted = oracle.decode(encoded.data, encoded.escapes)
    escapes = encoded.escapes if name in QUANTISATIONS else None
    ours = Decoder(oracle)(encoded.data, escapes).numpy()
    assert ours.shape == wanted.shape == patches.shape
    assert encode(oracle, torch.from_numpy(patches)).data.shape == encoded.data.shape
    if num_rows:
        assert token_error(ours, wanted) < FLOAT16_STEP / 8


@devices
@quantised
@pytest.mark.parametrize("dim", WIDTHS)
def test_encoding_is_the_oracle(name, dim, device):
    patches = features(dim)
    oracle = oracle_of(name, patches)
    theirs, ours = oracle.encode(patches), encode(oracle, torch.from_numpy(patches).to(device))
    assert ours.data.shape == theirs.data.shape
    assert ours.data.dtype == theirs.data.dtype
    split = 10 * oracle.token_bytes
    codes = [
        unpack(e.data.reshape(3, -1)[:, :split].reshape(30, -1), oracle.how.planes, dim)
        for e in (ours, theirs)
    ]
    assert (codes[0] == codes[1]).mean() >= SAME_CODES
    for field in ("row", "token", "values"):
        np.testing.assert_array_equal(getattr(ours.escapes, field), getattr(theirs.escapes, field))
    scales = [
        e.data.reshape(3, -1)[:, split:].copy().view("<f2").astype(float) for e in (ours, theirs)
    ]
    np.testing.assert_allclose(*scales, rtol=FLOAT16_STEP)


@devices
@pytest.mark.parametrize("name", PLAIN)
def test_plain_codecs_are_the_oracle_bit_for_bit(name, device):
    patches = features(24) * 100
    patches[1, 2, 3], patches[2, 0, 0] = 1e6, np.nan
    oracle = make_codec(default_codec(name))
    theirs, ours = oracle.encode(patches), encode(oracle, torch.from_numpy(patches).to(device))
    assert ours.reasons == theirs.reasons
    fine = ours.valid  # what invalid rows hold does not matter: NaNs differ in their spare bits
    assert ours.data[fine].tobytes() == theirs.data[fine].tobytes()
    np.testing.assert_array_equal(ours.valid, theirs.valid)
    decoded = Decoder(oracle)(ours.data, device=device).cpu().numpy()
    np.testing.assert_array_equal(decoded, oracle.decode(theirs.data))


@devices
@pytest.mark.parametrize("normalise", [zscore, phi_s])
@pytest.mark.parametrize("name", [*PLAIN, *QUANTISATIONS])
def test_the_fused_normaliser_is_the_normaliser_afterwards(name, normalise, device):
    patches = features(192)
    patches[0, 3] = 0
    patches[0, 3, 5] = 1e3  # one token for an escape
    oracle, normaliser = oracle_of(name, patches), normalise(moments_of(patches))
    encoded = oracle.encode(patches)
    assert name in PLAIN or len(encoded.escapes.row) or name == "int8"
    ours = Decoder(oracle, normaliser)(encoded.data, encoded.escapes, device).cpu()
    wanted = normaliser.cpu()(torch.from_numpy(oracle.decode(encoded.data, encoded.escapes)))
    if name in PLAIN and device == "cpu":  # a GPU may multiply and add in one rounding
        assert torch.equal(ours, wanted)
    size = float(wanted.square().mean().sqrt())
    torch.testing.assert_close(ours, wanted, rtol=FUSED_RTOL, atol=FUSED_RTOL * size)
    # A normaliser of another kind is applied afterwards, to escapes too.
    apart = Decoder(oracle, torch.nn.Sequential(normaliser))
    apart = apart(encoded.data, encoded.escapes, device).cpu()
    torch.testing.assert_close(apart, wanted, rtol=FUSED_RTOL, atol=FUSED_RTOL * size)


def test_phi_s_with_a_rotated_codec_is_one_dense_product():
    patches = features(192)
    decode = Decoder(oracle_of("rot4", patches), phi_s(moments_of(patches)))
    assert decode._rows._dequantiser is not None
    assert decode._rows._dequantiser.turn.butterfly is None
    assert decode._rows._dequantiser.turn.mix is not None


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(QUANTISATIONS)),
    kind=st.sampled_from(["gauss", "tails", "zeros", "outlier", "constant"]),
    exponent=st.integers(-44, 38),
    dim=st.sampled_from([7, 24, 96]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_bound_holds_for_what_the_device_encoded(name, kind, exponent, dim, seed):
    rng = np.random.default_rng(seed)
    oracle = oracle_of(name, np.empty((1, 1, dim)))
    tokens = rng.standard_normal((2, 3, dim))
    if kind == "tails":
        tokens = rng.standard_cauchy((2, 3, dim)).clip(-1e6, 1e6)
    elif kind == "zeros":
        tokens[:, :2] = 0
    elif kind == "outlier":
        tokens[0, 0, 0] = 1e6
    elif kind == "constant":
        tokens[:] = oracle.mean
    largest = np.finfo(np.float32).max
    patches = np.clip(tokens * 10.0**exponent, -largest, largest).astype(np.float32)
    encoded = encode(oracle, torch.from_numpy(patches))
    assert encoded.valid.all()
    got = Decoder(oracle)(encoded.data, encoded.escapes).numpy().astype(np.float64)
    wanted = patches.astype(np.float64)
    error, size = np.linalg.norm(got - wanted, axis=-1), np.linalg.norm(wanted, axis=-1)
    assert (error <= QUANTISATIONS[name].worst_error * (1 + BOUND_RTOL) * size).all()


@quantised
def test_rows_that_are_not_finite_are_invalid_and_harm_no_other(name):
    patches = features(24)
    oracle = oracle_of(name, patches)
    clean = encode(oracle, torch.from_numpy(patches))
    patches[1, 4, 7] = np.inf
    spoilt = encode(oracle, torch.from_numpy(patches))
    assert spoilt.reasons == [None, "patches are not finite", None]
    assert spoilt.valid.tolist() == [True, False, True]
    assert 1 not in spoilt.escapes.row
    np.testing.assert_array_equal(spoilt.data[[0, 2]], clean.data[[0, 2]])


def test_buffers_come_back_when_the_last_view_of_them_is_gone():
    buffers = Buffers(pinned=False)
    first = buffers.take((4, 6), np.float16)
    first[:] = 1
    place = first.ctypes.data
    kept = first[2:].T  # numpy lets a view outlive the array it was made of
    del first
    gc.collect()
    other = buffers.take((4, 6), np.float16)
    assert other.ctypes.data != place
    other[:] = 2
    assert (kept == 1).all()
    del kept
    gc.collect()
    again = buffers.take((2, 6), np.float32)  # as many bytes
    assert again.ctypes.data == place
    assert again.flags.c_contiguous
    assert again.flags.writeable


@devices
def test_a_buffer_is_not_lent_again_while_it_crosses_to_the_device(device):
    buffers, cross = Buffers(), Crossing()
    there = []
    for value in range(40):
        host = torch.from_numpy(buffers.take((1 << 18,), np.float32))
        assert host.is_pinned() == torch.cuda.is_available()
        host.fill_(value)
        there.append(cross(host, device))
    assert [tensor.device.type for tensor in there] == [device] * 40
    assert [float(tensor.amin()) for tensor in there] == [*range(40)]
    assert [float(tensor.amax()) for tensor in there] == [*range(40)]


class Negated(PlainCodec):
    """A codec that torch knows nothing of."""

    def encode(self, patches):
        return super().encode(-patches)

    def decode(self, data, escapes=None):
        return -super().decode(data)


def test_a_codec_without_a_twin_goes_through_its_oracle():
    patches = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    codec, normaliser = Negated("float32"), Normaliser(torch.ones(4), torch.full((4,), 2.0))
    encoded = encode(codec, torch.from_numpy(patches))
    np.testing.assert_array_equal(encoded.data, -patches)
    decoded = Decoder(codec, normaliser)(encoded.data)
    torch.testing.assert_close(decoded, normaliser(torch.from_numpy(patches)))
