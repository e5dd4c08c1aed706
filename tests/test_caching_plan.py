"""A plan: its bytes are those that a build leaves on disk, its sums those of its parts."""

import json
from pathlib import Path

import pytest
from support import small_caches, small_recipe, small_run

from cache.store import store_directories
from eupe.errors import BadInput
from pipelines.caching import outlook, plan, planning, rates
from pipelines.recipe import recipes
from pipelines.recipe.config import Recipe
from pipelines.recipe.override import override
from pipelines.recipe.stores import cache_jobs, job_groups
from pipelines.release.licences import follows, sources

WITHIN = 0.01
"""Of the bytes on disk, as the plan promises."""
ON = rates.machine("h100:8")


def written(root: str) -> int:
    """Return what the stores of a root take on disk."""
    return sum(
        path.stat().st_size
        for directory in store_directories(root)
        for path in Path(directory).rglob("*")
        if path.is_file()
    )


def lite0(run, codec):
    teachers = {n: t.model_copy(update={"codec": codec}) for n, t in run.teachers.items()}
    return run.model_copy(update={"teachers": teachers})


def pixels_and_views(run):
    return run.model_copy(update={"pixels": (64,), "num_views": 3})


def two_resolutions(run):
    (teacher,) = run.teachers.values()
    twice = teacher.model_copy(update={"resolutions": (64, 96)})
    stage = small_recipe.stage({"lite0": (64, 96)}, (64,), steps=3, global_batch=2)
    return run.model_copy(update={"teachers": {"lite0": twice}, "stages": {"stage2": stage}})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a run whose caches are built."""
    directory = tmp_path_factory.mktemp("built")
    run = small_run.recipe(directory)
    small_run.build(run, directory)
    return run


def test_planned_bytes_are_those_on_disk(built):
    found = plan.of_recipe(built, rates.Rates(escapes=0))
    assert found.num_bytes == pytest.approx(written(built.cache_root), rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "codec"), [(pixels_and_views, "float32"), (two_resolutions, "rot4")]
)
def test_planned_bytes_of_other_views_and_codecs_are_those_on_disk(tmp_path, change, codec):
    run = lite0(change(small_run.recipe(tmp_path)), codec)
    small_run.build(run, tmp_path)
    found = plan.of_recipe(run, rates.Rates(escapes=0))
    assert found.num_bytes == pytest.approx(written(run.cache_root), rel=WITHIN)


def test_a_set_that_is_not_indexed_is_planned_by_its_size(tmp_path, built):
    run = small_run.recipe(tmp_path)
    with pytest.raises(plan.UnknownSize, match="say --images train=N"):
        plan.of_recipe(run, rates.Rates())
    before = plan.of_recipe(run, rates.Rates(), {"train": 32, "held-out": 16})
    assert before.num_bytes == pytest.approx(written(built.cache_root), rel=0.03)  # ids are shorter


def test_what_two_recipes_share_is_planned_once(tmp_path):
    demo, alone = (recipes.get(name) for name in ("demo", "demo_stage2"))
    first, second = (plan.of_recipe(each, rates.Rates()) for each in (demo, alone))
    both = first + second
    assert both.stores == first.stores
    assert set(second.stores) < set(first.stores)
    assert len(both.stages) == len(first.stages) + len(second.stages)
    assert first + first == first


def test_a_build_without_room_is_refused_with_both_figures(built, monkeypatch):
    monkeypatch.setattr(planning, "free_bytes", lambda recipe: 1e6)
    planning.check_room(built, job_groups(built))  # all is there
    more = override(built, ["num_views=40", "stages.stage2.steps=2000"])
    with pytest.raises(BadInput, match=r"want 0\.\d+ GB more and 0\.001 GB are free; .*--force"):
        planning.check_room(more, job_groups(more))
    assert cache_jobs(more)[0].num_views == 40


def test_a_forward_that_several_outputs_share_is_planned_once(built):
    (first,) = built.teachers.values()
    middle = first.encoder.model_copy(update={"layer": 16})
    other = first.model_copy(update={"name": "middle", "encoder": middle})

    def flops(run):
        stores = plan.of_recipe(run, rates.Rates()).stores.values()
        return sum(store.flops for store in stores), len(stores)

    both = built.model_copy(update={"teachers": {**built.teachers, "middle": other}})
    alone, shared = flops(built), flops(both)
    assert shared == (alone[0], 2 * alone[1])
    apart = other.model_copy(update={"weights": "random:1"})
    twice = built.model_copy(update={"teachers": {**built.teachers, "middle": apart}})
    assert flops(twice)[0] > alone[0]


@pytest.mark.slow
def test_every_figure_says_where_it_comes_from_and_every_constant_its_source(tmp_path):
    asked = recipes.get("imagenet1k_vits16")
    found = planning.outlook(asked, (), ON, rates.Rates(), disk_terabytes=28)
    said = json.loads(json.dumps(found.plain()))
    figures = [
        cell
        for part in (*said["stores"], *said["stages"], said["totals"])
        for cell in part.values()
        if isinstance(cell, dict)
    ]
    assert figures
    assert {figure["how"] for figure in figures} == {"computed", "assumed"}
    assert all(each["source"] for each in said["constants"])
    assert said["totals"]["runs from which caching pays"]["value"] == 1
    assert not said["misfits"]
    assert found.stage_seconds(found.plan.stages["imagenet1k_vits16 stage2"])
    small = planning.outlook(asked, (), ON, rates.Rates(), disk_terabytes=1)
    assert "0 view(s) a sample would fit" in small.misfits()[0]


@pytest.mark.slow
def test_caching_pays_later_where_building_costs_more(tmp_path):
    asked = recipes.get("imagenet1k_vits16")
    even = {
        views: planning.outlook(
            override(asked, planning.changes(asked, views, None)),
            (),
            ON,
            rates.Rates(),
            disk_terabytes=28,
        ).break_even()
        for views in (1, 40)
    }
    assert even[1] < even[40]


@pytest.mark.parametrize(
    ("gpus", "sentence"), [("h1000:8", "wants NAME:NUMBER"), ("h100:none", "wants NAME:NUMBER")]
)
def test_machines_that_are_none_are_refused(gpus, sentence):
    with pytest.raises(BadInput, match=sentence):
        rates.machine(gpus)


def test_rates_come_from_a_file(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("gpu_hour: 1.5\n")
    assert rates.read(file).gpu_hour == 1.5
    file.write_text("gpu_hours: 1.5\n")
    with pytest.raises(BadInput, match=r"--prices .*gpu_hours.*wants numbers of: .*gpu_hour"):
        rates.read(file)


def test_a_figure_is_drawn(tmp_path):
    found = planning.outlook(recipes.get("demo"), (), ON, rates.Rates())
    found.draw(tmp_path / "cost.svg")
    assert "<svg" in (tmp_path / "cost.svg").read_text()[:1000]
    assert outlook.shown(rates.Figure(1_281_167, "", "assumed")) == "~1.28 M"


@pytest.mark.slow
def test_a_recipe_says_its_bytes_and_hours_in_one_sentence(tmp_path):
    said = planning.in_short(recipes.get("imagenet1k_vits16"))
    assert said.startswith("Caches: 9.28 TB. On h100:8, assumed: ~")
    unknown = planning.in_short(small_run.recipe(tmp_path))
    assert unknown.startswith("Bytes and hours are not known: train: not indexed")


def test_students_of_the_permissive_recipe_may_be_used_commercially():
    verdict, barred = (
        follows(sources(recipes.get(name).model_dump(mode="json"))).words
        for name in ("permissive", "imagenet1k_vits16")
    )
    assert verdict.startswith("All that it was made from may be used commercially")
    assert barred.startswith("Not for commercial use: pictures imagenet1k")


def test_the_pictures_themselves_stand_beside_their_caches(built):
    known = planning.outlook(built, (), ON, rates.Rates()).totals()["pictures themselves"]
    pictures = small_caches.pictures(small_run.EMOJI, 48).values()
    assert known.how == "measured"
    assert known.value == sum(len(picture) for picture in pictures)
    totals = planning.outlook(recipes.get("imagenet1k_vits16"), (), ON, rates.Rates()).totals()
    assert totals["pictures themselves"].how == "assumed"
    assert totals["pictures themselves"].value == pytest.approx(
        147.9e9 * 1_331_167 / 1_281_167, rel=1e-3
    )
    assert 0 < totals["of which pixels of views"].value < totals["caches on disk"].value
