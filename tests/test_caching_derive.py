"""Derived stores: what they hold, whose identity they have, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from support import small_caches, toy_stores
from support.smooth_pictures import pictures
from support.toy_stores import DATASET, ROWS_PER_SHARD, Toy, features, files_under, ids

from cache.codec.known import default_codec, name_of
from cache.codec.quantised import unpack
from cache.errors import Corrupt, NotBuilt
from cache.reader import Reader
from cache.samples import Samples
from cache.store import Store, open_store
from cache.verify import verify
from eupe.errors import BadInput
from pipelines.caching.derive import _sample, derive
from pipelines.caching.measure import SAMPLE_ROWS

SAME_CODES = 0.99


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy stores of pictures of 8 x 8 tokens, 64 channels."""
    made: dict[tuple[str, int], np.ndarray] = {}

    def own(sample_id: str, view: int) -> tuple[np.ndarray, np.ndarray]:
        if (sample_id, view) not in made:
            seed = int.from_bytes(f"{sample_id} {view}".encode(), "big") % 2**32
            made[sample_id, view] = pictures((8, 8), 64, 1, seed)[0]
        return made[sample_id, view], features(sample_id, view)[1]

    monkeypatch.setattr(toy_stores, "GRID", (8, 8))
    monkeypatch.setattr(toy_stores, "PATCH_DIM", 64)
    monkeypatch.setattr(toy_stores, "features", own)


def built(root: Path, codec: str, bad: dict[str, str] | None = None, count: int = 10) -> Store:
    toy = Toy(root, codec, bad or {})
    toy.add_samples(ids(count))
    return toy.build(num_views=2)


def decoded(store: Store, view: int = 0) -> np.ndarray:
    return Reader(store, [view]).select(range(10), view).decoded()


def test_a_folder_without_a_store_is_named_as_that(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotBuilt, match="no store here"):
            derive(folder, tmp_path, "rot4")


@pytest.mark.usefixtures("wide")
def test_rot4_of_float16_is_rot4_within_a_level(tmp_path):
    direct = built(tmp_path / "direct", "rot4")
    made = derive(built(tmp_path / "rich", "float16").directory, tmp_path / "rich", "rot4")
    assert verify(made.store).problems == []
    assert made.num_shards == 6
    planes, width = direct.codec.how.planes, direct.codec.token_bytes
    codes = []
    for store in (direct, made.store):
        rows = Reader(store, [1]).select(range(10), 1).patches().reshape(10, -1)
        packed = rows[:, : 64 * width].reshape(-1, width)
        codes.append(unpack(packed, planes, 64).astype(int))
    away = np.abs(codes[0] - codes[1])
    assert (away <= 1).mean() >= SAME_CODES
    assert (away == 0).mean() >= SAME_CODES
    assert made.codec == "rot4 of float16"
    assert made.store.spec.fingerprint() != direct.spec.fingerprint()
    assert made.store.provenance["derived"]["version"] == 6
    assert made.store.provenance["codec_quality"]["cosine"] > 0.99


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_what_comes_of_float32_is_what_a_build_makes_byte_for_byte(tmp_path, codec):
    """But for what records a build: nothing says how the shards came about but the manifest."""
    bad = {"a/003": "no image"}
    direct = built(tmp_path / "direct", codec, bad=bad)
    rich = built(tmp_path / "rich", "float32", bad=bad)
    made = derive(rich.directory, tmp_path / "rich", codec)
    assert made.codec == codec
    assert made.store.spec == direct.spec
    ours, theirs = (files_under(store.directory) for store in (made.store, direct))
    assert ours.keys() == theirs.keys()
    # The device's encoder gives the oracle's codes but for some on an edge, which rounding has not.
    assert [name for name, content in ours.items() if content != theirs[name]] == []
    assert derive(rich.directory, tmp_path / "rich", codec).num_shards == 0


@pytest.mark.slow
@pytest.mark.usefixtures("wide")
def test_a_grid_store_is_derived_copied_and_derived_from(tmp_path):
    rich = built(tmp_path / "rich", "float32", count=60)  # pictures enough to fit to half of them
    made = derive(rich.directory, tmp_path / "rich", "grid2")
    assert made.codec == "grid2 of float32"
    wanted, got = decoded(rich), decoded(made.store)
    worst = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert worst.max() <= made.store.codec.rate.worst_error
    copy = derive(made.store.directory, tmp_path / "copy", num_views=1)
    np.testing.assert_array_equal(decoded(copy.store), got)
    assert copy.store.codec.arrays().keys() == made.store.codec.arrays().keys()
    further = derive(made.store.directory, tmp_path / "rich", "rot4")
    assert further.codec == "rot4 of grid2 of float32"
    again = open_store(tmp_path / "rich", further.store.spec)
    assert verify(again).problems == []


