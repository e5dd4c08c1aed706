"""A plan as it is asked for: of which pictures, on what disk, and calibrated here if wanted."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from cache.errors import Corrupt, NotBuilt
from cache.files.bucket_path import BucketPath
from cache.format import layout
from cache.store import store_directories, store_info
from eupe.errors import BadInput
from pipelines.caching import calibrate, plan
from pipelines.caching.outlook import Outlook, shown
from pipelines.caching.plan import Plan
from pipelines.caching.rates import Machine, Rates, machine
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import CacheJob

USUAL = "h100:8"
"""What a plan is of where no machine is named."""
BUCKET_BYTES = float("inf")
"""Room of a bucket: none that anybody has to look after."""


def outlook(
    recipe: Recipe,
    images: Sequence[str],
    on: Machine,
    rates: Rates,
    disk_terabytes: float | None = None,
    measure: bool = False,
) -> Outlook:
    """Plan a recipe on a machine.

    Args:
        recipe: which.
        images: NAME=N, or N for every train set.
        on: what it runs on.
        rates: what is assumed.
        disk_terabytes: that caches may take; None: what is free at the cache root.
        measure: True to measure decoding and a short build here, instead of assuming.

    Raises:
        BadInput: as for `plan.of_recipe`, or sizes that are no numbers.
    """
    found = plan.of_recipe(recipe, rates, sizes(recipe, images))
    return on_machine(found, recipe, on, rates, disk_terabytes, measure)


def on_machine(
    found: Plan,
    recipe: Recipe,
    on: Machine,
    rates: Rates,
    disk_terabytes: float | None = None,
    measure: bool = False,
) -> Outlook:
    """Look at what was planned, of one recipe or of many, on a machine.

    Args:
        found: the plan.
        recipe: whose pictures are decoded where decoding is measured, and where caches lie.
        on: as in `outlook`, like what follows.
        rates: what is assumed.
        disk_terabytes: that caches may take.
        measure: as in `outlook`.
    """
    room = free_bytes(recipe) if disk_terabytes is None else disk_terabytes * 1e12
    if not measure:
        return Outlook(found, on, rates, frozenset(), room)
    rates = rates.model_copy(update=calibrate.rates(recipe))
    here_seconds = calibrate.build_seconds(found.passes.values())
    return Outlook(found, on, rates, frozenset({"decode_views"}), room, here_seconds)


def in_short(recipe: Recipe) -> str:
    """Return one sentence of bytes and hours on a node of eight H100, or why there is none."""
    try:
        found = outlook(recipe, (), machine(USUAL), Rates())
    except plan.UnknownSize as error:
        return f"Bytes and hours are not known: {error}"
    totals = {name: shown(each) for name, each in found.totals().items()}
    build, cached, live = (
        next(each for name, each in totals.items() if name.startswith(first))
        for first in ("building", "a run from", "a run with")
    )
    return (
        f"Caches: {totals['caches on disk']}. On {USUAL}, assumed: {build} to build them, {cached} "
        f"a run from them, {live} a run with live teachers (eupe plan {recipe.name})."
    )


def sizes(recipe: Recipe, images: Sequence[str]) -> dict[str, int]:
    """Return dataset -> pictures, as `--images` says.

    Raises:
        BadInput: no number, or no set of that name.
    """
    known = [*recipe.train, recipe.held_out.name]
    found = dict[str, int]()
    for said in images:
        name, equals, number = said.rpartition("=")
        if not number.isdigit() or int(number) < 1 or (equals and name not in known):
            raise BadInput(f"--images {said!r}: wants N or NAME=N, a name of {', '.join(known)}")
        found |= dict.fromkeys([name] if equals else recipe.train, int(number))
    return found


def changes(recipe: Recipe, views: int | None, codec: str | None) -> list[str]:
    """Return the overrides that `--views` and `--codec` stand for."""
    found = []
    if views is not None:
        found.append(f"num_views={views}")
        found += [f"train.{n}.num_views=null" for n, d in recipe.train.items() if d.num_views]
    if codec is not None:
        found += [] if recipe.proxy is None else [f"proxy_codec={codec}"]
        found += [f"teachers.{name}.codec={codec}" for name in recipe.teachers]
    return found


def free_bytes(recipe: Recipe) -> float:
    """Return what is free where a recipe's caches lie or will lie."""
    root = layout.cache_root(recipe.cache_root)
    if isinstance(root, BucketPath):
        return BUCKET_BYTES
    there = next(folder for folder in (root, *root.parents) if Path(folder).is_dir())
    return float(shutil.disk_usage(there).free)


def check_room(recipe: Recipe, groups: Sequence[Sequence[CacheJob]]) -> None:
    """Refuse to begin a build that the disk has no room for; its sets are indexed.

    Args:
        recipe: whose.
        groups: what will be built of it; what is there of their stores is not counted again.

    Raises:
        BadInput: naming what is wanted and what is free.
    """
    more = missing_bytes(recipe, plan.of_stores(recipe, groups, Rates()))
    free = free_bytes(recipe)
    if more > free:
        raise BadInput(
            f"{recipe.cache_root}: the caches of {recipe.name} want {more / 1e9:,.3f} GB more and "
            f"{free / 1e9:,.3f} GB are free; `eupe plan` says what takes them, and --force begins "
            "all the same"
        )


def missing_bytes(recipe: Recipe, wanted: plan.Plan) -> float:
    """Return what the stores of a plan take beside what is there of them already."""
    there = _there(recipe, wanted)
    return sum(max(0, each.num_bytes - there.get(name, 0)) for name, each in wanted.stores.items())


def _there(recipe: Recipe, wanted: plan.Plan) -> dict[str, int]:
    """Return planned store -> the bytes that stores of its kind have already."""
    found = dict[str, int]()
    try:
        directories = store_directories(recipe.cache_root)
    except NotBuilt:  # nothing is there
        return found
    for directory in directories:
        try:
            info = store_info(directory)
        except Corrupt:  # whoever opens it says so
            continue
        for name, each in wanted.stores.items():
            (teacher,), spec = each.config.teachers, info.spec
            asked = each.dataset, each.config.views, teacher.encoder, each.resolution, each.codec
            has = (
                spec.dataset.name,
                spec.views,
                spec.teacher.encoder,
                spec.resolution,
                spec.codec.name,
            )
            if asked == has and teacher.name == spec.teacher.name:
                found[name] = found.get(name, each.fixed_bytes) + info.num_bytes
    return found
