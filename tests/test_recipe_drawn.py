"""What will be drawn is what the draws draw: by counting, row by row."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_recipe

from cache.order import EpochOrder
from cache.shard_ranges import ShardRange, ShardRanges
from pipelines.recipe import drawn, draws, resolutions
from pipelines.recipe.drawn import Drawing
from pipelines.recipe.draws import TrainingDraw
from pipelines.recipe.mix import Mix

shard_lists = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
    lambda lengths: [ShardRange(n, 9 * n, 9 * n + length) for n, length in enumerate(lengths)]
)


@settings(max_examples=200)
@given(shards=shard_lists, buffer=st.integers(1, 20), seed=st.integers(0, 99), data=st.data())
def test_shards_touched_under_each_label_are_those_of_its_rows(shards, buffer, seed, data):
    order = EpochOrder.of(shards, seed, buffer)
    cuts = data.draw(
        st.lists(st.integers(0, order.num_rows), min_size=2, max_size=8, unique=True).map(sorted)
    )
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    touched = np.zeros((3, len(shards)), bool)
    for start, stop, label in zip(cuts[:-1], cuts[1:], labels, strict=True):
        touched[label, order.rows(2, start, stop) // 9] = True
    found = order.touched(2, np.array(cuts), np.array(labels), 3)
    assert found.tolist() == touched.tolist()


@pytest.mark.parametrize("rows_together", [1_000_000, 37])
def test_a_long_stretch_is_known_but_for_its_ends(monkeypatch, rows_together):
    monkeypatch.setattr("cache.order.LOOKED_AT_ROWS", rows_together)
    monkeypatch.setattr("cache.order.LOOKED_AT_BUFFERS", 1)
    shards = [ShardRange(n, 4 * n, 4 * n + 4) for n in range(500)]
    for cuts in ((0, 1999), (3, 1500), (40, 1000, 1400), (700, 2000), (11, 80), (0, 9, 1900)):
        order = EpochOrder.of(shards, 1, 16)
        touched = np.zeros((2, 500), bool)
        for label, pair in enumerate(pairwise(cuts)):
            touched[label, order.rows(0, *pair) // 4] = True
        found = order.touched(0, np.array(cuts), np.arange(len(cuts) - 1), 2)
        assert found.tolist() == touched.tolist()


SHARDS = ShardRanges.of([ShardRange(n, 10 * n, 10 * n + (10 if n % 7 else 3)) for n in range(60)])
OTHERS = ShardRanges.of([ShardRange(n, 10 * n, 10 * n + 10) for n in range(5)])


def stage(steps: int, teachers, students, name="stage3"):
    return small_recipe.stage(teachers, students, name=name, steps=steps, global_batch=8)


def by_counting(drawing: Drawing, views: dict[str, int]):
    """Return (dataset, teacher, resolution) -> what every step of every stage reads."""
    shards = {"a": SHARDS, "b": OTHERS}
    found = {}
    for each in drawing.stages:
        mix = Mix(
            drawing.shares, drawing.homogeneous, each.global_batch, drawing.seed, drawing.lanes
        )
        draw = TrainingDraw(mix, {n: shards[n] for n in mix.names}, views, drawing.seed)
        for step in range(each.steps):
            batch, at = draw(step), resolutions.draw(each, drawing.seed, step)
            who = [*at.teachers.items(), ("student", at.student)]
            for number, name in enumerate(mix.names):
                own = batch.datasets == number
                for pair in who:
                    empty = np.zeros((views[name], len(shards[name])), bool)
                    mask = found.setdefault((name, *pair), empty)
                    mask[batch.view_numbers[own], batch.rows[own] // 10] = True
    return found


@pytest.mark.parametrize("steps", [1, 9, 60, 333])
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("lanes", [1, 4])
def test_what_is_drawn_is_what_the_steps_read(lanes, steps, seed, monkeypatch):
    monkeypatch.setattr(draws, "BUFFER_ROWS", 32)
    drawn._answer.cache_clear()
    views = {"a": 3, "b": 2}
    drawing = Drawing(
        stages=(
            stage(steps, {"one": (32,), "two": (32, 64, 96)}, (32, 48)),
            stage(max(1, steps // 2), {"two": (64,)}, (48,), name="stage2"),
        ),
        shares={"a": 1.0, "b": 1.0},
        homogeneous={"b": 0.3},
        seed=seed,
        lanes=lanes,
    )
    counted = by_counting(drawing, views)
    assert steps > 60 or not all(mask.all() for mask in counted.values())  # something is left out
    for (name, who, resolution), mask in counted.items():
        shards = {"a": SHARDS, "b": OTHERS}[name]
        if who == "student":
            found = drawing.of_student(name, shards, views[name], resolution)
        else:
            found = drawing.of_teacher(name, shards, views[name], who, resolution)
        np.testing.assert_array_equal(found, mask)
    assert not drawing.of_teacher("a", SHARDS, 3, "one", 999).any()
    drawn._answer.cache_clear()


def test_hundreds_of_thousands_of_steps_are_not_walked(monkeypatch):
    """Whole epochs draw every shard of their views: their order is not asked for."""
    asked = []
    touched = EpochOrder.touched

    def counted(self, epoch, *cut_up):
        asked.append(epoch)
        return touched(self, epoch, *cut_up)

    monkeypatch.setattr(EpochOrder, "touched", counted)
    monkeypatch.setattr(EpochOrder, "rows", lambda *_: pytest.fail("an epoch was walked"))
    monkeypatch.setattr(EpochOrder, "_order_shards", lambda *_: pytest.fail("it was ordered"))
    shards = ShardRanges(*(np.arange(2000) * 640 + add for add in (0, 0, 640)))
    shards = ShardRanges(np.arange(2000), shards.starts, shards.stops)
    long = stage(390_000, {"proxy": (256,)}, (256,), name="stage2")
    long = long.model_copy(update={"global_batch": 8192})
    drawing = Drawing(stages=(long,), shares={"a": 1.0}, homogeneous={}, seed=0)
    drawn._answer.cache_clear()
    assert drawing.of_teacher("a", shards, 4, "proxy", 256).all()
    assert len(asked) == 4


def test_teachers_and_pixels_that_show_one_resolution_each_are_one_question():
    shards = ShardRanges.of([ShardRange(n, 10 * n, 10 * n + 10) for n in range(400)])
    teachers = {"one": (32,), "two": (64,)}
    drawing = Drawing(
        stages=(stage(9, teachers, (32,)),), shares={"a": 1.0}, homogeneous={}, seed=0
    )
    drawn._answer.cache_clear()
    masks = [drawing.of_teacher("a", shards, 2, name, *side) for name, side in teachers.items()]
    masks.append(drawing.of_student("a", shards, 2, 32))
    assert drawn._answer.cache_info().misses == 1
    assert masks[0].any()
    assert not masks[0].all()
    assert all(np.array_equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(("from_shards", "told"), [(60, True), (61, False)])
def test_draws_of_many_shards_show_how_far_they_are(from_shards, told, monkeypatch, capsys):
    monkeypatch.setattr(drawn, "SHOWN_FROM", from_shards)
    one = stage(9, {"one": (32,)}, (32,))
    drawing = Drawing(stages=(one,), shares={"a": 1.0}, homogeneous={}, seed=0, lanes=4)
    drawn._answer.cache_clear()
    drawing.of_teacher("a", SHARDS, 2, "one", 32)
    assert ("Draws of stage3 from a: 4/4 lanes" in capsys.readouterr().err) == told


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_turns_of_shards_are_when_they_are_drawn_first(lanes, monkeypatch):
    buffer, batch, views, rows = 16, 8, 2, 1000
    monkeypatch.setattr(draws, "BUFFER_ROWS", buffer)
    shards = ShardRanges.of([ShardRange(n, 10 * n, 10 * n + 10) for n in range(rows // 10)])
    one = stage(views * rows // batch, {"one": (32,)}, (32,)).model_copy(
        update={"global_batch": batch}
    )
    drawing = Drawing(stages=(one,), shares={"a": 1.0}, homogeneous={}, seed=4, lanes=lanes)
    first = np.full((views, len(shards)), np.inf)
    draw = TrainingDraw(Mix({"a": 1.0}, {}, batch, 4, lanes), {"a": shards}, {"a": views}, 4)
    for step in reversed(range(one.steps)):
        drawn_now = draw(step)
        first[drawn_now.view_numbers, drawn_now.rows // 10] = step * batch / rows
    turns = drawing.turns("a", shards, views)
    late = (2 * buffer + 10 * lanes + batch) / rows
    assert np.isfinite(turns).all()
    assert np.abs(turns - first).max() <= late
    others = drawing.model_copy(update={"seed": 5}).turns("a", shards, views)
    assert np.abs(others - first).max() > late
