"""Batches: pure functions of the step, whoever makes them, and never the wrong pixels."""

import dataclasses
import time
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import small_caches
from support.small_caches import POLICY, build, job, pictures, teacher, write_folder, write_parquet

from cache import selection
from cache.errors import StoreError
from cache.reader import Reader
from cache.shard_ranges import ShardRange
from eupe import views
from eupe.normalise import Normaliser
from pipelines.features.cached import CachedSource
from pipelines.features.sources import Normalisers
from pipelines.recipe.config import SourceConfig, WorkersConfig
from pipelines.recipe.draws import Sweep, TrainingDraw, view_numbers
from pipelines.recipe.mix import Mix
from pipelines.recipe.resolutions import Resolutions
from pipelines.training.batches import Batch, Batches, Loader
from pipelines.training.feeds import Feed

COUNT, BATCH = 24, 8
SHARDS = [ShardRange(0, 0, 10), ShardRange(1, 10, 20), ShardRange(2, 20, 24)]


def training_draw(num_views: int = 2, batch: int = BATCH, seed: int = 0) -> TrainingDraw:
    mix = Mix({"emoji": 1.0}, {}, batch, seed)
    return TrainingDraw(mix, {"emoji": SHARDS}, {"emoji": num_views}, seed)


# ------------------------------------------------------------------------------ draws


