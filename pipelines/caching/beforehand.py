"""What can be refused of a recipe before its teachers run, which takes days."""

from collections.abc import Iterator

import numpy as np
import polars as pl
import torch

from cache.files import copies
from cache.samples import Samples
from eupe import weights
from eupe.encoders import shapes, weightless
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from pipelines.images import index
from pipelines.images.labels import check_in_common, labels_of
from pipelines.machines import cluster, pool, shared_folders
from pipelines.recipe import whole_batches
from pipelines.recipe.config import DatasetConfig, Recipe

MOST_SAMPLES = 4096
"""Samples of a set whose labels are looked at, spread evenly."""


def check(recipe: Recipe) -> None:
    """Refuse what can be told of a recipe before Ray, Prefect or a picture is needed.

    Raises:
        BadInput: the first fault of its sources or networks, or GPUs that are not there.
    """
    for refuse in CHECKS:
        refuse(recipe)


def refusals(recipe: Recipe) -> list[str]:
    """Return what `check` refuses, of each kind the first fault."""
    found = []
    for refuse in CHECKS:
        try:
            refuse(recipe)
        except BadInput as error:
            found.append(str(error))
    return found


def check_gpus(recipe: Recipe) -> None:
    """Refuse GPUs that are asked of this machine and that it does not have.

    Raises:
        BadInput: naming the fields that ask.
    """
    workers, per_actor = recipe.workers, recipe.extraction.gpus_per_actor
    there = torch.cuda.device_count()
    asked = []
    if workers.use_gpu and workers.count > there:
        many = f" and workers.count = {workers.count}" if there else ""
        asked.append(f"workers.use_gpu = true{many}")
    if per_actor > there:
        asked.append(f"extraction.gpus_per_actor = {per_actor:g}")
    if asked and cluster.address_named() is None:
        has = f"{there} GPU{'s' * (there > 1)}" if there else "no GPU"
        raise BadInput(
            f"{' and '.join(asked)}: this machine has {has} that torch sees; ask for "
            f"{'fewer' if there else 'none'}, or name a cluster that has GPUs in RAY_ADDRESS"
        )


def check_cluster(recipe: Recipe) -> None:
    """Refuse GPUs of an actor that no node of the cluster in RAY_ADDRESS has.

    Connects for a moment: indexing, which comes before the actors, may take hours.

    Raises:
        BadInput: no node has room for one actor, or the cluster does not answer.
    """
    extraction = recipe.extraction
    if not extraction.gpus_per_actor or cluster.address_named() is None:
        return
    with cluster.connect():
        import ray  # after `connect` has settled its environment

        pool.room(ray.nodes(), extraction.cpus_per_actor, extraction.gpus_per_actor)


def check_networks(recipe: Recipe) -> None:
    """Refuse networks that cannot be built or trained so, and weights that nobody has.

    They are built without weights, at every resolution; batch normalisation wants whole batches.

    No weights are read or fetched, no picture is looked at.

    Raises:
        BadInput: the first fault, with the field that has it.
    """
    for field, encoder, uri, resolutions in networks(recipe):
        try:
            for resolution in resolutions:
                shapes(encoder, resolution)
            if uri is not None:
                weights.check(uri, encoder)
        except BadInput as error:
            raise BadInput(f"{field}: {error}") from error
    for stage in recipe.stages.values():
        network = weightless(recipe.trained_by(stage).encoder).network
        whole_batches.check(network, stage, recipe.workers.count)


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


def check_places(recipe: Recipe) -> None:
    """Refuse a run in a bucket that nothing can be written to.

    Raises:
        BadInput: naming the bucket, and what it answers.
    """
    wanted = (copies.remote(folder) for folder in (recipe.directory, recipe.outputs))
    with shared_folders.laid([str(each) for each in wanted if each is not None]) as laid:
        for sentence in laid.refused.values():
            raise BadInput(sentence)


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


def networks(recipe: Recipe) -> Iterator[tuple[str, EncoderSpec, str | None, tuple[int, ...]]]:
    """Yield every network that a run builds: field, spec, weights, resolutions."""
    for name, teacher in recipe.teachers.items():
        yield f"teachers.{name}", teacher.encoder, teacher.weights, teacher.resolutions
    for field in ("proxy", "student"):
        if (trained := getattr(recipe, field)) is None:
            continue
        stages = [each for each in recipe.stages.values() if each.student == field]
        scales = {scale for stage in stages for scale in stage.student_resolutions}
        if scales:
            yield field, trained.encoder, trained.weights, tuple(sorted(scales))


CHECKS = (check_sources, check_gpus, check_places, check_networks)
"""What `check` calls, the cheapest first."""
