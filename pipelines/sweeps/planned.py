"""The plan of a sweep: what all of its runs take, what they share once."""

from collections.abc import Mapping
from dataclasses import replace

from pipelines.caching import plan
from pipelines.caching.plan import Plan
from pipelines.caching.rates import Rates
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.stage import StageName
from pipelines.sweeps.graph import Graph


def of_graph(graph: Graph, rates: Rates, images: Mapping[str, int]) -> Plan:
    """Plan what some runs are made of: each store and each stage once.

    Args:
        graph: of the sweep.
        rates: what codecs keep beside their codes is assumed there.
        images: dataset -> pictures, for those that are not indexed here.

    Returns:
        the plan; stages are named by their addresses.

    Raises:
        UnknownSize: of a set that is not indexed here.
        BadInput: a network that cannot be built.
    """
    found = Plan()
    for run, own in graph.runs:
        addresses = {
            node.output.stage: node.address
            for node in (graph.nodes[each] for each in own)
            if node.output is not None
        }
        found += _of_run(run.recipe, addresses, plan.of_recipe(run.recipe, rates, images))
    return found


def _of_run(recipe: Recipe, addresses: Mapping[StageName, str], own: Plan) -> Plan:
    """Name the stages of a run's plan, and the stores of its proxy, by what makes them."""
    proxy = addresses.get("stage1", "")
    named = {
        key: f"{proxy} {key}" if store.teacher == PROXY else key
        for key, store in own.stores.items()
    }
    stages = zip(recipe.stages, own.stages.values(), strict=True)
    return Plan(
        stores={named[key]: replace(each, key=named[key]) for key, each in own.stores.items()},
        stages={addresses[name]: replace(each, name=addresses[name]) for name, each in stages},
        pictures=own.pictures,
        passes={frozenset(named[key] for key in keys): each for keys, each in own.passes.items()},
    )
