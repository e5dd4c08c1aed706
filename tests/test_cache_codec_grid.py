"""Grid codecs: what they keep of pictures, their bounds for every finite token, and their bytes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.smooth_pictures import moments_of, pictures
from support.toy_stores import Toy, features, ids, store_spec

from cache.codec.encoded import Fitting
from cache.codec.grid import DISTORTION, RATES, GridCodec, allot, escaping, row_bytes
from cache.codec.known import default_codec, make_codec
from cache.codec.known import row_bytes as known_row_bytes
from cache.codec.quantised import lloyd_max
from cache.errors import Corrupt
from cache.format import layout
from cache.orphans import find
from cache.reader import Reader
from cache.repair import repair_root
from cache.store import open_store
from cache.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "cache_format_1_grid"
"""A root with a grid2 store: `python tests/test_cache_codec_grid.py` made it."""
BOUND_RTOL = 1e-4  # the bound is checked on float32 values when encoding
ORTHONORMAL_ATOL = 1e-4
GAIN_DB = 2.0  # over rotated codecs of a higher rate, of pictures that a grid codec is made for

rates = pytest.mark.parametrize("name", list(RATES))


def fitted(name: str, grid: tuple[int, int], rows: np.ndarray) -> GridCodec:
    codec = make_codec(default_codec(name), moments_of(rows), grid, rows)
    assert isinstance(codec, GridCodec)
    return codec


def relative_error(got: np.ndarray, wanted: np.ndarray, axis=-1) -> np.ndarray:
    wanted = wanted.astype(np.float64)
    size = np.sqrt(np.square(wanted).sum(axis))
    error = np.sqrt(np.square(got - wanted).sum(axis))
    return np.where(error == 0, 0.0, error / np.where(size > 0, size, 1e-300))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def snr(got: np.ndarray, wanted: np.ndarray, std: np.ndarray, mean: np.ndarray) -> float:
    signal = np.square((wanted - mean) / std).sum()
    return float(10 * np.log10(signal / np.square((got - wanted) / std).sum()))


@rates
@pytest.mark.parametrize(("grid", "dim"), [((16, 16), 48), ((5, 7), 96), ((1, 9), 33)])
def test_other_pictures_meet_the_documented_cosine_within_the_bits(name, grid, dim):
    codec = fitted(name, grid, pictures(grid, dim, 64))
    rows = pictures(grid, dim, 8, seed=7)
    encoded = codec.encode(rows)
    decoded = codec.decode(encoded.data, encoded.escapes)
    assert cosine(decoded, rows).mean() >= codec.rate.mean_cosine
    assert encoded.bits_per_coefficient(*rows.shape[1:]) <= codec.rate.bits
    assert relative_error(decoded, rows, axis=(1, 2)).max() <= codec.rate.worst_row_error
    assert encoded.data.shape[1:] == codec.storage_shape(*rows.shape[1:])


@pytest.mark.parametrize(
    ("name", "other"), [("grid2", "rot2"), ("grid3", "rot3"), ("grid4", "rot4")]
)
def test_the_grid_is_worth_its_while(name, other):
    """At no more bits: token by token, nothing is gained from neighbours and directions."""
    grid, dim = (12, 12), 64
    sample, rows = pictures(grid, dim, 64), pictures(grid, dim, 8, seed=7)
    codec, alone = fitted(name, grid, sample), make_codec(default_codec(other), moments_of(sample))
    ours, theirs = (
        snr(each.decode(e.data, e.escapes), rows, codec.transform.std, codec.transform.mean)
        for each in (codec, alone)
        for e in [each.encode(rows)]
    )
    assert ours >= theirs + GAIN_DB


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 8), (7, 5)])
@pytest.mark.parametrize("measured", [10_000, 10])
def test_the_transform_is_orthonormal(grid, measured):
    """With few tokens measured the rotation stands in for directions."""
    rng, dim = np.random.default_rng(0), 24
    rows = rng.standard_normal((6, grid[0] * grid[1], dim)).astype(np.float32)
    _, mean, scatter = moments_of(rng.standard_normal((100, 10, dim)))
    codec = GridCodec.fitted("grid4", Fitting((measured, mean, scatter), grid, rows))
    assert (codec.transform.rotation is None) == (measured == 10_000)
    z = codec.transform.standardised(rows)
    y = codec.transform.coefficients(z)
    np.testing.assert_allclose(np.square(y).sum(), np.square(z).sum(), rtol=1e-5)
    np.testing.assert_allclose(codec.transform.patches(y), rows, atol=ORTHONORMAL_ATOL)


def test_bits_go_where_they_save_most():
    """By hand: of variances 16, 4 and 1, first bits save 10.2, 2.5 and 0.6, second ones 3.9, ..."""
    variance = np.array([16.0, 4.0, 1.0, 0.0])
    assert allot(variance, 1).tolist() == [1, 0, 0, 0]
    assert allot(variance, 2).tolist() == [2, 0, 0, 0]
    assert allot(variance, 4).tolist() == [3, 1, 0, 0]
    assert allot(variance, 10**6).tolist() == [8, 8, 8, 0]
    assert allot(variance, 0).tolist() == [0, 0, 0, 0]


def test_distortions_are_those_of_the_levels():
    x = np.linspace(-9, 9, 200_001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0])
    for bits in range(1, 7):
        levels = lloyd_max(bits)
        nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
        measured = float((np.square(x - nearest) * density).sum())
        assert DISTORTION[bits] == pytest.approx(measured, rel=1e-3)


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=80)
@given(
    name=st.sampled_from(list(RATES)),
    kind=st.sampled_from(
        ["like", "gauss", "tails", "zeros", "outlier", "transform", "any", "constant"]
    ),
    exponent=st.integers(-44, 38),
    grid=st.sampled_from([(1, 1), (2, 3), (4, 4), (5, 3)]),
    dim=st.sampled_from([7, 24]),
    turned=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_the_bounds_hold_for_every_finite_token(
    name, kind, exponent, grid, dim, turned, seed, data
):
    rng, num_tokens = np.random.default_rng(seed), grid[0] * grid[1]
    sample = pictures(grid, dim, 40, seed)
    _, mean, scatter = moments_of(sample)
    codec = GridCodec.fitted(name, Fitting((10_000 if turned else 20, mean, scatter), grid, sample))
    rows = rng.standard_normal((2, num_tokens, dim))
    if kind == "like":
        rows = pictures(grid, dim, 2, seed + 1)
    elif kind == "tails":
        rows = rng.standard_cauchy(rows.shape).clip(-1e6, 1e6)
    elif kind == "zeros":
        rows[0, : num_tokens // 2 + 1] = 0
    elif kind == "outlier":
        rows[0, 0, 0] = 1e6
    elif kind == "transform":
        single = np.zeros((2, num_tokens, dim), np.float32)
        single[:, rng.integers(num_tokens), rng.integers(dim)] = 1
        rows = codec.transform.patches(single)
    elif kind == "any":
        rows[1, 0] = data.draw(st.lists(finite, min_size=dim, max_size=dim))
    elif kind == "constant":
        rows[:] = codec.transform.mean
    largest = np.finfo(np.float32).max
    scale = 1.0 if kind == "any" else 10.0**exponent
    patches = np.clip(rows * scale, -largest, largest).astype(np.float32)
    encoded = codec.encode(patches)
    assert encoded.valid.all()
    got = codec.decode(encoded.data, encoded.escapes)
    slack = 1 + BOUND_RTOL
    assert relative_error(got, patches).max() <= codec.rate.worst_error * slack
    assert relative_error(got, patches, axis=(1, 2)).max() <= codec.rate.worst_row_error * slack
    without = codec.decode(encoded.data)
    assert np.isfinite(without).all()
    spent = encoded.data.nbytes + len(encoded.escapes.row) * 4 * (dim + 1)
    assert encoded.bits_per_coefficient(num_tokens, dim) == pytest.approx(
        8 * spent / (2 * num_tokens * dim)
    )


@rates
def test_a_huge_token_costs_one_escape_and_not_its_row(name):
    grid, dim = (8, 8), 32
    codec = fitted(name, grid, pictures(grid, dim, 64))
    rows = pictures(grid, dim, 3, seed=5)
    calm = codec.encode(rows)
    assert len(calm.escapes.row) == 0
    rows[1, 20] *= 1e5
    encoded = codec.encode(rows)
    assert (encoded.escapes.row.tolist(), encoded.escapes.token.tolist()) == ([1], [20])
    np.testing.assert_array_equal(encoded.data[[0, 2]], calm.data[[0, 2]])


def test_the_worst_tokens_of_a_row_escape_until_its_bound_holds():
    """By hand: each within 0.85^2, together 2.1 of at most 0.65^2 of 4: without 0.6 they are."""
    squared = np.array([[0.5, 0.6, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4], [0.0, 0.8, 0.0, np.nan]])
    size, none = np.ones((3, 4)), np.zeros((3, 4), bool)
    assert escaping(squared, size, none, RATES["grid1"]).tolist() == [
        [False, True, False, False],
        [False] * 4,
        [False, True, False, True],
    ]


def test_rows_that_are_badly_served_as_a_whole_escape_token_by_token():
    """Noise is no picture: each token is within its bound, all together are not within theirs."""
    grid, dim = (8, 8), 32
    codec = fitted("grid1", grid, pictures(grid, dim, 64))
    rng = np.random.default_rng(0)
    noise = (
        rng.standard_normal((2, 64, dim)).astype(np.float32) * codec.transform.std
        + codec.transform.mean
    )
    encoded = codec.encode(noise)
    got = codec.decode(encoded.data, encoded.escapes)
    assert relative_error(got, noise, axis=(1, 2)).max() <= codec.rate.worst_row_error
    plain = codec.decode(encoded.data)
    assert relative_error(plain, noise, axis=(1, 2)).min() > codec.rate.worst_row_error
    assert 0 < len(encoded.escapes.row) < noise[..., 0].size


@rates
def test_rows_that_are_not_finite_are_invalid(name):
    grid = (2, 3)
    codec = fitted(name, grid, pictures(grid, 16, 64))
    rows = pictures(grid, 16, 3, seed=2)
    rows[1, 0, 3] = np.nan
    encoded = codec.encode(rows)
    assert encoded.valid.tolist() == [True, False, True]
    assert encoded.reasons == [None, "patches are not finite", None]
    assert 1 not in encoded.escapes.row
    np.testing.assert_array_equal(encoded.data[0], codec.encode(rows[:1]).data[0])


@rates
@pytest.mark.parametrize("measured", [1000, 10])
def test_what_is_stored_makes_the_same_codec(name, measured):
    grid, dim = (4, 5), 24
    sample = pictures(grid, dim, 40)
    _, mean, scatter = moments_of(sample)
    codec = GridCodec.fitted(name, Fitting((measured, mean, scatter), grid, sample))
    again = GridCodec.from_stored(codec.to_json_dict(), codec.arrays())
    assert again.to_json_dict() == codec.to_json_dict()
    rows = pictures(grid, dim, 4, seed=3)
    ours, theirs = codec.encode(rows), again.encode(rows)
    np.testing.assert_array_equal(ours.data, theirs.data)
    np.testing.assert_array_equal(codec.decode(ours.data), again.decode(ours.data))


def test_a_row_takes_the_same_bytes_whatever_it_is_fitted_to():
    assert known_row_bytes("grid1", 256, 1536) == row_bytes("grid1", 256, 1536) == 48384
    codec = fitted("grid1", (3, 4), pictures((3, 4), 20, 30))
    assert codec.storage_shape(12, 20) == (1, row_bytes("grid1", 12, 20))
    with pytest.raises(ValueError, match="fitted to 12 tokens of 20 channels, not 12 of 21"):
        codec.storage_shape(12, 21)


def test_what_it_is_fitted_to_is_asked_for():
    with pytest.raises(ValueError, match="fitted to whole rows of patches too; give them"):
        make_codec(default_codec("grid1"), moments_of(pictures((2, 2), 4, 9)))
    endless = np.full((3, 4, 5), 1e38, np.float32)
    endless[0, 0] = -1e38
    moments = 100, np.zeros(5), 1e-60 * np.eye(5)
    with pytest.raises(ValueError, match="not finite"):
        make_codec(default_codec("grid1"), moments, (2, 2), endless)


def test_a_store_keeps_fitted_values_in_a_file_of_their_own(tmp_path):
    toy = Toy(tmp_path, "grid2", bad={"a/002": "no image"})
    toy.add_samples(ids(6))
    store = toy.build(num_views=2)
    assert verify(store).problems == []
    assert find(tmp_path, 0).orphans == []
    assert not Toy(tmp_path, "grid2").store().todo(2)
    reader = Reader(store, range(2))
    rows = [5, 0, 2, 4, 0]
    got = reader.select(rows, 1).decoded()
    for place, sample in enumerate(reader.sample_ids(rows)):
        if sample == "a/002":
            assert np.isnan(got[place]).all()
            continue
        wanted, _ = features(sample, 1)
        assert relative_error(got[place], wanted).max() <= RATES["grid2"].worst_error
    said = store.attributes()["eupe"]["codec"]
    assert sorted(said) == ["bands", "fitted", "grid", "name"]
    assert said["fitted"]["file"] == "codec.arrow"
    copies = [layout.codec_file(store.directory / view) for view in ("view-0000", "view-0001")]
    assert {copy.read_bytes() for copy in copies} == {
        layout.codec_file(store.directory).read_bytes()
    }


def test_fitted_values_are_pinned_and_mended_from_a_view(tmp_path):
    toy = Toy(tmp_path, "grid2")
    toy.add_samples(ids(6))
    store = toy.build(num_views=2)
    wanted = Reader(store).select(range(6)).decoded()
    path = layout.codec_file(store.directory)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    layout.codec_file(store.directory / "view-0001").unlink()
    with pytest.raises(Corrupt, match="contents do not match the recorded sha256"):
        open_store(tmp_path, store_spec("grid2")).row_shape  # noqa: B018
    found = verify(open_store(tmp_path, store_spec("grid2"))).problems
    assert [problem.path.parent.name for problem in found] == ["32", "view-0001"]
    assert len(list(repair_root(tmp_path, write=True))) == 2
    again = open_store(tmp_path, store_spec("grid2"))
    assert verify(again).problems == []
    np.testing.assert_array_equal(Reader(again).select(range(6)).decoded(), wanted)


def golden_root(root: Path) -> None:
    """Write the golden root."""
    toy = Toy(root, "grid2")
    toy.add_samples(ids(5))
    toy.build(num_views=1)


def test_the_golden_root_still_reads(tmp_path):
    """Bytes to features, and features to the same bytes, by the values that lie there."""
    store = open_store(GOLDEN, store_spec("grid2"))
    assert verify(store).problems == []
    selected = Reader(store).select(range(5))
    decoded = np.load(GOLDEN / "decoded.npy")
    np.testing.assert_allclose(selected.decoded(), decoded, rtol=0, atol=1e-5)
    patches = np.stack([features(name, 0)[0] for name in ids(5)])
    np.testing.assert_array_equal(store.codec.encode(patches).data, selected.patches())


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    golden_root(GOLDEN)
    made = Reader(open_store(GOLDEN, store_spec("grid2"))).select(range(5))
    np.save(GOLDEN / "decoded.npy", made.decoded())
