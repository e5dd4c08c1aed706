"""A sweep in words: what would be done, what was, and how much of it is shared."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from pipelines.sweeps.digests import Digests
from pipelines.sweeps.file import Run
from pipelines.sweeps.graph import Graph, Kind, expand
from pipelines.sweeps.standing import Standing, stand
from pipelines.sweeps.work import Done


def laid_out(runs: Sequence[Run]) -> Graph:
    """Return the graph of some runs; nothing is downloaded, built or written."""
    digests = Digests(runs[0].recipe.outputs)
    return expand([replace(run, recipe=digests.named(run.recipe)) for run in runs], digests.told)


def told(runs: Sequence[Run]) -> tuple[Graph, list[Standing]]:
    """Return the graph of some runs, as `laid_out`, and how it stands."""
    graph = laid_out(runs)
    return graph, stand(graph)


def rows(found: Sequence[Standing]) -> list[dict[str, str]]:
    """Return how nodes stand as rows of text."""
    return [
        {
            "node": each.node.address,
            "state": f"running {each.why}" if each.state == "running" else each.state,
            "MB": "" if each.num_bytes is None else f"{each.num_bytes / 1e6:,.1f}",
            "seconds": "" if each.seconds is None else f"{each.seconds:,.0f}",
            "why": "" if each.state == "running" else each.why,
        }
        for each in found
    ]


def plain(graph: Graph, found: Sequence[Standing]) -> dict[str, Any]:
    """Return how a sweep stands as plain data."""
    return {
        "nodes": [
            {
                "node": each.node.address,
                "kind": each.node.kind,
                "state": each.state,
                "why": each.why,
                "bytes": each.num_bytes,
                "seconds": each.seconds,
                "needs": [*each.node.needs],
            }
            for each in found
        ],
        "runs": {run.name: own for run, own in graph.runs},
        "asked": {kind: graph.count(kind)[0] for kind in get_args(Kind)},
        "distinct": {kind: graph.count(kind)[1] for kind in get_args(Kind)},
        "dedupe_factor": graph.asked / len(graph.nodes),
    }


def lines(graph: Graph, found: Sequence[Standing]) -> list[str]:
    """Say how much of a sweep is shared, and how much is left."""
    counts = [(kind, *graph.count(kind)) for kind in get_args(Kind)]
    kinds = [
        f"{kind}: {asked} asked for, {there} distinct" for kind, asked, there in counts if asked
    ]
    states = Counter(each.state for each in found)
    left = ", ".join(f"{number} {state}" for state, number in states.items())
    return [
        f"{len(graph.runs)} runs; {'; '.join(kinds)}",
        f"dedupe factor {graph.asked / len(graph.nodes):.2f}: {graph.asked} nodes asked for, "
        f"{len(graph.nodes)} distinct; {left}",
    ]


def ended(done: Done) -> list[str]:
    """Say what working a sweep did."""
    said = [f"{len(done.computed)} nodes computed here, {len(done.found)} were there"]
    said += [f"{address} failed: {why}" for address, why in done.failed.items()]
    said += [f"{address}: not begun, {cause} failed" for address, cause in done.stopped.items()]
    return said