@pytest.mark.parametrize("codec", ["float16", "rot2"])
def test_fewer_views_and_samples_keep_rows_as_they_are(tmp_path, codec):
    source = built(tmp_path / "rich", codec, bad={"a/003": "no image"})
    made = derive(source.directory, tmp_path / "small", num_views=1, num_samples=6)
    assert made.store.spec == source.spec
    assert (made.num_samples, made.num_shards) == (6, 2)
    assert verify(made.store).problems == []
    table = Samples.open(tmp_path / "small", DATASET.name).table
    for row, sample_id in zip(table["row"].to_list(), table["sample_id"].to_list(), strict=True):
        there = Reader(source).select(source.samples.rows_of([sample_id]))
        here = Reader(made.store).select([row])
        assert here.reasons == there.reasons
        assert here.digests == there.digests
        np.testing.assert_array_equal(here.decoded(), there.decoded())
        np.testing.assert_array_equal(here.summaries, there.summaries)
    for kind in ("summary", "patches"):
        for ours, theirs in zip(made.store.moments()[kind], source.moments()[kind], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(NotBuilt):
        Reader(made.store, [1])


def test_what_cannot_be_is_refused(tmp_path):
    source = built(tmp_path, "float16")
    with pytest.raises(BadInput, match="would lie there too; give another root"):
        derive(source.directory, tmp_path)
    with pytest.raises(BadInput, match="fewer of them want a root of their own"):
        derive(source.directory, tmp_path, "rot4", num_samples=3)
    with pytest.raises(BadInput, match=r"views = 3: .* has 2, wants 1 or more of them"):
        derive(source.directory, tmp_path, "rot4", num_views=3)
    with pytest.raises(BadInput, match="codec = 'rot5': wants one of"):
        derive(source.directory, tmp_path, "rot5")
    with pytest.raises(BadInput, match="codec = 'none': cannot be derived from 'float16': 'none'"):
        derive(source.directory, tmp_path, "none")
    alone = built(tmp_path / "alone", "none")
    with pytest.raises(BadInput, match="codec = 'float16': cannot be derived from 'none'"):
        derive(alone.directory, tmp_path / "alone", "float16")
    derive(source.directory, tmp_path / "small", num_samples=3)
    with pytest.raises(BadInput, match="has 3 of toy already"):
        derive(source.directory, tmp_path / "small", num_samples=4)


@pytest.mark.parametrize("root", [".", "other"])
def test_of_a_source_that_lacks_shards_the_others_are_derived(tmp_path, root):
    toy = Toy(tmp_path, "float32")
    toy.add_samples(ids(3 * ROWS_PER_SHARD))
    source = toy.build(num_views=1)
    wanted = np.ones((1, len(source.samples.shards())), bool)
    toy.add_samples(ids(5 * ROWS_PER_SHARD))  # not built
    made = derive(open_store(tmp_path, source.spec).directory, tmp_path / root, "float16").store
    assert made.lacks(wanted, source.samples.shards()) == 0
    assert len(made.todo(1)) == len(made.samples.shards()) - wanted.size > 0


@pytest.mark.parametrize("num_shards", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("step", [1, 3])
def test_a_codec_is_fitted_to_pictures_spread_over_what_the_source_has(tmp_path, num_shards, step):
    """Few or many, of every shard or of every third one: to all of few."""
    toy = Toy(tmp_path, "float32")
    toy.add_samples(ids(num_shards * ROWS_PER_SHARD - 1))
    store = toy.store()
    store.commit([toy.write(store, 0, shard) for _, shard in store.todo(1)[::step]])
    there = Reader(store).shards()
    every = np.concatenate([np.arange(each.start, each.stop) for each in there])
    count = min(SAMPLE_ROWS, len(every))
    chosen = every[np.arange(count) * len(every) // count]
    assert len(np.unique(chosen)) == count
    np.testing.assert_array_equal(_sample(Reader(store)), Reader(store).select(chosen).decoded())
    assert derive(store.directory, tmp_path, "float16").num_shards == len(there)


def test_the_same_derivation_again_does_nothing_whatever_number_of_samples_is_asked_for(tmp_path):
    source = built(tmp_path / "rich", "float32")
    for asked in (3, 10, 11):
        root = tmp_path / str(asked)
        first, again = (derive(source.directory, root, num_samples=asked) for _ in range(2))
        assert first.num_samples == again.num_samples == min(asked, 10)
        assert first.num_shards > again.num_shards == 0


def test_a_damaged_source_is_not_derived_from(tmp_path):
    source = built(tmp_path, "float32")
    path = next(source.directory.glob("view-0000/c.*"))
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(Corrupt):
        derive(source.directory, tmp_path, "float16")


@pytest.mark.parametrize(
    "name", ["rot4 of float16", "float16 of bfloat16", "rot4 of int8 of float16"]
)
def test_a_derived_codec_has_a_name_and_an_identity_of_its_own(name):
    spec = default_codec(name)
    assert name_of(spec) == name
    own = name.partition(" ")[0]
    assert spec.name == own
    assert spec != default_codec(own)
    with pytest.raises(BadInput, match="wants one of"):
        default_codec(f"{own} of nothing")


@pytest.mark.slow
def test_a_teacher_is_cached_by_a_grid_codec_and_what_is_derived_is_not_built(tmp_path, emoji):
    """Real features, 4 x 4 tokens, through the device's encoder; the rate is kept to."""
    images = small_caches.pictures(emoji, 24)
    source = small_caches.write_parquet(tmp_path / "images.parquet", images)
    kept = {}
    for codec in ("float32", "grid4"):
        teachers = (small_caches.teacher((128,), codec),)
        job = small_caches.job(tmp_path / codec, source, teachers=teachers)
        (store,) = small_caches.build(job)
        assert verify(store).problems == []
        kept[codec] = Reader(store).select(range(24)).decoded()
        provenance = store.provenance
    worst = np.linalg.norm(kept["grid4"] - kept["float32"], axis=-1)
    worst /= np.linalg.norm(kept["float32"], axis=-1)
    assert worst.max() <= store.codec.rate.worst_error
    assert provenance["codec_quality"]["cosine"] >= store.codec.rate.mean_cosine
    assert provenance["codec_quality"]["bits_per_coefficient"] <= store.codec.rate.bits
    derived = small_caches.teacher((128,), "rot4 of grid4")
    job = small_caches.job(tmp_path / "grid4", source, teachers=(derived,))
    with pytest.raises(BadInput, match="'rot4 of grid4' is not built but derived from a store of"):
        small_caches.build(job)
    made = derive(store.directory, tmp_path / "grid4", "rot4")
    assert small_caches.build(job)[0].directory == made.store.directory
