"""A bank keeps the summaries of all its images and the patches of few: the same figures."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from support import small_caches, small_run

from cache.codec.nothing import NONE
from cache.reader import Reader
from cache.shard_ranges import ShardRanges
from cache.store import Store, find_stores, open_store
from cache.verify import verify
from eupe.errors import BadInput
from pipelines.caching import plan, precompute, rates
from pipelines.evaluation import anybody, during, evaluate
from pipelines.evaluation.frozen import FrozenStudent
from pipelines.recipe import stores
from pipelines.recipe.config import PIXELS, Recipe
from pipelines.recipe.override import override
from pipelines.recipe.stores import CacheJob, cache_jobs, open_stores, store_specs
from pipelines.records import tracking
from pipelines.training import launch

FEW = 12
"""Images of 32, in shards of 10: two shards, or the short one and two."""
WITHIN = 0.01


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "BANK_PATCHES", FEW)
        yield


def trained(directory) -> Recipe:
    run = small_run.recipe(directory).model_copy(update={"pixels": (64,)})
    small_run.build(run, directory)
    launch.train(run, run.stage("stage2"), make_evaluate=during.hook)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Recipe:
    """A run whose bank is so small that all its patches are kept."""
    return trained(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def run(whole, few, tmp_path_factory) -> Recipe:
    """The same of which few are."""
    return trained(tmp_path_factory.mktemp("few"))


def bank_of(run: Recipe) -> CacheJob:
    return next(job for job in cache_jobs(run) if job.patch_images is not None)


def test_a_bank_has_all_summaries_and_few_patches(run):
    with_patches, pixels, alone = open_stores(bank_of(run))
    assert (pixels.spec.teacher.name, alone.spec.codec.name) == (PIXELS, NONE)
    rows = {store: store.manifest().total().num_rows for store in (with_patches, pixels, alone)}
    assert FEW <= rows[with_patches] < FEW + 10
    assert rows[with_patches] + rows[alone] == rows[pixels] == 32
    assert alone.row_bytes == 1
    assert not verify(alone).problems
    with pytest.raises(ValueError, match="summaries alone, no patches"):
        Reader(alone).select([int(Reader(alone).shards().starts[0])]).decoded()


def test_planned_bytes_are_those_on_disk(run):
    found = plan.of_recipe(run, rates.Rates(escapes=0))
    on_disk = sum(
        path.stat().st_size
        for info in find_stores(run.cache_root)
        for path in info.directory.rglob("*")
        if path.is_file()
    )
    assert found.num_bytes == pytest.approx(on_disk, rel=WITHIN)
    centre = [each for each in found.stores.values() if each.views == "1 centre"]
    assert {each.codec for each in centre if each.dataset == "train"} == {"float32", "uint8", NONE}


def test_figures_are_those_of_a_bank_of_patches_but_for_the_best_constant(whole, run):
    ours, theirs = (
        evaluate.evaluate([FrozenStudent(each, each.stage("stage2"))]) for each in (run, whole)
    )
    assert ours.encoders.keys() == theirs.encoders.keys()
    for name, judged in ours.encoders.items():
        assert evaluate.described(judged) == evaluate.described(theirs.encoders[name])
    assert ours.versus == theirs.versus
    mine, full = ours.agreement["stage2"], theirs.agreement["stage2"]
    for kind in ("summary", "patches"):
        own, other = getattr(mine, kind), getattr(full, kind)
        assert (own.init, own.final) == (other.init, other.final)
        assert 0 < own.baseline != other.baseline  # fitted to 12 images, not to 32
    lines = [
        tracking.read(each.stage_directory("stage2") / tracking.METRICS_FILE)
        for each in (run, whole)
    ]
    judged, same = (
        [{k: v for k, v in line.items() if k.startswith("held_out/")} for line in of]
        for of in lines
    )
    assert judged == same
    assert any(judged)


@pytest.mark.parametrize("which", ["whole", "run"])
def test_of_a_bank_no_patches_are_read_but_for_the_best_constant(which, request, monkeypatch):
    asked: Recipe = request.getfixturevalue(which)
    monkeypatch.setattr(stores, "BANK_PATCHES", FEW)
    read, copy = Counter[Store](), Reader.copy

    def counted(self, selection, into):
        spec = self.store.spec
        if spec.views == asked.held_out_views and spec.teacher.name != PIXELS:
            read[spec.dataset.name] += len(selection)
        copy(self, selection, into)

    monkeypatch.setattr(Reader, "copy", counted)
    monkeypatch.setattr(evaluate, "BANK_PATCHES", FEW)
    evaluate.evaluate([FrozenStudent(asked, asked.stage("stage2"))])
    assert read == {"train": FEW, "held-out": 16}


def test_anybodys_models_are_judged_beside_experts_of_such_a_bank(whole, run):
    ours, theirs = (anybody.evaluate(each, [], "cpu") for each in (run, whole))
    assert ours == theirs
    assert ours["left_out"] == []


def test_a_bank_whose_patches_were_all_kept_before_is_not_built_again(whole, few):
    job = bank_of(whole)
    assert job.patch_images == FEW
    assert NONE not in {spec.codec.name for spec in store_specs(job)}
    pool = small_caches.in_process(job)
    resolved = precompute.resolve_stores(job, pool)
    assert precompute.extract_missing(job, resolved, pool).num_shards == 0
    assert len(open_stores(job)) == 2


def test_all_keeps_the_patches_of_all(run, few):
    everything = override(run, ["extraction.everything=true"])
    assert all(job.patch_images is None for job in cache_jobs(everything))


def test_a_shard_that_is_gone_of_either_kind_is_built_again(tmp_path, few):
    run = small_run.recipe(tmp_path)
    small_run.build(run, tmp_path)
    job = bank_of(run)
    pool = small_caches.in_process(job)
    for store in open_stores(job):
        path = next(store.directory.glob("view-0000/rows-*.arrow"))
        content = path.read_bytes()
        path.unlink()
        assert precompute.extract_missing(job, open_stores(job, half=True), pool).num_shards == 1
        assert path.read_bytes() == content
    open_stores(job)


@pytest.mark.parametrize("count", [1, 2000, 10**6])
def test_the_shards_with_patches_hold_enough_and_stay_as_a_set_grows(count):
    def chosen(num_shards):
        starts = 320 * np.arange(num_shards)
        shards = ShardRanges(starts // 320, starts, starts + 320)
        return stores._some(shards, count, "imagenet1k")

    for num_shards in (1, 7, 4000):
        held = 320 * int(chosen(num_shards).sum())
        assert (
            held == 320 * num_shards if count >= 320 * num_shards else count <= held < count + 320
        )
    before, after = chosen(4000), chosen(4400)[:4000]
    assert not (after & ~before).any()  # of those of before, none is new


def test_a_teacher_of_no_patches_is_refused(run):
    with pytest.raises(BadInput, match="codec = 'none': keeps no patches; wants one of float32, "):
        override(run, ["teachers.lite0.codec=none"])


def test_a_store_of_summaries_is_one_of_the_same_teacher(run):
    specs = store_specs(bank_of(run))
    with_patches, _, alone = specs
    assert alone.teacher == with_patches.teacher
    assert alone.model_copy(update={"codec": with_patches.codec}) == with_patches
    there, here = (open_store(run.cache_root, spec) for spec in (with_patches, alone))
    assert {kind: of[0] for kind, of in there.moments().items()} == {
        kind: of[0] for kind, of in here.moments().items()
    }
