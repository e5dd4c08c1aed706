"""The page of a sweep: every setting's students beside raw pixels and the experts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache.files import atomic
from cache.format import layout
from pipelines.evaluation import figures, pages
from pipelines.evaluation.tables import PROBE_TITLES
from pipelines.sweeps import results
from pipelines.sweeps.graph import Graph
from pipelines.sweeps.results import Compared

FILE = "results.html"
TEMPLATE = "sweeps/results.html.j2"


def write(graph: Graph, found: Sequence[Compared]) -> Path:
    """Write the page of a sweep beside its runs; return its path.

    Args:
        graph: of the sweep.
        found: of `results.compare`.

    Raises:
        StoreError: it cannot be written.
    """
    first = graph.runs[0][0].recipe
    path, rivals = first.directory.parent / FILE, results.rivals(graph)
    text = pages.page(
        TEMPLATE,
        name=first.name,
        axes=[*found[0].values],
        base=", ".join(found[0].values.values()),
        finished=len(results.finished(graph)),
        asked=len(graph.runs),
        label=first.evaluation.label,
        rows=results.rows(found, rivals),
        dots=dots(found, rivals),
    )
    atomic.write(path, [text.encode()], layout.scratch_directory(path.parent))
    return path


def dots(found: Sequence[Compared], rivals: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Draw every setting by every probe beside its rivals; the line is at raw pixels.

    Args:
        found: of `results.compare`.
        rivals: of `results.rivals`.

    Returns:
        an <svg> element, its text in the colour of its surroundings.
    """
    probes = [probe for probe in figures.DOTTED if any(each.probe == probe for each in found)]
    shares = {(*each.values.values(), each.probe): vars(each.share) for each in found}
    settings = list(dict.fromkeys(tuple(each.values.values()) for each in found))
    rows = [(who, "rival", [of[probe] for probe in probes]) for who, of in rivals.items()]
    rows += [
        (", ".join(setting), setting[0], [shares[*setting, probe] for probe in probes])
        for setting in settings
    ]
    (pixels, *_) = rivals.values()
    return figures.dots(
        rows, [PROBE_TITLES[each] for each in probes], [pixels[each]["value"] for each in probes]
    )
