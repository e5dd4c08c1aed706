"""Lossy codecs on a teacher's features: measured before a store is made, refused, trained on."""

import numpy as np
import pytest
import torch
from support import small_caches, small_run

from cache.codec.known import default_codec, make_codec
from cache.codec.quantised import QUANTISATIONS
from cache.listing import describe
from cache.reader import Reader
from cache.store import find_stores
from cache.verify import verify
from eupe.moments import Moments
from pipelines.caching import indexing, precompute
from pipelines.caching.extractor import Measured, Output
from pipelines.caching.quality import quality
from pipelines.machines.in_process import InProcess
from pipelines.recipe.named import by_name
from pipelines.recipe.stores import cache_jobs, open_stores
from pipelines.records import tracking
from pipelines.training import inputs
from pipelines.training.loop import train_stage

pytestmark = pytest.mark.slow

DIM = 1280  # EfficientNet-Lite0's
ROT4_LOSS_RTOL = 0.02
"""Tokens of cosine 0.994 are 0.11 of their length away, in a direction the student cannot learn:
a loss of 1 - cosine moves by at most 1 - 0.994 = 0.006, of losses that start near 1."""


def two_kinds(ratio: float, count: int = 600) -> np.ndarray:
    """Tokens [count, DIM] that live in one half of the channels or in the other.

    The codec spreads a token's error over all channels; where the other half's are `ratio` times
    as strong, so is its share of the error, and the token's cosine suffers.
    """
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((count, 2, DIM // 2)).astype(np.float32)
    tokens[: count // 2, 0], tokens[count // 2 :, 1] = 0, 0
    tokens[:, 1] *= ratio
    return tokens.reshape(count, DIM)


class HandedOut:
    """An extractor that found these tokens in every chunk of samples."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def measure(self, _where, _views, _chunk, outputs, *_) -> dict[Output, Measured]:
        moments = Moments.of(self._tokens)
        return dict.fromkeys(outputs, Measured(moments, moments, self._tokens))


@pytest.mark.parametrize(
    ("codec", "ratio", "serves"),
    [("rot2", 1.61, "rot4"), ("rot2", 2.5, "int8"), ("rot3", 2.5, "int8")],
)
def test_a_teacher_that_its_codec_serves_badly_is_refused(codec, ratio, serves, tmp_path, emoji):
    source = small_caches.write_parquet(
        tmp_path / "images.parquet", small_caches.pictures(emoji, 8)
    )
    teachers = (small_caches.teacher(codec=codec),)
    job = small_caches.job(tmp_path / "root", source, teachers=teachers)
    indexing.index_samples(job)
    documented = QUANTISATIONS[codec].mean_cosine
    wanted = (
        rf"teacher lite0 at 64 px: codec {codec} keeps a mean cosine of 0\.\d+ on 600 of its "
        rf"tokens, below the {documented:g} it documents; {serves} \(0\.99\d+\) would serve"
    )
    with pytest.raises(ValueError, match=wanted):
        precompute.resolve_stores(job, InProcess(HandedOut(two_kinds(ratio))))
    assert not find_stores(tmp_path / "root")
    precompute.resolve_stores(job, InProcess(HandedOut(two_kinds(1.0))))  # a better teacher
    assert len(find_stores(tmp_path / "root")) == 1


def test_quality_of_a_codec_that_keeps_everything_is_perfect():
    tokens = two_kinds(1.0, 40)
    tokens[3] = 0
    found = quality(make_codec(default_codec("float32")), tokens[None])
    assert (found.cosine, found.cosine_worst, found.r2) == pytest.approx((1, 1, 1))
    assert (found.bits_per_coefficient, found.tokens) == (32, 40)


def test_quality_is_what_numpy_says_of_the_oracle():
    tokens = two_kinds(1.5)
    moments = Moments.of(tokens)
    codec = make_codec(default_codec("rot3"), (moments.count, moments.mean, moments.scatter))
    encoded = codec.encode(tokens[None])
    got = codec.decode(encoded.data, encoded.escapes)[0].astype(np.float64)
    cosine = (got * tokens).sum(1) / np.linalg.norm(got, axis=1) / np.linalg.norm(tokens, axis=1)
    lost, spread = np.square(got - tokens).sum(), np.square(tokens - moments.mean).sum()
    found = quality(codec, tokens[None])
    assert found.cosine == pytest.approx(cosine.mean(), abs=1e-5)
    assert found.cosine_worst == pytest.approx(cosine.min(), abs=1e-5)
    assert found.r2 == pytest.approx(1 - lost / spread, abs=1e-5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same small run from a float32 cache and from a rot4 one."""
    built = {}
    for codec in ("float32", "rot4"):
        directory = tmp_path_factory.mktemp(codec)
        whole = small_run.recipe(directory)
        teachers = by_name(small_caches.teacher(codec=codec))
        extraction = whole.extraction.model_copy(update={"moments_samples": 32})
        run = whole.model_copy(update={"teachers": teachers, "extraction": extraction})
        small_run.build(run, directory)
        built[codec] = run
    return built


def test_a_rot4_store_is_sound_and_says_what_it_keeps(runs):
    for job in cache_jobs(runs["rot4"]):
        (store,) = open_stores(job)
        assert not verify(store).problems
        said = describe(store.directory)["provenance"]["codec_quality"]
        assert said["codec"] == "rot4"
        assert QUANTISATIONS["rot4"].mean_cosine <= said["cosine"] <= 1
        assert said["cosine_worst"] <= said["cosine"]
        assert 0.9 < said["r2"] < 1
        assert 4 < said["bits_per_coefficient"] < 4.2
        assert said["tokens"] > 0


def test_a_rot4_store_keeps_the_features_of_a_float32_one(runs):
    readers = [
        Reader(open_stores(cache_jobs(run)[0])[0], range(2))
        for run in (runs["float32"], runs["rot4"])
    ]
    rows, views = np.arange(32), np.arange(32) % 2
    exact, lossy = (reader.select(rows, views).decoded().reshape(-1, DIM) for reader in readers)
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(exact), torch.tensor(lossy))
    assert cosine.mean() >= QUANTISATIONS["rot4"].mean_cosine
    np.testing.assert_array_equal(  # summaries are never quantised
        *(reader.select(rows, views).summaries for reader in readers)
    )


def test_a_student_trains_from_rot4_as_from_float32(runs, tmp_path):
    losses = {}
    for codec, run in runs.items():
        stage = run.stage("stage2").model_copy(update={"log_every": 1})
        train_stage(run, stage, inputs.from_caches(run, stage), tmp_path / codec)
        lines = tracking.read(tmp_path / codec / tracking.METRICS_FILE)
        losses[codec] = [line["loss/total"] for line in lines if "loss/total" in line]
    assert losses["rot4"][-1] < losses["rot4"][0]
    assert losses["rot4"] != losses["float32"]
    np.testing.assert_allclose(losses["rot4"], losses["float32"], rtol=ROT4_LOSS_RTOL)
