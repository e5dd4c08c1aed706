"""Probes: what frozen features know, without training (kNN in two protocols, PCA colours)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from eupe.neighbours import nearest

TEMPERATURE = 0.07
"""Of the votes by cosine, as in the protocol behind the published figure."""


def knn_predict(
    bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"], queries: Float[Tensor, "q d"], k: int
) -> Int64[Tensor, " q"]:
    """Label each query by the majority of its k nearest bank vectors in L2 distance.

    EUPE (arXiv:2603.22387), IN1k-kNN: k = 10. Equal distances go to the earlier bank row, equal
    votes to the smallest label, as scikit-learn has it.

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
    _check(labels, bank)
    rows, _ = nearest(bank, queries, k)
    return _elected(labels[rows], torch.ones_like(rows, dtype=torch.float64))


def cosine_neighbours(
    bank: Float[Tensor, "n d"], queries: Float[Tensor, "q d"], k: int
) -> tuple[Int64[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Find each query's k most similar bank vectors by cosine, the most similar first.

    Returns:
        rows [q, k] and cosines [q, k], float64.

    Raises:
        BadInput: k that is no whole number of bank rows, or a value that is not finite.
    """
    units = [F.normalize(each.double(), dim=-1) for each in (bank, queries)]
    rows, squares = nearest(units[0], units[1], k)
    return rows, 1 - squares / 2


def knn_cosine(
    neighbours: tuple[Int64[Tensor, "q m"], Float[Tensor, "q m"]],
    labels: Int64[Tensor, " n"],
    k: int,
) -> Int64[Tensor, " q"]:
    """Label each query by its k most similar vectors, their votes softmax(cosine / 0.07).

    The protocol behind EUPE's published figure of IN1k-kNN, whatever its text says.

    Args:
        neighbours: of each query, at least k, as `cosine_neighbours` gives them.
        labels: of the bank [n], whole numbers from 0.
        k: neighbours.

    Returns:
        labels [q]; equal votes go to the smallest.
    """
    rows, cosines = (each[:, :k] for each in neighbours)
    return _elected(labels[rows], (cosines / TEMPERATURE).softmax(1))


def top1(predicted: Int64[Tensor, " q"], labels: Int64[Tensor, " q"]) -> float:
    """Return the share of queries whose label is right, 0 to 1."""
    return float((predicted == labels).double().mean())


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


def _check(labels: Tensor, bank: Tensor) -> None:
    if len(labels) != len(bank) or bool((labels < 0).any()):
        raise ValueError(f"{len(labels)} labels for {len(bank)} vectors: wants one each, from 0")


def _elected(voters: Tensor, weights: Tensor) -> Tensor:
    """Return the label [q] with most weight among voters' labels [q, k]; equal: the smallest."""
    votes = weights.new_zeros(len(voters), int(voters.max()) + 1)
    return votes.scatter_add_(1, voters, weights).argmax(1)
