"""The recipes at a glance: what each trains, its size and cost, and the paper's figures beside."""

from typing import NamedTuple

from eupe.costs import cost
from pipelines.recipe import paper, recipes
from pipelines.recipe.paper import Published


class Entry(NamedTuple):
    """One recipe and the network that its last stage trains.

    Attributes:
        recipe: its name.
        network: the name of what is trained.
        stages: in their order.
        parameters: of the network, without classifier and adapter heads.
        resolution: the smallest that the last stage shows it, pixels.
        multiply_adds: of one picture at that resolution.
        published: what the paper prints of it; None for twins and demos.
    """

    recipe: str
    network: str
    stages: tuple[str, ...]
    parameters: int
    resolution: int
    multiply_adds: int
    published: Published | None


def entries() -> list[Entry]:
    """Count every recipe's network, on the meta device: no weights are made or read."""
    return [entry(name) for name in recipes.RECIPES]


def entry(name: str) -> Entry:
    """Count one recipe's network.

    Raises:
        BadInput: there is no such recipe, naming the nearest.
    """
    recipe = recipes.get(name)
    last = recipe.last
    network = recipe.trained_by(last)
    resolution = min(last.student_resolutions)
    found = cost(network.encoder, resolution)
    return Entry(
        name,
        network.name,
        tuple(recipe.stages),
        found.parameters,
        resolution,
        found.multiply_adds,
        paper.PUBLISHED.get(name),
    )


def table(found: list[Entry]) -> list[dict[str, object]]:
    """Return the rows that `eupe recipes` prints: millions of parameters, billions of operations.

    A multiply-add is two FLOPs. The paper prints FLOPs for its transformers and multiply-adds for
    its ConvNeXts (`paper.PUBLISHED`), so both are there to compare.
    """
    return [
        {
            "recipe": each.recipe,
            "stages": " ".join(name.removeprefix("stage") for name in each.stages),
            "network": each.network,
            "M parameters": f"{each.parameters / 1e6:.2f}",
            "published": "" if each.published is None else _millions(each.published),
            "at px": each.resolution,
            "G multiply-adds": f"{each.multiply_adds / 1e9:.2f}",
            "GFLOPs": f"{2 * each.multiply_adds / 1e9:.2f}",
            "published GFLOPs": "" if each.published is None else _gflops(each.published),
        }
        for each in found
    ]


def plain(each: Entry) -> dict[str, object]:
    """Return an entry as plain data, for JSON."""
    published = each.published
    return {**each._asdict(), "published": None if published is None else published._asdict()}


def _millions(published: Published) -> str:
    return f"{published.parameters_millions:g}"


def _gflops(published: Published) -> str:
    if published.gflops_256 is None:
        return ""
    return f"{published.gflops_256:g}" + (
        " (multiply-adds)" if published.counts_multiply_adds else ""
    )
