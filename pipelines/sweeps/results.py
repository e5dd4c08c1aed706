"""Results of a sweep: every figure of every run in one tidy table, each setting beside the base."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import polars as pl

from cache.files import atomic
from cache.format import layout
from eupe.errors import BadInput
from eupe.paired import Interval, runs_interval
from pipelines.evaluation import pooled, report
from pipelines.evaluation.encoders import PROBES, Probe
from pipelines.evaluation.evaluate import Versus, versus
from pipelines.evaluation.networks import PIXELS
from pipelines.evaluation.pooled import Judgement
from pipelines.evaluation.tables import PROBE_TITLES, interval
from pipelines.sweeps import standing
from pipelines.sweeps.file import Run
from pipelines.sweeps.graph import Graph

FILE = "results.parquet"
FIGURES = {
    "encoder": pl.String,
    "metric": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}


@dataclass(frozen=True)
class Compared:
    """A setting's final student by one probe, over its seeds.

    Attributes:
        values: axis -> name of its value.
        seeds: of its runs that are finished.
        probe: which.
        share: of held-out images that it is right about; interval over images and seeds.
        versus: against the base, of the seeds that both have; None for the base itself.
    """

    values: dict[str, str]
    seeds: tuple[int, ...]
    probe: Probe
    share: Interval
    versus: Versus | None


def finished(graph: Graph) -> list[tuple[Run, Path]]:
    """List the runs of a sweep whose evaluation is there, each with its folder."""
    ends = [(run, graph.nodes[own[-1]]) for run, own in graph.runs]
    return [(run, node.place) for run, node in ends if standing.is_there(node)]


def has_base(graph: Graph) -> bool:
    """Return True if a run of the base is finished, which others can be compared with."""
    base = graph.runs[0][0].values
    return any(run.values == base for run, _ in finished(graph))


def table(graph: Graph) -> pl.DataFrame:
    """Return every figure of every finished run: run, a column an axis, seed, then FIGURES."""
    axes = [*graph.runs[0][0].values]
    rows = [
        {"run": run.name, **run.values, "seed": run.seed, **figure}
        for run, folder in finished(graph)
        for figure in _figures(json.loads((folder / report.SUMMARY_FILE).read_bytes()))
    ]
    keys = {"run": pl.String, **dict.fromkeys(axes, pl.String), "seed": pl.Int64}
    return pl.DataFrame(rows, {**keys, **FIGURES})


def write(graph: Graph) -> Path:
    """Write the table of a sweep beside its runs; return its path.

    Raises:
        StoreError: it cannot be written.
    """
    path = graph.runs[0][0].recipe.directory.parent / FILE
    scratch = layout.scratch_directory(path.parent)
    out = io.BytesIO()
    table(graph).write_parquet(out)
    atomic.write(path, [out.getvalue()], scratch)
    return path


def compare(graph: Graph) -> list[Compared]:
    """Compare each setting's final students with those of the base, by every probe.

    Raises:
        BadInput: no run of the base is finished, or runs were judged on different images.
    """
    by_setting = dict[tuple[str, ...], dict[int, Judgement]]()
    for run, folder in finished(graph):
        own = by_setting.setdefault(tuple(run.values.values()), {})
        own[run.seed] = pooled.read(folder)
    base = tuple(graph.runs[0][0].values.values())
    if base not in by_setting:
        raise BadInput(f"{'_'.join(base)}: the base is not finished: nothing to compare with")
    judged = [each for own in by_setting.values() for each in own.values()]
    pooled.check_same(judged)
    axes = [*graph.runs[0][0].values]
    return [
        _compared(dict(zip(axes, setting, strict=True)), own, by_setting[base], probe)
        for setting, own in by_setting.items()
        for probe in PROBES
    ]


def _compared(
    values: dict[str, str],
    own: Mapping[int, Judgement],
    base: Mapping[int, Judgement],
    probe: Probe,
) -> Compared:
    share = runs_interval(_right(own, sorted(own), probe).astype(np.float64))
    both = sorted({*own} & {*base})
    against = None
    if both and own is not base:
        against = versus(_right(own, both, probe), _right(base, both, probe))
    return Compared(values, tuple(sorted(own)), probe, share, against)


def _right(runs: Mapping[int, Judgement], seeds: Sequence[int], probe: Probe) -> np.ndarray:
    """Return on which images the final students are right, bool [seeds, q]."""
    return np.stack([runs[seed].right(runs[seed].final, probe) for seed in seeds])


def rivals(graph: Graph) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """Return what students stand beside, raw pixels and experts: words -> probe -> interval.

    They are those of the first finished run, each at the evaluation's resolution or its own.
    """
    _, folder = finished(graph)[0]
    summary = json.loads((folder / report.SUMMARY_FILE).read_bytes())
    experts = [name for name in summary["encoders"] if name in graph.runs[0][0].recipe.teachers]
    return {summary["titles"][name]: summary["encoders"][name] for name in (PIXELS, *experts)}


def rows(
    found: Sequence[Compared],
    beside: Mapping[str, Mapping[str, Mapping[str, float]]] = MappingProxyType({}),
) -> list[dict[str, str]]:
    """Return a comparison as a table of text: per cent, 95 % intervals.

    Args:
        found: of `compare`.
        beside: of `rivals`; they come first.
    """
    axes = [*found[0].values]
    return [
        {
            **dict.fromkeys(axes, ""),
            axes[0]: who,
            "seeds": "",
            "probe": PROBE_TITLES[probe],
            "student": interval(of[probe]),
            "beside the base": "",
            "p": "",
        }
        for who, of in beside.items()
        for probe in PROBES
        if probe in of
    ] + [
        {
            **each.values,
            "seeds": str(len(each.seeds)),
            "probe": PROBE_TITLES[each.probe],
            "student": interval(vars(each.share)),
            "beside the base": difference,
            "p": p,
        }
        for each in found
        for difference, p in [_said(each.versus)]
    ]


def _said(found: Versus | None) -> tuple[str, str]:
    return (
        ("base", "")
        if found is None
        else (interval(vars(found.difference)), f"{found.p_value:.2g}")
    )


def _figures(summary: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Yield the figures of a run's summary."""
    encoders = summary["encoders"]
    assert isinstance(encoders, Mapping)
    for encoder, found in encoders.items():
        for metric in (*PROBE_TITLES,):
            if metric in found:
                ends = {name: found[metric][name] for name in ("value", "low", "high")}
                yield {"encoder": encoder, "metric": metric, **ends}
        for teacher, near in found["neighbours"].items():
            yield {"encoder": encoder, "metric": f"neighbours/{teacher}", **near}
    cosine, student = summary["cosine"], summary["student"]
    assert isinstance(cosine, Mapping)
    assert isinstance(student, Mapping)
    for kind, found in cosine.items():
        ends = {"value": found["final"], "low": found["low"], "high": found["high"]}
        yield {"encoder": student["final"], "metric": f"cosine/{kind}", **ends}
