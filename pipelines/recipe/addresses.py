"""Addresses: all that makes a stage's output, as plain data, and the name that its hash gives it.

An earlier stage stands in it by its own address, so that every address is known before anything is
trained. What only follows from it (moments, the weights of an earlier stage) is not hashed. Where
things lie is no part of it (laws 14 and 15).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cache.codec.known import default_codec
from cache.errors import NotBuilt
from cache.samples import Samples
from eupe import fingerprint as fp
from eupe.spec import EncoderSpec
from eupe.weights import digest
from pipelines.recipe import marks
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.stage import StageConfig, StageName

DRAWS = 2
"""Version of order, mix and view numbers: a run goes on only with the draws it began with."""
LONGEST = 80
"""Characters of a value that a sentence shows."""
NOTHING = "nothing"
"""Said of a field that one side does not have."""

Digest = Callable[[str, EncoderSpec], str]
"""(weights, network) -> the digest of the tensors."""


def made_of(
    recipe: Recipe,
    stage: StageConfig,
    address_of: Callable[[StageName], str],
    digest_of: Digest = digest,
) -> dict[str, Any]:
    """Return all that makes a stage's output, plain data.

    Of a data set it has how many samples are indexed, None where it is not: a set that has grown
    teaches otherwise. Held-out images judge, and are no part of it.

    Args:
        recipe: the run.
        stage: one of its stages.
        address_of: an earlier stage -> the address of its output.
        digest_of: of weights.

    Raises:
        BadInput: weights that cannot be read.
    """
    student, initial = recipe.trained_by(stage), None
    if stage.initial is not None:
        initial = address_of(stage.initial)
    elif student.weights is not None:
        initial = digest_of(student.weights, student.encoder)
    return {
        "draws": DRAWS,
        "seed": recipe.seed,
        "stage": marks.identity(stage),
        "student": student.encoder.model_dump(mode="json"),
        "initial_weights": initial,
        "train": [[*share] for share in recipe.shares.items()],  # in order: the mix draws by it
        "sources": {name: marks.identity(each.source) for name, each in recipe.train.items()},
        "homogeneous": dict(recipe.homogeneous),
        "samples": {name: samples(recipe.cache_root, name) for name in recipe.train},
        "views": recipe.views.model_dump(mode="json"),
        "num_views": {name: recipe.views_of(name) for name in recipe.train},
        **lanes(recipe),
        "teachers": {
            name: _proxy(recipe, address_of("stage1"))
            if name == PROXY
            else _expert(recipe, name, digest_of)
            for name in stage.teachers
        },
    }


def address(stage: StageName, made: Mapping[str, Any]) -> str:
    """Return the name of the output of a stage that is made of this."""
    return f"{stage}-{fp.short(fp.fingerprint(made))}"


def lanes(recipe: Recipe) -> dict[str, int]:
    """Return what the lanes add to an address: nothing where there is one, as before there were."""
    return {"lanes": recipe.lanes} if recipe.lanes > 1 else {}


def differing(asked: object, there: object, path: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield (path, asked, there) of every field in which two pieces of plain data differ."""
    if isinstance(asked, Mapping) and isinstance(there, Mapping):
        for key in {**asked, **there}:
            yield from differing(
                asked.get(key, NOTHING), there.get(key, NOTHING), f"{path}.{key}" if path else key
            )
    elif fp.canonical_json(asked) != fp.canonical_json(there):
        yield path, asked, there


def said(value: object) -> str:
    """Return a value as it is named beside another one: short."""
    text = value if value == NOTHING else fp.canonical_json(value).decode()
    return text if len(str(text)) <= LONGEST else f"{str(text)[:LONGEST]}..."


def _expert(recipe: Recipe, name: str, digest_of: Digest) -> dict[str, Any]:
    teacher = recipe.teachers[name]
    return {
        "encoder": teacher.encoder.model_dump(mode="json"),
        "weights": digest_of(teacher.weights, teacher.encoder),
        "dtype": teacher.dtype,
        "codec": default_codec(teacher.codec).model_dump(mode="json"),
        "resolutions": sorted(teacher.resolutions),  # one normaliser over all of them (law 9)
    }


def _proxy(recipe: Recipe, weights: str) -> dict[str, Any]:
    return {
        "weights": weights,
        "dtype": recipe.proxy_dtype,
        "codec": default_codec(recipe.proxy_codec).model_dump(mode="json"),
        "resolutions": [*recipe.scales_of_proxy],
    }


def samples(root: str, dataset: str) -> dict[str, int] | None:
    """Say how many samples of a dataset are indexed, and how they are laid out; None: it is not."""
    try:
        found = Samples.open(root, dataset)
    except NotBuilt:
        return None
    return {"count": len(found), "rows_per_shard": found.rows_per_shard}
