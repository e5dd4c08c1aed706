"""Working a sweep: whatever is left of its graph, while other processes may work the same one.

A node is taken by its lease. What another process holds is left to it, and looked at again until
it is there or that process has died. What fails stops only what is made from it.
"""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from cache.errors import Busy
from pipelines.caching import beforehand, precompute
from pipelines.caching.indexing import index_samples, lookers
from pipelines.evaluation import during, report
from pipelines.machines import lease
from pipelines.machines.errors import bad_input
from pipelines.recipe.stores import cache_jobs
from pipelines.sweeps import standing
from pipelines.sweeps.digests import Digests
from pipelines.sweeps.file import Run
from pipelines.sweeps.graph import Graph, Node, expand
from pipelines.training import launch, outputs

POLL_SECONDS = 1.0


@dataclass
class Done:
    """What working a sweep did.

    Attributes:
        graph: of the sweep.
        computed: nodes that this process computed.
        found: nodes that were there, or that another process computed meanwhile.
        failed: address -> why.
        stopped: address -> the address of the failed node that it is made from.
    """

    graph: Graph
    computed: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)


def prepare(runs: Sequence[Run]) -> Graph:
    """Index the images of some runs, and lay out what they are made of.

    Raises:
        BadInput: a fault of a recipe, a source or weights.
        StoreError: a dataset that cannot be used or written.
    """
    for recipe in {run.recipe.model_dump_json(): run.recipe for run in runs}.values():
        beforehand.check(recipe)
    jobs = [job for run in runs for job in cache_jobs(run.recipe)]
    root = runs[0].recipe.outputs
    with lease.held(root / "index"):
        for job in {(job.root, job.dataset.name): job for job in jobs}.values():
            with lookers(job) as pool:
                index_samples(job, pool)
    return expand(runs, Digests(root).read)


def work(graph: Graph, run: Callable[[Node], bool] | None = None) -> Done:
    """Compute what is left of a graph; return when nothing of it is left, or can be had.

    Args:
        graph: of `prepare`.
        run: computes a node as `compute` does; None: that. Whoever orchestrates a sweep wraps it.

    Returns:
        what was done; failures are in it, and were said on stderr.
    """
    done, started = Done(graph), time.time()
    sorter = graph.sorter()
    sorter.prepare()
    ready = list[str]()
    while sorter.is_active():
        ready += sorter.get_ready()
        before = len(ready)
        for address in [*ready]:
            settled = _settle(graph.nodes[address], done, run or compute, started)
            if settled is None:
                continue
            ready.remove(address)
            if settled:
                sorter.done(address)
                ready += sorter.get_ready()
        if not ready:
            break  # what is left is made from what has failed
        if len(ready) == before:
            time.sleep(POLL_SECONDS)
    settled_nodes = {*done.computed, *done.found, *done.failed}
    for address, node in graph.nodes.items():
        if address not in settled_nodes:
            cause = next(each for each in node.needs if each in {*done.failed, *done.stopped})
            done.stopped[address] = done.stopped.get(cause, cause)
    _link_runs(graph, {*done.computed, *done.found})
    return done


def _settle(node: Node, done: Done, run: Callable[[Node], bool], started: float) -> bool | None:
    """Compute a node, if nobody does; return True if it is there, False if it failed, else None."""
    if standing.is_there(node):
        done.found.append(node.address)
        return True
    failure = standing.failed(node)
    if failure is not None and failure[1] >= started:  # of another process, meanwhile
        done.failed[node.address] = failure[0]
        return False
    if any(lease.holder(path) is not None for path in node.claims):
        return None
    try:
        computed = run(node)
    except Busy:
        return None
    except Exception as error:  # said, written down, and what follows from it is not begun
        sentence = bad_input(error)
        if sentence is None:
            traceback.print_exception(error)
        done.failed[node.address] = why = sentence or f"{type(error).__name__}: {error}"
        standing.set_failed(node, why)
        print(f"{node.address} failed: {why}", file=sys.stderr, flush=True)
        return False
    standing.set_failed(node, None)
    (done.computed if computed else done.found).append(node.address)
    over, all_of_them = len(done.computed) + len(done.found), len(done.graph.nodes)
    print(f"{node.address}: {over} of {all_of_them} are there", file=sys.stderr, flush=True)
    return True


def compute(node: Node) -> bool:
    """Compute a node whose needs are there.

    Returns:
        False if another process computed it before this one had its lease.

    Raises:
        Busy: another process does.
        BadInput: as for a build of caches, a training or a report.
        StoreError: likewise.
    """
    recipe = node.recipe
    if node.kind == "stage":
        assert node.output is not None
        stage = recipe.stage(node.output.stage)
        _link_stages(node)
        result = launch.train(recipe, stage, make_evaluate=during.hook, wait=False)
        return result.seconds > 0
    with ExitStack() as held:
        for path in node.claims:
            held.enter_context(lease.held(path, wait=False))
        if standing.is_there(node):
            return False
        if node.kind == "evaluation":
            _link_stages(node)
            took: dict[str, float] = {
                name: outputs.asked(recipe, stage).seconds()
                for name, stage in recipe.stages.items()
            }
            report.make(recipe, took)
            standing.note_evaluated(node)
        else:
            look_over = partial(beforehand.check_labels, recipe)
            built = precompute.build(standing.passes(node), look_over=look_over)
            print(built, file=sys.stderr)
    return True


def _link_stages(node: Node) -> None:
    """Let the run's folder name the stages that a node needs; all of them are there."""
    for stage in node.recipe.stages.values():
        output = outputs.asked(node.recipe, stage)
        if node.output is not None and output.address == node.address:
            return
        if output.finished():
            outputs.begin(node.recipe, output)


def _link_runs(graph: Graph, there: set[str]) -> None:
    """Let every run of the sweep be found by its name."""
    for run, own in graph.runs:
        if own[-1] in there:
            folder, link = graph.nodes[own[-1]].place, run.recipe.directory
            outputs.point(link, folder)
