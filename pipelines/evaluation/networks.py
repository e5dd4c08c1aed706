"""The encoders of a run by name, and what each makes of the images.

They are every network before any stage and after each, at every resolution of the recipe, every
teacher as it is cached, and the pixels themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eupe.encoders import Encoder
from pipelines.evaluation.compare import RAW_SIDE, Seen, look
from pipelines.evaluation.encoders import Vectors
from pipelines.evaluation.frozen import CentreViews, FrozenStudent, over_pyramid
from pipelines.machines.progress import track
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.resolutions import Resolutions
from pipelines.recipe.stage import StageConfig

PIXELS = "pixels"


@dataclass(frozen=True)
class Shown:
    """What the encoders of a run made of its images.

    Attributes:
        bank_ids: train set -> its samples, in the order of `Vectors.bank`, set after set.
        query_ids: held-out samples, in the order of `Vectors.queries`.
        encoders: name -> its summaries.
        teachers: names of the experts among the encoders; of the proxy if there is no other.
    """

    bank_ids: dict[str, list[str]]
    query_ids: list[str]
    encoders: dict[str, Vectors]
    teachers: tuple[str, ...]


def initial_name(stage: StageConfig) -> str:
    """Return what the network that a stage trains is called before any stage trained it."""
    return f"{stage.student}_init"


def final_name(recipe: Recipe, stage: StageConfig) -> str:
    """Return what the network of a stage is called after it."""
    if stage.student == PROXY:
        return PROXY
    own = [each.name for each in recipe.stages.values() if each.student == stage.student]
    return "student_final" if stage.name == own[-1] else f"student_{stage.name}"


def at(name: str, resolution: int, headline: int) -> str:
    """Return the name of an encoder at a resolution; at its headline's it is its own."""
    return name if resolution == headline else f"{name}@{resolution}"


def title(recipe: Recipe, name: str) -> str:
    """Return an encoder's name in words, without its resolution."""
    who = name.partition("@")[0]
    if who == PIXELS:
        return "raw pixels"
    if who in recipe.teachers:
        return f"expert {who}"
    for stage in recipe.stages.values():
        if who == initial_name(stage):
            return f"{stage.student} before"
        if who == final_name(recipe, stage):
            return f"{stage.student} after {stage.name}"
    return who


def resolutions(recipe: Recipe) -> tuple[int, ...]:
    """Return every resolution at which a student of the recipe reads, and the evaluation's own."""
    drawn = {side for stage in recipe.stages.values() for side in stage.student_resolutions}
    return tuple(sorted({*drawn, recipe.evaluation.resolution}))


def show(students: Sequence[FrozenStudent]) -> Shown:
    """Show the bank and the held-out set to every network of some stages.

    Networks read at every resolution of the recipe, each image being drawn once a resolution for
    all of them. Teachers are not run: their summaries come from their stores.

    Args:
        students: of the stages, in their order.

    Raises:
        BadInput: a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    recipe, images, device = students[0].recipe, students[0].images, students[0].device
    headline, networks = recipe.evaluation.resolution, _networks(students)
    order = [*networks]
    cached = {
        teacher: (student.images, sides)
        for student in students
        for teacher, sides in over_pyramid(recipe, student.stage).teacher_resolutions.items()
    }
    if PROXY in cached and {*resolutions(recipe)} <= {*cached[PROXY][1]}:
        networks.pop(PROXY, None)  # its stores have all that running it would give
    names, held_out = [dataset.name for dataset in recipe.bank], recipe.held_out.name
    rows = {name: images.rows(name) for name in (*names, held_out)}
    teachers = {name: max(of) for name, of in students[0].stage.teacher_resolutions.items()}
    seen: dict[tuple[str, int], Seen] = {}
    sides = resolutions(recipe)
    with track(sum(map(len, rows.values())) * len(sides), "Encoders") as progress:
        for side in sides:
            for name in rows:
                seen[name, side] = look(
                    images.batches(name, rows[name], Resolutions(side, teachers), tokens=False),
                    encoders=networks,
                    raw=side == headline,
                    device=device,
                    advance=progress.advance,
                )
    bank_ids = {name: seen[name, headline].sample_ids for name in names}
    query_ids = seen[held_out, headline].sample_ids

    def vectors(side: int, of: str | None) -> Vectors:
        parts = [
            each.pixels if of is None else each.summaries[of]
            for each in (seen[name, side] for name in (*names, held_out))
        ]
        return Vectors(RAW_SIDE if of is None else side, torch.cat(parts[:-1]), parts[-1])

    encoders = {PIXELS: vectors(headline, None)}
    for teacher, (its, of) in cached.items():
        if teacher in networks:
            continue
        own = headline if headline in of else max(of)
        for side in sorted(of):
            bank = [_stored(its, *each, teacher, side) for each in bank_ids.items()]
            queries = _stored(its, held_out, query_ids, teacher, side)
            encoders[at(teacher, side, own)] = Vectors(side, torch.cat(bank), queries)
    for network in networks:
        for side in sides:
            encoders[at(network, side, headline)] = vectors(side, network)
    encoders = {
        name: encoders[name]
        for first in (PIXELS, *(each for each in cached if each not in order), *order)
        for name in encoders
        if name.partition("@")[0] == first
    }
    experts = tuple(teacher for teacher in cached if teacher != PROXY)
    return Shown(bank_ids, query_ids, encoders, experts or tuple(cached))


def _networks(students: Sequence[FrozenStudent]) -> dict[str, Encoder]:
    """Return name -> network, each once: before any stage, and after each."""
    found: dict[str, Encoder] = {}
    for student in students:
        first = initial_name(student.stage)
        if first not in found:
            found[first] = _last(students, student.stage.student).initial.encoder
        found[final_name(student.recipe, student.stage)] = student.final.encoder
    return found


def _last(students: Sequence[FrozenStudent], network: str) -> FrozenStudent:
    """Return the last of the stages that train a network: whose initial one is compared with."""
    return [each for each in students if each.stage.student == network][-1]


def _stored(
    images: CentreViews, dataset: str, sample_ids: list[str], teacher: str, side: int
) -> Tensor:
    rows = np.asarray(images.feeds[dataset].source.samples.rows_of(sample_ids))
    return images.summaries(dataset, rows, teacher, side)
