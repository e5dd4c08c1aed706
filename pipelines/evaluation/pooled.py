"""Several runs of one recipe under several seeds, compared image by image with what is trivial."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cache.files import copies
from eupe.errors import BadInput
from eupe.paired import Interval, ratio_interval
from pipelines.evaluation.compare import INITIAL
from pipelines.evaluation.encoders import PROBES, Probe
from pipelines.evaluation.evaluate import CORRECT_FILE, Versus, versus
from pipelines.evaluation.networks import PIXELS
from pipelines.evaluation.tables import PROBE_TITLES, TRIVIAL, interval, percent
from pipelines.training import outputs

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Pooled:
    """What several runs say together by one probe.

    Attributes:
        final: share of held-out images that the students are right about, mean over runs.
        others: `pixels`, `init` and `expert` -> the same of raw pixels, of the students' own
            initialisations, and of the better expert.
        versus: `pixels` and `init` -> the students against it; interval over images and runs.
        expert: name of the better expert.
        way: part of the way from raw pixels to the better expert that the students have gone;
            None where no expert is better than raw pixels.
    """

    final: float
    others: dict[str, float]
    versus: dict[str, Versus]
    expert: str
    way: Interval | None


@dataclass(frozen=True)
class Judgement:
    """What a run was judged by, image by image.

    Attributes:
        directory: of the run.
        summary: the contents of its summary.json.
        correct: on which image which encoder is right, by each probe.
    """

    directory: Path
    summary: dict[str, Any]
    correct: pl.DataFrame

    @property
    def name(self) -> str:
        """The run's folder as its user knows it."""
        return str(copies.named(self.directory))

    @property
    def final(self) -> str:
        """Name of the encoder that the last stage made."""
        name: str = self.summary["student"]["final"]
        return name

    def right(self, encoder: str, probe: Probe) -> np.ndarray:
        """Return on which images an encoder is right, bool [q], by sample id."""
        own = self.correct.filter(pl.col("encoder") == encoder, pl.col("probe") == probe)
        if own.is_empty():
            raise BadInput(
                f"{self.name}/{CORRECT_FILE}: nothing of {encoder} by {probe}; `eupe report` "
                "writes it anew once summary.json is removed"
            )
        return own.sort("sample_id")["correct"].to_numpy()


def compare(directories: Sequence[Path]) -> dict[Probe, Pooled]:
    """Compare the final students of runs with raw pixels, their initialisations and the experts.

    Args:
        directories: of the runs, each once; every run was judged on the same images.

    Returns:
        probe -> what the runs say.

    Raises:
        BadInput: a folder without summary and correct.parquet, no labels, or runs that were judged
            on other images or by another label.
    """
    runs = [read(outputs.here(directory, stages=False)) for directory in directories]
    for number, run in enumerate(runs):
        if run.directory.resolve() in {each.directory.resolve() for each in runs[:number]}:
            raise BadInput(f"{run.name}: named twice; each run counts once")
    check_same(runs)
    return {probe: _pooled(runs, probe) for probe in PROBES}


def check_same(runs: Sequence[Judgement]) -> None:
    """Refuse runs that were judged on different images, or by another label.

    Raises:
        BadInput: naming the run.
    """
    first, ids = runs[0], _ids(runs[0])
    for run in runs:
        for key in ("label", "k"):
            if run.summary[key] != first.summary[key]:
                raise BadInput(
                    f"{run.name}: {key} is {run.summary[key]!r}, and in {first.name} "
                    f"{first.summary[key]!r}; runs that are pooled are judged alike"
                )
        if _ids(run) != ids:
            raise BadInput(
                f"{run.name}: judged on other held-out images than {first.name}; runs "
                "that are pooled are judged on the same ones"
            )


def described(pooled: Pooled) -> list[dict[str, str]]:
    """Return what a probe says as rows of a table; see `rows`."""
    table = [
        {
            "than": TRIVIAL[other],
            "final": percent(pooled.final),
            "theirs": percent(pooled.others[other]),
            "difference": interval(vars(each.difference)),
            "p": f"{each.p_value:.2g}",
        }
        for other, each in pooled.versus.items()
    ]
    way = "no expert is above raw pixels" if pooled.way is None else interval(vars(pooled.way))
    last = {
        "than": f"of the way from raw pixels to {pooled.expert}",
        "final": percent(pooled.final),
        "theirs": percent(pooled.others["expert"]),
        "difference": way,
        "p": "",
    }
    return [*table, last]


def rows(found: dict[Probe, Pooled]) -> list[dict[str, str]]:
    """Return what runs say together as a table: per cent, with 95 % bootstrap intervals."""
    return [
        {"probe": PROBE_TITLES[probe], **row}
        for probe, pooled in found.items()
        for row in described(pooled)
    ]


def read(directory: Path) -> Judgement:
    """Read what a run was judged by.

    Raises:
        BadInput: a folder without summary and correct.parquet, or judged without labels.
    """
    for name in (SUMMARY_FILE, CORRECT_FILE):
        if not (directory / name).is_file():
            raise BadInput(
                f"{copies.named(directory)} has no {name}: wants the folder of a run that `eupe "
                "run` or `eupe report` has finished"
            )
    summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    if "versus" not in summary:
        raise BadInput(f"{directory / SUMMARY_FILE} is of an older version: make its report anew")
    if summary["label"] is None:
        raise BadInput(f"{directory}: judged without labels (evaluation.label is null)")
    return Judgement(directory, summary, pl.read_parquet(directory / CORRECT_FILE))


def _ids(run: Judgement) -> list[str]:
    return run.correct["sample_id"].unique().sort().to_list()


def _pooled(runs: Sequence[Judgement], probe: Probe) -> Pooled:
    def right(name: str) -> np.ndarray:
        return np.stack([run.right(name, probe) for run in runs])

    def own(which: str) -> np.ndarray:
        return np.stack([run.right(run.summary["student"][which], probe) for run in runs])

    experts = {name: right(name) for name in runs[0].summary["encoders"][PIXELS]["neighbours"]}
    better = max(experts, key=lambda name: float(experts[name].mean()))
    final, pixels, initial = own("final"), right(PIXELS), own("initial")
    gone, whole = (each.astype(np.float64) - pixels for each in (final, experts[better]))
    return Pooled(
        final=float(final.mean()),
        others={
            PIXELS: float(pixels.mean()),
            INITIAL: float(initial.mean()),
            "expert": float(experts[better].mean()),
        },
        versus={PIXELS: versus(final, pixels), INITIAL: versus(final, initial)},
        expert=better,
        way=ratio_interval(gone, whole),
    )