@given(st.integers(1, 7), st.integers(1, 30), st.integers(0, 5))
def test_an_epoch_draws_every_row_once_whatever_the_batch(num_views, batch, seed):
    draw = training_draw(num_views, batch, seed)
    steps = -(-3 * COUNT // batch)
    rows = np.concatenate([np.sort(draw(step).rows) for step in range(steps)])
    counts = np.bincount(rows, minlength=COUNT)
    assert counts.max() - counts.min() <= 1
    assert len(rows) == steps * batch


@given(st.integers(1, 9), st.integers(0, 1000), st.integers(0, 2**40))
def test_successive_epochs_walk_through_all_views(num_views, epoch, row):
    epochs = epoch + np.arange(num_views)
    shown = view_numbers(7, epochs, np.full(num_views, row), num_views)
    assert sorted(shown) == list(range(num_views))


def test_views_are_spread_over_an_epoch():
    shown = view_numbers(0, np.zeros(8000, np.int64), np.arange(8000), 4)
    counts = np.bincount(shown, minlength=4)
    assert counts.min() > 1800  # 2000 expected, standard deviation 39


def test_a_shard_shows_one_view_an_epoch_and_another_the_next():
    draw, num_views = training_draw(3, COUNT), 3  # a step is an epoch
    of_epoch = []
    for step in range(num_views):
        drawn = draw(step)
        views = {}
        for shard in SHARDS:
            inside = (drawn.rows >= shard.start) & (drawn.rows < shard.stop)
            (views[shard.shard],) = set(drawn.view_numbers[inside].tolist())
        of_epoch.append(views)
    for shard in SHARDS:
        assert {views[shard.shard] for views in of_epoch} == set(range(num_views))
    assert len(set(of_epoch[0].values())) > 1


def test_a_draw_is_a_pure_function_of_the_step():
    forwards = [training_draw()(step) for step in range(12)]
    draw = training_draw()
    for step in reversed(range(12)):
        for ours, theirs in zip(draw(step), forwards[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    other = [training_draw(seed=1)(step).rows.tolist() for step in range(12)]
    assert other != [drawn.rows.tolist() for drawn in forwards]


def test_every_dataset_of_a_mix_is_walked_in_an_order_of_its_own():
    """Three of one size: the same places of an epoch hold other rows."""
    names = ("a", "b", "c")
    mix = Mix(dict.fromkeys(names, 1.0), {}, 3 * COUNT, 0)  # a step is an epoch of all three
    draw = TrainingDraw(mix, dict.fromkeys(names, SHARDS), dict.fromkeys(names, 1), 0)
    drawn, slots = draw(0), mix.slots(0)
    orders = []
    for number in range(len(names)):
        ours = slots.datasets == number
        orders.append(tuple(drawn.rows[ours][np.argsort(slots.positions[ours])].tolist()))
        assert sorted(orders[-1]) == list(range(COUNT))
    assert len(set(orders)) == len(names)


def test_a_mix_without_its_shards_is_refused():
    with pytest.raises(ValueError, match="the mix draws from 'emoji'; shards are of"):
        TrainingDraw(Mix({"emoji": 1.0}, {}, 4, 0), {"other": SHARDS}, {"other": 1}, 0)


# ------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def feeds(tmp_path_factory, emoji) -> dict[str, Feed]:
    """Two datasets of the same images; in the second, the first image is cut in the middle."""
    where = tmp_path_factory.mktemp("batches")
    images = pictures(emoji, COUNT)
    first = next(iter(images))
    cut = {**images, first: images[first][: len(images[first]) // 2]}
    sources = {
        "emoji": write_parquet(where / "images.parquet", images),
        "spoilt": write_folder(where / "images", cut),
    }
    return {
        name: feed(
            source,
            build(
                job(
                    where / name,
                    source,
                    num_views=2,
                    teachers=(teacher(weights="random:0"),),
                    max_failure_share=0.5,
                )
            ),
        )
        for name, source in sources.items()
    }


def feed(images: SourceConfig, stores) -> Feed:
    identity = Normaliser(torch.zeros(1280), torch.ones(1280))
    readers = {("lite0", store.spec.resolution): Reader(store, range(2)) for store in stores}
    source = CachedSource(readers, {"lite0": Normalisers(identity, identity)})
    return Feed(source, small_caches.reader(images), POLICY)


def scales(step: int) -> Resolutions:
    """The student's scale alternates; the teacher's is fixed."""
    return Resolutions((32, 64)[step % 2], {"lite0": 64})


def micro_batch(size: int, scale: int, rows: int) -> int:
    return min(size, rows)


def batches(
    feeds, steps: range, micro: int = BATCH, draw=None, rank=0, world_size=1, **settings
) -> Batches:
    loader = Loader(WorkersConfig(**settings), rank, world_size)
    return Batches(
        feeds, draw or training_draw(), scales, partial(micro_batch, micro), steps, loader
    )


def content(batch: Batch) -> tuple[object, ...]:
    targets = batch.targets()["lite0"]
    return (
        batch.sample_ids,
        batch.view_numbers.tolist(),
        batch.pixels.numpy().tobytes(),
        batch.valid.tolist(),
        *(each.numpy().tobytes() for each in targets),
    )


def test_threads_and_prefetch_change_nothing(feeds):
    one = [content(b) for b in batches(feeds, range(6), loader_threads=1, prefetch_batches=1)]
    many = [content(b) for b in batches(feeds, range(6), loader_threads=4, prefetch_batches=9)]
    assert one == many


def test_starting_at_a_step_gives_what_the_whole_run_gave(feeds):
    whole = [content(b) for b in batches(feeds, range(6))]
    assert [content(b) for b in batches(feeds, range(4, 6))] == whole[4:]


def test_ranks_share_out_the_global_batch(feeds):
    together = [b.sample_ids for b in batches(feeds, range(4))]
    ranks = [
        [b.sample_ids for b in batches(feeds, range(4), rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == together


def test_a_batch_groups_its_rows_once_a_reader(feeds, monkeypatch):
    group, asked = selection.grouped, []
    monkeypatch.setattr(selection, "grouped", lambda *args: asked.append(args) or group(*args))
    made = list(batches(feeds, range(4)))
    for batch in made:
        batch.targets()
    # Each part is one dataset's rows, read from the one store of its one teacher.
    assert len(asked) == sum(len(batch.parts) for batch in made) > 0
    assert sum(len(rows) for rows, *_ in asked) == sum(map(len, made))


def test_micro_batches_are_the_batch_in_stretches(feeds):
    whole = [b.sample_ids for b in batches(feeds, range(2))]
    parts = list(batches(feeds, range(2), micro=3))
    assert [(b.step, b.micro, b.num_micro, b.last) for b in parts] == [
        (step, micro, 3, micro == 2) for step in (0, 1) for micro in range(3)
    ]
    assert [len(b) for b in parts] == [3, 3, 2] * 2
    assert [list(chain(*(b.sample_ids for b in parts if b.step == n))) for n in (0, 1)] == whole


def test_pixels_are_the_view_at_the_students_scale(feeds):
    reader, samples = feeds["emoji"].images, feeds["emoji"].source.samples
    for batch in batches(feeds, range(2)):
        for place, name in enumerate(batch.sample_ids):
            sample = samples.take(samples.rows_of([name])).row(0, named=True)
            number = int(batch.view_numbers[place])
            view = views.make_view(reader.read(sample), POLICY, name, number)
            wanted = views.resize(view.canvas, scales(batch.step).student)
            np.testing.assert_array_equal(batch.pixels[place].permute(1, 2, 0).numpy(), wanted)


def test_tokens_are_those_of_the_sample_and_view(feeds):
    source = feeds["emoji"].source
    for batch in batches(feeds, range(2)):
        alone = source.targets(batch.sample_ids, batch.view_numbers, {"lite0": 64})["lite0"]
        for ours, theirs in zip(batch.targets()["lite0"], alone, strict=True):
            assert torch.equal(ours, theirs)


def test_a_mix_of_datasets_keeps_every_row_in_its_place(feeds):
    mix = Mix({"emoji": 1.0, "spoilt": 1.0}, {}, BATCH, 0)
    shards = {name: feed.source.shards() for name, feed in feeds.items()}
    draw = TrainingDraw(mix, shards, dict.fromkeys(feeds, 2), 0)
    for batch in batches(feeds, range(3), draw=draw):
        drawn = draw(batch.step)
        assert len(set(drawn.datasets)) == 2
        targets = batch.targets()["lite0"]
        for place in range(BATCH):
            source = feeds[draw.names[drawn.datasets[place]]].source
            assert batch.sample_ids[place] == source.samples.sample_ids(drawn.rows[[place]])[0]
            view = drawn.view_numbers[[place]]
            alone = source.targets([batch.sample_ids[place]], view, {"lite0": 64})["lite0"]
            assert torch.equal(targets.patches[place], alone.patches[0])
            assert bool(targets.valid[place]) == bool(batch.valid[place])


def test_invalid_rows_keep_their_place_and_are_counted(feeds):
    run = batches(feeds, range(3), draw=Sweep("spoilt", np.arange(COUNT), BATCH, view=1))
    seen = list(run)
    invalid = [b.sample_ids[place] for b in seen for place in np.flatnonzero(~b.valid)]
    assert invalid == ["even/1f600"]
    assert sum(map(len, seen)) == COUNT
    bad = next(b for b in seen if not b.valid.all())
    assert not bad.targets()["lite0"].patches[~torch.from_numpy(bad.valid)].any()


def test_a_sweep_visits_every_row_once_in_order(feeds):
    draw = Sweep("emoji", np.arange(COUNT)[::-1], 7)
    seen = list(chain(*(b.sample_ids for b in batches(feeds, range(draw.num_steps), draw=draw))))
    assert seen == feeds["emoji"].source.samples.table["sample_id"].to_list()[::-1]


def test_pixels_that_render_otherwise_are_refused(feeds):
    other = dataclasses.replace(feeds["emoji"], policy=POLICY.model_copy(update={"seed": 6}))
    with pytest.raises(StoreError, match=r"renders as \w{32} here and was \w{32} when cached"):
        list(batches({"emoji": other}, range(1)))


def test_waiting_is_measured(feeds, monkeypatch):
    """A source that takes its time, one batch after the other, and a loop that takes none."""
    slow = 0.2
    source = feeds["emoji"].source
    fetch = source.fetch

    def late(*arguments):
        time.sleep(slow)
        return fetch(*arguments)

    monkeypatch.setattr(source, "fetch", late)
    started = time.perf_counter()
    waited = [
        batch.wait_seconds
        for batch in batches(feeds, range(4), loader_threads=1, prefetch_batches=1)
    ]
    passed = time.perf_counter() - started
    assert min(waited) >= 0
    assert 2 * slow < sum(waited) < passed  # two at most are made at once


def test_a_batch_too_small_for_the_workers_is_refused(feeds):
    with pytest.raises(ValueError, match="at least one row a worker"):
        list(batches(feeds, range(1), draw=training_draw(batch=2), rank=0, world_size=3))
    with pytest.raises(ValueError, match="rank 3: a world of 3 has ranks 0 to 2"):
        batches(feeds, range(1), rank=3, world_size=3)
    with pytest.raises(ValueError, match="no feed of dataset emoji"):
        batches({}, range(1))
