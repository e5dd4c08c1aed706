"""Every encoder judged alike: two kNN protocols, a linear probe, and likeness to the teachers.

Figures are of held-out images. Each stands with its 95 % bootstrap interval over them.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from eupe.likeness import linear_cka, shared_neighbours
from eupe.linear_probe import linear_probe
from eupe.paired import Interval, mean_interval, share_interval
from eupe.probes import cosine_neighbours, knn_cosine, knn_predict

Probe = Literal["knn_paper", "knn_cosine", "knn_cosine_20", "linear"]
PROBES: tuple[Probe, ...] = ("knn_paper", "knn_cosine", "knn_cosine_20", "linear")
"""`knn_paper`: class token, L2, majority of k. `knn_cosine`: L2-normalised, votes of k weighted by
softmax at temperature 0.07; `knn_cosine_20`: of 20. `linear`: logistic regression."""
MOST_NEIGHBOURS = 20
ALIKE_NEIGHBOURS = 10
LINEAR_BANK = 50_000
"""Images that a linear probe is fitted to at most, spread evenly: it takes hours on a million."""
LINEAR_WORKERS = 8
"""Fits at once at most: each holds its bank in float64."""


@dataclass(frozen=True)
class Vectors:
    """What an encoder made of the images.

    Attributes:
        resolution: it read them at, pixels a side.
        bank: summaries of the bank [n, D].
        queries: summaries of the held-out images [q, D].
    """

    resolution: int
    bank: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Classes:
    """The classes of the images, numbered alike.

    Attributes:
        bank: int64 [n].
        queries: int64 [q].
    """

    bank: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Judged:
    """How good an encoder is.

    Attributes:
        resolution: it read the images at, pixels a side.
        probes: probe -> share of held-out images that it is right about; empty without labels.
        correct: probe -> on which of them, bool [q].
        regularisation: C of its linear probe; None without labels.
        converged: True if the linear probe's fit ended by itself.
        neighbours: teacher -> share of the ten nearest in the bank, by cosine, that both name.
        cka: teacher -> linear CKA over the held-out images.
    """

    resolution: int
    probes: dict[Probe, Interval]
    correct: dict[Probe, np.ndarray]
    regularisation: float | None
    converged: bool
    neighbours: dict[str, Interval]
    cka: dict[str, float]


def judge(
    encoders: Mapping[str, Vectors],
    classes: Classes | None,
    k: int,
    teachers: Sequence[str],
    device: str | torch.device = "cpu",
) -> dict[str, Judged]:
    """Judge every encoder by every probe.

    Args:
        encoders: name -> what it made of the same images.
        classes: of the images; None leaves out what needs labels.
        k: neighbours of `knn_paper` and `knn_cosine`.
        teachers: names of encoders that the others are compared with.
        device: to find neighbours on.
    """
    most = min(max(k, MOST_NEIGHBOURS), min(len(each.bank) for each in encoders.values()))
    alike = {
        name: cosine_neighbours(each.bank.to(device), each.queries.to(device), most)
        for name, each in encoders.items()
    }
    correct: dict[str, dict[Probe, np.ndarray]] = {name: {} for name in encoders}
    fitted: dict[str, tuple[float, bool]] = {}
    if classes is not None:
        known, truth = classes.bank.to(device), classes.queries
        for name, each in encoders.items():
            guesses: dict[Probe, Tensor] = {
                "knn_paper": knn_predict(each.bank.to(device), known, each.queries.to(device), k),
                "knn_cosine": knn_cosine(alike[name], known, k),
                "knn_cosine_20": knn_cosine(alike[name], known, MOST_NEIGHBOURS),
            }
            correct[name] |= {probe: (by.cpu() == truth).numpy() for probe, by in guesses.items()}
        for name, (right, regularisation, converged) in _linear(encoders, classes).items():
            correct[name]["linear"] = right
            fitted[name] = regularisation, converged
    return {
        name: Judged(
            resolution=each.resolution,
            probes={probe: share_interval(correct[name][probe]) for probe in correct[name]},
            correct=correct[name],
            regularisation=fitted[name][0] if name in fitted else None,
            converged=name not in fitted or fitted[name][1],
            neighbours={
                teacher: mean_interval(
                    shared_neighbours(
                        *(alike[who][0][:, :ALIKE_NEIGHBOURS] for who in (name, teacher))
                    )
                    .cpu()
                    .numpy()
                )
                for teacher in teachers
            },
            cka={
                teacher: linear_cka(each.queries, encoders[teacher].queries) for teacher in teachers
            },
        )
        for name, each in encoders.items()
    }


def _linear(
    encoders: Mapping[str, Vectors], classes: Classes
) -> dict[str, tuple[np.ndarray, float, bool]]:
    """Return encoder -> where its linear probe is right, its C, and True if its fit converged."""
    count = len(classes.bank)
    rows = torch.linspace(0, count - 1, min(count, LINEAR_BANK), dtype=torch.float64).long()
    labels, truth = classes.bank[rows].numpy(), classes.queries.numpy()

    def one(name: str) -> tuple[np.ndarray, float, bool]:
        bank, queries = encoders[name].bank[rows], encoders[name].queries
        found = linear_probe(bank.double().numpy(), labels, queries.double().numpy())
        return found.predicted == truth, found.regularisation, found.converged

    threads = min(os.cpu_count() or 1, LINEAR_WORKERS)
    # Filters are the whole process's: they are set around the threads, not in each.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as workers:
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is in what is returned
        return dict(zip(encoders, workers.map(one, encoders), strict=True))
