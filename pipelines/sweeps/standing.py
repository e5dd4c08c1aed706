"""How a sweep's graph stands: what is there, in work or failed, and why the rest is not there."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.errors import FingerprintMismatch, NotBuilt
from cache.files import atomic, place
from cache.format import layout
from eupe.errors import BadInput
from pipelines.evaluation import report
from pipelines.evaluation.evaluate import CORRECT_FILE
from pipelines.machines import lease
from pipelines.recipe.addresses import differing
from pipelines.recipe.stores import CacheJob, Opened, cache_jobs, proxy_jobs, store_specs
from pipelines.records import checkpoint
from pipelines.sweeps.digests import HUBS
from pipelines.sweeps.graph import Graph, Node
from pipelines.training import outputs

State = Literal["reuse", "compute", "running", "failed"]
EVALUATED_FILE = "evaluated.json"
FAILED = ".failed"
NEW = "nothing of its kind is there"


@dataclass(frozen=True)
class Standing:
    """How a node stands.

    Attributes:
        node: which.
        state: `running` names the host, `failed` says why.
        why: of a node that is not there, how it differs from the nearest that is.
        num_bytes: of its files; None where there are none, or nobody knows.
        seconds: that it took, or that the nearest one took; None where nobody knows.
    """

    node: Node
    state: State
    why: str = ""
    num_bytes: int | None = None
    seconds: float | None = None


def stand(graph: Graph) -> list[Standing]:
    """Say of every node how it stands.

    Raises:
        StoreError: a cache that is there cannot be read.
    """
    found, there, opened = list[Standing](), dict[str, bool](), Opened()
    for node in graph.nodes.values():
        ready = all(there[each] for each in node.needs) and not unread(node)
        there[node.address] = ready and is_there(node, opened)
        found.append(_stand(node, there[node.address], opened))
    return found


def is_there(node: Node, opened: Opened | None = None) -> bool:
    """Return True if all of a node is there. What it needs must be."""
    if node.output is not None:
        return node.output.judged()
    if node.kind == "evaluation":
        files = (EVALUATED_FILE, report.SUMMARY_FILE, report.REPORT_FILE, CORRECT_FILE)
        return all((node.place / name).is_file() for name in files)
    try:
        missing = next(_missing(node, opened or Opened()), None)
    except (NotBuilt, FingerprintMismatch):
        return False
    return missing is None


def unread(node: Node) -> bool:
    """Return True if weights would have to be downloaded to look for a teacher's caches."""
    teacher = node.recipe.teachers.get(node.teacher or "")
    return teacher is not None and teacher.weights.startswith(HUBS)


def jobs(node: Node) -> list[CacheJob]:
    """Return the jobs whose stores a node of caches is, of its teacher alone."""
    own = [
        job.model_copy(
            update={"teachers": tuple(each for each in job.teachers if each.name == node.teacher)}
        )
        for group in passes(node)
        for job in group
    ]
    return [*{job.model_dump_json(): job for job in own}.values()]


def passes(node: Node) -> list[list[CacheJob]]:
    """Return the jobs that build a node of caches, of all runs that draw from it.

    Those of the same teachers are a group: all experts of a run come from one decode.
    """
    found: dict[tuple[str, ...], dict[str, CacheJob]] = {}
    for recipe in node.recipes:
        if node.kind == "caches":
            wanted = cache_jobs(recipe)
        else:
            (stage1,) = node.needs
            wanted = proxy_jobs(recipe, recipe.outputs / stage1)
        for job in wanted:
            teachers = tuple(each.model_dump_json() for each in job.teachers)
            found.setdefault(teachers, {})[job.model_dump_json()] = job
    return [[*group.values()] for group in found.values()]


def failed(node: Node) -> tuple[str, float] | None:
    """Return why a node failed the last time, and when (seconds since 1970); None if it did not."""
    path = _failure(node)
    try:
        return path.read_text(), path.stat().st_mtime
    except OSError:
        return None


def set_failed(node: Node, why: str | None) -> None:
    """Write down that a node has failed, or None: that it has not."""
    path = _failure(node)
    if why is not None:
        atomic.write(path, [why.encode()], layout.scratch_directory(path.parent))
    else:
        path.unlink(missing_ok=True)


def _failure(node: Node) -> Path:
    return node.recipe.outputs / f"{node.address}{FAILED}"


def _stand(node: Node, there: bool, opened: Opened) -> Standing:
    holder = None if there else lease.holder(node.place)
    if holder is not None:
        return Standing(node, "running", f"on {holder}")
    if there:
        return Standing(node, "reuse", "", _bytes(node, opened), _seconds(node))
    why, seconds = _nearest(node)
    if (before := failed(node)) is not None:
        return Standing(node, "failed", before[0], None, seconds)
    return Standing(node, "compute", why, None, seconds)


def _missing(node: Node, opened: Opened) -> Iterator[str]:
    """Yield in words what is missing of the stores of a node of caches."""
    for job in jobs(node):
        for spec in store_specs(job):
            store = opened.store(job.root, spec)
            if todo := len(store.todo(job.wanted_of(store))):
                yield f"{spec.directory()}: {todo} shards are missing"


def _bytes(node: Node, opened: Opened) -> int:
    if node.kind in ("stage", "evaluation"):
        return sum(size for _, size, _ in place.listing(node.place))
    stores = [opened.store(job.root, spec) for job in jobs(node) for spec in store_specs(job)]
    each = {store.directory: store for store in stores}.values()
    return sum(store.manifest().total().num_bytes for store in each)


def _seconds(node: Node) -> float | None:
    return None if node.output is None else node.output.seconds() or None


def _nearest(node: Node) -> tuple[str, float | None]:
    """Say how a node that is not there differs from the nearest that is, and how long that took."""
    if node.output is not None:
        same = [
            each
            for each in outputs.known(node.output.root)
            if each.stage == node.output.stage and checkpoint.latest(each.directory)
        ]
        if not same:
            return NEW, None
        if node.output.done():
            return f"{node.output.done()} of {node.output.steps} steps are done", None
        near = min(same, key=lambda each: len([*differing(node.made_of, each.made_of)]))
        took = near.seconds() * node.output.steps / near.steps if near.finished() else None
        return outputs.first_difference(node.made_of, near.made_of), took or None
    if node.kind == "evaluation":
        return _nearest_evaluation(node), None
    if unread(node):
        return "its weights were never read here", None
    try:
        return next(_missing(node, Opened()), NEW), None
    except FingerprintMismatch as error:
        return error.lines[0] if error.lines else str(error), None
    except NotBuilt:
        return NEW, None
    except BadInput as error:  # a proxy that is not trained yet
        return str(error), None


def _nearest_evaluation(node: Node) -> str:
    there = [
        json.loads(path.read_bytes())["made_of"]
        for path in sorted(node.recipe.outputs.glob(f"*/{EVALUATED_FILE}"))
    ]
    if not there:
        return NEW
    near: Mapping[str, Any] = min(there, key=lambda each: len([*differing(node.made_of, each)]))
    return outputs.first_difference(node.made_of, near)


def note_evaluated(node: Node) -> None:
    """Write down that a node's evaluation is whole, and what it is made of."""
    text = json.dumps({"made_of": node.made_of}, indent=2).encode()
    atomic.write(node.place / EVALUATED_FILE, [text], layout.scratch_directory(node.place))
