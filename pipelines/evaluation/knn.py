"""kNN top-1: held-out images' labels predicted from their neighbours among the bank's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from eupe.probes import knn_predict, paired_test
from pipelines.evaluation.compare import FINAL, INITIAL, Seen
from pipelines.evaluation.frozen import CentreViews
from pipelines.images.labels import check_in_common, labels_of


@dataclass(frozen=True)
class Knn:
    """What the kNN probe found; figures of encoders are shares of the queries, 0 to 1.

    Attributes:
        label: what it predicts.
        k: neighbours.
        bank: images it looks among.
        queries: images it predicts.
        pixels: with raw pixels, 16 x 16: what is had without any encoder.
        teacher: teacher -> with its cached summaries.
        init: with the summaries of the student before training.
        final: with those of the student after.
        p_value: exact paired test that both students are right equally often.
        p_value_pixels: the same of the student after training and raw pixels.
    """

    label: str
    k: int
    bank: int
    queries: int
    pixels: float
    teacher: dict[str, float]
    init: float
    final: float
    p_value: float
    p_value_pixels: float

    @property
    def loses(self) -> bool:
        """True if the student is right less often than raw pixels are."""
        return self.final < self.pixels


def probe(
    images: CentreViews,
    banks: Mapping[str, Seen],
    queries: Seen,
    device: str | torch.device,
) -> Knn | None:
    """Predict the held-out images' labels with the teachers' and both students' summaries.

    Args:
        images: which the labels are of.
        banks: train set -> what was seen of it.
        queries: what was seen of the held-out set.
        device: to compute on.

    Returns:
        None if the recipe asks for no label.

    Raises:
        BadInput: an image without the label.
    """
    label, k = images.recipe.evaluation.label, images.recipe.evaluation.k
    if label is None:
        return None
    named = [labels(images, name, bank.sample_ids, label) for name, bank in banks.items()]
    known, truth = numbered(
        list(chain.from_iterable(named)),
        labels(images, images.recipe.held_out.name, queries.sample_ids, label),
    )

    def right(vectors: Callable[[Seen], Tensor]) -> Tensor:
        bank = torch.cat([vectors(seen) for seen in banks.values()]).to(device)
        return knn_predict(bank, known.to(device), vectors(queries).to(device), k).cpu() == truth

    before = right(lambda seen: seen.students[INITIAL])
    after = right(lambda seen: seen.students[FINAL])
    raw = right(lambda seen: seen.pixels)
    return Knn(
        label=label,
        k=k,
        bank=len(known),
        queries=len(truth),
        pixels=_share(raw),
        teacher={name: _share(right(_teacher(name))) for name in queries.teachers},
        init=_share(before),
        final=_share(after),
        p_value=paired_test(before, after),
        p_value_pixels=paired_test(raw, after),
    )


def _teacher(name: str) -> Callable[[Seen], Tensor]:
    """Return what takes a teacher's summaries [n, D] out of what was seen."""
    return lambda seen: seen.teachers[name]


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


def _share(correct: Tensor) -> float:
    return float(correct.double().mean())
