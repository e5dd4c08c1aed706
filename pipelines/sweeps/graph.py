"""The graph of a sweep: caches, stages and evaluations of all its runs; equal ones are one node."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from eupe import fingerprint as fp
from eupe.weights import digest
from pipelines.evaluation import report
from pipelines.recipe import addresses, marks
from pipelines.recipe.addresses import Digest
from pipelines.recipe.config import PIXELS, PROXY, Recipe, TeacherConfig
from pipelines.recipe.stage import StageName
from pipelines.recipe.stores import cache_jobs
from pipelines.sweeps.file import Run
from pipelines.training.outputs import Output

Kind = Literal["caches", "proxy caches", "stage", "evaluation"]


@dataclass(frozen=True)
class Node:
    """Something that is computed once, whichever runs ask for it.

    Attributes:
        kind: what it is.
        address: its name, a hash of what makes it.
        made_of: all that makes it, plain data.
        recipe: of the first run that asks for it; its run directory is that of its evaluation.
        needs: addresses of what it is made from.
        recipes: of all runs that ask for it; they may draw other views of a cache.
        teacher: whose features caches hold.
        output: of a stage.
    """

    kind: Kind
    address: str
    made_of: dict[str, Any] = field(compare=False, repr=False)
    recipe: Recipe = field(compare=False, repr=False)
    needs: tuple[str, ...]
    recipes: tuple[Recipe, ...] = field(default=(), compare=False, repr=False)
    teacher: str | None = None
    output: Output | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.address

    @property
    def place(self) -> Path:
        """Where its output lies, of caches only the lease on their work."""
        return self.recipe.outputs / self.address

    @property
    def claims(self) -> tuple[Path, ...]:
        """What is leased for its work: builds of caches, of many processes each, take turns."""
        turns = (self.recipe.outputs / "caches",) if self.teacher else ()
        return (*turns, self.place)


@dataclass(frozen=True)
class Graph:
    """What the runs of a sweep are made of.

    Attributes:
        nodes: address -> what is to be there, each after what it needs.
        runs: all runs, each with the addresses of its own nodes.
    """

    nodes: dict[str, Node]
    runs: list[tuple[Run, list[str]]]

    @property
    def asked(self) -> int:
        """How many nodes the runs ask for, each its own."""
        return sum(len(own) for _, own in self.runs)

    def sorter(self) -> "TopologicalSorter[str]":
        """Return the nodes in the order of their needs."""
        return TopologicalSorter({address: node.needs for address, node in self.nodes.items()})

    def count(self, kind: Kind) -> tuple[int, int]:
        """Return how many nodes of a kind the runs ask for, and how many there are."""
        asked = sum(self.nodes[each].kind == kind for _, own in self.runs for each in own)
        return asked, sum(node.kind == kind for node in self.nodes.values())


def expand(runs: Sequence[Run], digest_of: Digest = digest) -> Graph:
    """Lay out what some runs are made of; nothing is built, no place is written to.

    Args:
        runs: of a sweep.
        digest_of: of weights.

    Raises:
        BadInput: weights that cannot be read.
    """
    nodes, own = dict[str, Node](), list[tuple[Run, list[str]]]()
    for run in runs:
        found = _nodes(run.recipe, digest_of)
        for node in found:
            there = nodes.get(node.address, node)
            together = replace(there, recipes=(*there.recipes, node.recipe))
            nodes[node.address] = together
        own.append((run, [node.address for node in found]))
    return Graph({address: nodes[address] for address in _order(nodes)}, own)


def _order(nodes: dict[str, Node]) -> list[str]:
    """Order nodes after what they need, and otherwise as the runs ask for them."""
    needs = {address: node.needs for address, node in nodes.items()}
    return [*TopologicalSorter(needs).static_order()]


def _nodes(recipe: Recipe, digest_of: Digest) -> list[Node]:
    """Return the nodes of a run, each after what it needs."""
    caches = {
        each.name: _caches(recipe, each, digest_of) for each in cache_jobs(recipe)[0].teachers
    }
    nodes, known = [*caches.values()], dict[StageName, str]()
    for stage in recipe.stages.values():
        if PROXY in stage.teachers and PROXY not in caches:
            caches[PROXY] = _proxy_caches(recipe, known["stage1"])
            nodes.append(caches[PROXY])
        made = addresses.made_of(recipe, stage, known.__getitem__, digest_of)
        known[stage.name] = addresses.address(stage.name, made)
        needs = [caches[name].address for name in stage.teachers]
        needs += [caches[PIXELS].address] if PIXELS in caches else []
        needs += [] if stage.initial is None else [known[stage.initial]]
        output = Output(stage.name, made, recipe.outputs)
        nodes.append(Node("stage", output.address, made, recipe, tuple(needs), output=output))
    nodes.append(_evaluation(recipe, nodes, known))
    folder = str(recipe.outputs / nodes[-1].address)
    placed = recipe.model_copy(update={"run_directory": folder})
    return [replace(node, recipe=placed) for node in nodes]


def _caches(recipe: Recipe, teacher: TeacherConfig, digest_of: Digest) -> Node:
    made = {
        "sets": _sets(recipe),
        "encoder": teacher.encoder.model_dump(mode="json"),
        "weights": digest_of(teacher.weights, teacher.encoder),
        "dtype": teacher.dtype,
        "codec": teacher.codec,
        "resolutions": sorted(teacher.resolutions),
    }
    address = f"{teacher.name}-{fp.short(fp.fingerprint(made))}"
    return Node("caches", address, made, recipe, (), teacher=teacher.name)


def _proxy_caches(recipe: Recipe, stage1: str) -> Node:
    made = {
        "sets": _sets(recipe),
        "weights": stage1,
        "dtype": recipe.proxy_dtype,
        "codec": recipe.proxy_codec,
        "resolutions": [*recipe.scales_of_proxy],
    }
    address = f"{PROXY}-{fp.short(fp.fingerprint(made))}"
    return Node("proxy caches", address, made, recipe, (stage1,), teacher=PROXY)


def _evaluation(recipe: Recipe, nodes: Sequence[Node], stages: dict[StageName, str]) -> Node:
    needs = tuple(node.address for node in nodes)
    made = {
        "format": report.FORMAT,
        "stages": dict(stages),
        "caches": [node.address for node in nodes if node.kind != "stage"],
        "evaluation": marks.identity(recipe.evaluation),
        "names": [recipe.student.name, recipe.proxy and recipe.proxy.name],
    }
    address = f"evaluation-{fp.short(fp.fingerprint(made))}"
    return Node("evaluation", address, made, recipe, needs)


def _sets(recipe: Recipe) -> list[dict[str, Any]]:
    """Return which views of which sets are cached."""
    return [
        {
            "dataset": job.dataset.name,
            "source": marks.identity(job.dataset.source),
            "samples": addresses.samples(job.root, job.dataset.name),
            "views": job.views.model_dump(mode="json"),
            "num_views": job.num_views,
        }
        for job in cache_jobs(recipe)
    ]
