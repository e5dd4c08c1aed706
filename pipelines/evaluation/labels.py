"""The labels that encoders are judged by: of samples, and numbered alike on both sides."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipelines.evaluation.frozen import CentreViews
from pipelines.images.labels import check_in_common, labels_of


def labels(images: CentreViews, dataset: str, sample_ids: Sequence[str], label: str) -> list[str]:
    """Return a label of samples of a dataset.

    Raises:
        BadInput: a sample has none.
    """
    samples = images.feeds[dataset].source.samples
    return labels_of(samples.take(samples.rows_of(sample_ids)), label)


def numbered(bank: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Number the classes of two lists of labels alike, int64 [n] and [m].

    Raises:
        BadInput: not one label is in both, so that nothing can be predicted.
    """
    check_in_common(bank, queries)
    classes = {label: number for number, label in enumerate(sorted({*bank, *queries}))}
    known, asked = (torch.tensor([classes[label] for label in each]) for each in (bank, queries))
    return known, asked
