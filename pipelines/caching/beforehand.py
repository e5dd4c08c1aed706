"""What can be refused of a recipe before its teachers run, which takes days."""

import numpy as np
import polars as pl

from cache.samples import Samples
from eupe.errors import BadInput
from pipelines.images import index
from pipelines.images.labels import check_in_common, labels_of
from pipelines.recipe.config import DatasetConfig, Recipe

MOST_SAMPLES = 4096
"""Samples of a set whose labels are looked at, spread evenly."""


def check_sources(recipe: Recipe) -> None:
    """Refuse sources that are not there, and labels that Parquet files are not asked for.

    Opens nothing and starts nothing.

    Raises:
        BadInput: naming the source, or the set without the label.
    """
    for dataset in (*recipe.train.values(), recipe.held_out):
        index.check_there(dataset.source)
    label = recipe.evaluation.label
    for dataset in () if label is None else (*recipe.bank, recipe.held_out):
        asked = {*dataset.source.label_columns, *dataset.source.where}
        if dataset.source.kind == "parquet" and label not in asked:
            raise BadInput(
                f"evaluation.label = {label!r} is no label of {dataset.name}: its source keeps "
                f"{', '.join(sorted(asked)) or 'no column'} (source.label_columns); "
                "evaluation.label=null leaves kNN out"
            )


def check_labels(recipe: Recipe) -> None:
    """Refuse a label that indexed samples do not have, or whose values are of two alphabets.

    Raises:
        BadInput: naming a sample without it, or some labels of both sets.
        StoreError: a set is not indexed.
    """
    label = recipe.evaluation.label
    if label is None:
        return
    bank = [each for dataset in recipe.bank for each in _labels(recipe, dataset, label)]
    check_in_common(bank, _labels(recipe, recipe.held_out, label))


def _labels(recipe: Recipe, dataset: DatasetConfig, label: str) -> list[str]:
    samples = Samples.open(recipe.cache_root, dataset.name)
    places = np.unique(np.linspace(0, len(samples) - 1, MOST_SAMPLES).astype(np.int64))
    there = samples.at(places).filter(pl.col("uri").is_not_null())  # not taken out
    return labels_of(there, label)
