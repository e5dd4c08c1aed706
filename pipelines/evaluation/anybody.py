"""Anybody's models beside a recipe's: raw pixels, its experts, and whatever has a name.

No run is wanted. Pictures come from the recipe's sources as each model's own record has them cut,
the experts' summaries from their stores; a store that is not built is left out, with a sentence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from cache.errors import StoreError
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.pixels import RGB
from eupe.teachers import load_teacher
from pipelines.evaluation.compare import RAW_SIDE
from pipelines.evaluation.encoders import Classes, Vectors, judge
from pipelines.evaluation.evaluate import described
from pipelines.evaluation.labels import numbered
from pipelines.evaluation.networks import PIXELS
from pipelines.features.marks import marks
from pipelines.images.aside import Aside
from pipelines.images.labels import labels_of
from pipelines.recipe.config import DatasetConfig, Recipe
from pipelines.recipe.stores import CacheJob, Opened, cache_jobs, store_specs
from pipelines.release.encode import shown
from pipelines.release.models import Model


class _Made(NamedTuple):
    """What an encoder made of a data set: samples, and their vectors [n, D] in the same order."""

    samples: pl.DataFrame
    vectors: Tensor

    def of(self, ids: Sequence[str]) -> Tensor:
        """Return the vectors of samples, in their order."""
        places = {name: place for place, name in enumerate(self.samples["sample_id"])}
        return self.vectors[[places[name] for name in ids]]


def evaluate(recipe: Recipe, models: Sequence[Model], device: str) -> dict[str, Any]:
    """Judge models by a recipe's pictures and labels, in the table of its own encoders.

    Args:
        recipe: whose `evaluation`, train sets and held-out set they are judged by.
        models: each by its name.
        device: to compute on.

    Returns:
        plain data: what `pipelines.evaluation.tables` shows of encoders, and `left_out`, sentences
        on experts whose stores are not built.

    Raises:
        BadInput: two models of one name, pictures without the label, or a model that cannot be
            read.
    """
    names = [each.name for each in models]
    if len({PIXELS, *recipe.teachers, *names}) < 1 + len(recipe.teachers) + len(names):
        raise BadInput(f"--model {names}: wants names of their own, beside {[*recipe.teachers]}")
    sets = [*recipe.bank, recipe.held_out]
    raw = Model(
        name=PIXELS,
        encoder=RGB,
        weights="random:0",
        views=recipe.held_out_views,
        resolution=RAW_SIDE,
    )
    made = {
        model.name: [_made(model, dataset, recipe, device) for dataset in sets]
        for model in (raw, *models)
    }
    sides = {model.name: model.resolution for model in (raw, *models)}
    experts, left_out = _experts(recipe, [each.samples for each in made[PIXELS]])
    for name, (side, found) in experts.items():
        made[name], sides[name] = found, side
    ids = [_common([of[place].samples for of in made.values()]) for place in range(len(sets))]
    vectors = {
        name: Vectors(
            sides[name],
            torch.cat([each.of(some) for each, some in zip(of[:-1], ids[:-1], strict=True)]),
            of[-1].of(ids[-1]),
        )
        for name, of in made.items()
    }
    label = recipe.evaluation.label
    classes = None
    if label is not None:
        labels = [
            labels_of(_rows(each.samples, some), label)
            for each, some in zip(made[PIXELS], ids, strict=True)
        ]
        classes = Classes(*numbered([one for some in labels[:-1] for one in some], labels[-1]))
    judged = judge(vectors, classes, recipe.evaluation.k, [*experts], device)
    titles = {PIXELS: "raw pixels", **{name: f"expert {name}" for name in experts}}
    return {
        "label": label,
        "k": recipe.evaluation.k,
        "bank": sum(map(len, ids[:-1])),
        "queries": len(ids[-1]),
        "titles": {name: titles.get(name, name) for name in made},
        "encoders": {name: described(each) for name, each in judged.items()},
        "left_out": left_out,
    }


def _made(model: Model, dataset: DatasetConfig, recipe: Recipe, device: str) -> _Made:
    """Show a data set to a model; of raw pixels the vector is the picture."""
    teacher = load_teacher("model", model.encoder, model.weights, device=device)
    teacher.encoder.check_resolution(model.resolution)
    samples, vectors = list[pl.DataFrame](), list[Tensor]()
    settings = recipe.evaluation.batch, recipe.workers.loader_threads
    for part in shown(dataset.source, model, teacher, *settings, [], Aside()):
        samples.append(part.samples)
        vectors.append(_vector(model, part.features).cpu())
    if not samples:
        raise BadInput(f"{dataset.source.path}: not one usable picture")
    return _Made(pl.concat(samples), torch.cat(vectors))


def _vector(model: Model, features: Features) -> Tensor:
    return features.patches.flatten(1) if model.encoder == RGB else features.summary


def _experts(
    recipe: Recipe, samples: Sequence[pl.DataFrame]
) -> tuple[dict[str, tuple[int, list[_Made]]], list[str]]:
    """Return expert -> its largest cached resolution and its summaries of each set; sentences."""
    jobs = {
        job.dataset.name: job for job in cache_jobs(recipe) if job.views == recipe.held_out_views
    }
    in_order = [jobs[each.name] for each in (*recipe.bank, recipe.held_out)]
    opened = Opened()
    found, left_out = dict[str, tuple[int, list[_Made]]](), list[str]()
    for name, teacher in recipe.teachers.items():
        side = max(teacher.resolutions)
        try:
            found[name] = (
                side,
                [
                    _stored(recipe, opened, job, name, side, some)
                    for job, some in zip(in_order, samples, strict=True)
                ],
            )
        except (StoreError, BadInput) as error:
            left_out.append(f"expert {name} is left out: {error}")
    return found, left_out


def _stored(
    recipe: Recipe, opened: Opened, job: CacheJob, name: str, side: int, samples: pl.DataFrame
) -> _Made:
    """Return an expert's summaries of samples as its store has them, those that it has."""
    stores = [
        opened.store(job.root, spec)
        for spec in store_specs(job)
        if spec.teacher.name == name and spec.resolution == side
    ]
    for store in stores:
        opened.check_whole(store, job.wanted_of(store))
    rows = np.asarray(stores[0].samples.rows_of(samples["sample_id"].to_list()))
    readers = [opened.reader(store, (0,), None, recipe.workers) for store in stores]
    said = marks(readers, rows, np.zeros_like(rows))
    vectors = torch.from_numpy(said.summaries)
    return _Made(samples.filter(pl.Series(said.valid)), vectors[torch.from_numpy(said.valid)])


def _common(samples: Sequence[pl.DataFrame]) -> list[str]:
    """Return the ids that are in all tables, in the order of the first."""
    kept = samples[0].select("sample_id")
    for other in samples[1:]:
        kept = kept.join(
            other.select("sample_id"), on="sample_id", how="semi", maintain_order="left"
        )
    found: list[str] = kept["sample_id"].to_list()
    return found


def _rows(samples: pl.DataFrame, ids: Sequence[str]) -> pl.DataFrame:
    """Return the rows of ids, in their order."""
    wanted = pl.DataFrame({"sample_id": ids})
    return wanted.join(samples, on="sample_id", how="left", maintain_order="left")
