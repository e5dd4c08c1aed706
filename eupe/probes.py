"""Probes: what frozen features know, without training (kNN, paired test, cosine, PCA colours)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from eupe.errors import BadInput

MAX_DISTANCES = 2**26
"""Distances held at once, float64: half a gibibyte."""


def knn_predict(
    bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], queries: Float[Tensor, "q d"], k: int
) -> Int64[Tensor, " q"]:
    """Label each query by the majority of its k nearest bank vectors in L2 distance.

    EUPE (arXiv:2603.22387), IN1k-kNN: k = 10. Equal distances go to the earlier bank row,
    equal votes to the label of the nearest voter, so that the answer is one on every device.

    Args:
        bank: summaries [n, D].
        labels: [n], whole numbers from 0.
        queries: summaries [q, D].
        k: neighbours.

    Returns:
        labels [q].

    Raises:
        ValueError: k that is no whole number of bank rows, labels of another length or below 0,
            or a value that is not finite.
    """
    if not 1 <= k <= len(bank):
        raise BadInput(f"k = {k}: wants 1 to the {len(bank)} vectors of the bank")
    if len(labels) != len(bank) or bool((labels < 0).any()):
        raise ValueError(f"{len(labels)} labels for {len(bank)} vectors: wants one each, from 0")
    if not bool(bank.isfinite().all() and queries.isfinite().all()):
        raise BadInput("kNN: the bank or the queries hold values that are not finite")
    num_classes = int(labels.max()) + 1
    bank, queries = bank.double(), queries.double()  # |a|^2 - 2ab + |b|^2 cancels in float32
    chunks = torch.split(queries, max(1, MAX_DISTANCES // len(bank)))
    return torch.cat([_vote(labels[_nearest(bank, chunk, k)], num_classes) for chunk in chunks])


def top1(predicted: Int64[Tensor, " q"], labels: Int64[Tensor, " q"]) -> float:
    """Return the share of queries whose label is right, 0 to 1."""
    return float((predicted == labels).double().mean())


def paired_test(correct_a: Bool[Tensor, " q"], correct_b: Bool[Tensor, " q"]) -> float:
    """Return the two-sided p-value that a and b are right equally often (exact McNemar test).

    Only the queries on which they differ speak: under the null hypothesis each falls to either
    side with chance one half.

    Args:
        correct_a: [q], True if a was right.
        correct_b: [q], True if b was right, on the same queries.
    """
    only_a = int((correct_a & ~correct_b).sum())
    only_b = int((correct_b & ~correct_a).sum())
    differing = only_a + only_b
    tail = sum(math.comb(differing, wins) for wins in range(min(only_a, only_b) + 1))
    return min(1.0, float(2 * tail / 2**differing))


def pca_rgb(maps: Sequence[Float[Tensor, "_ _ d"]]) -> list[Float[Tensor, "_ _ 3"]]:
    """Show patch tokens as colours: their first three principal components over all maps.

    Each component is scaled to [0, 1] between its 1st and 99th percentile, over all maps alike, and
    signed so that its largest loading is positive: a figure does not flip between runs.

    Args:
        maps: patches [H, W, D] of each image; grids may differ, D may not.

    Returns:
        colours [H, W, 3] of each image, float32.
    """
    tokens = torch.cat([patches.flatten(0, 1) for patches in maps]).double()
    centred = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    shown = centred @ axes
    low, high = shown.quantile(0.01, dim=0), shown.quantile(0.99, dim=0)
    colours = ((shown - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    parts = torch.split(colours, [patches.shape[0] * patches.shape[1] for patches in maps])
    return [part.view(*patches.shape[:2], 3) for part, patches in zip(parts, maps, strict=True)]


def _nearest(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Return the rows of the k nearest bank vectors [q, k], nearest first, ties by row."""
    distances = torch.cdist(queries, bank, compute_mode="use_mm_for_euclid_dist")
    farthest = distances.topk(k, dim=1, largest=False).values[:, -1:]
    near = distances <= farthest  # more than k where equals of the farthest are left out
    tied = near.sum(1) > k
    nearest = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    rows = near[~tied].nonzero()[:, 1].view(-1, k)  # rising
    order = distances[~tied].gather(1, rows).sort(dim=1, stable=True).indices
    nearest[~tied] = rows.gather(1, order)
    nearest[tied] = distances[tied].sort(dim=1, stable=True).indices[:, :k]
    return nearest


def _vote(neighbours: Tensor, num_classes: int) -> Tensor:
    """Return the majority label of neighbours [q, k], nearest first; ties go to the nearest."""
    votes = torch.zeros(len(neighbours), num_classes, device=neighbours.device)
    votes.scatter_add_(1, neighbours, torch.ones_like(neighbours, dtype=votes.dtype))
    winning = votes.gather(1, neighbours) == votes.max(1, keepdim=True).values
    first = winning.int().argmax(1, keepdim=True)
    return neighbours.gather(1, first)[:, 0]
