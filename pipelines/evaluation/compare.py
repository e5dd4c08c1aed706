"""Comparing students with their teachers' cached tokens over a dataset, and with no student."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from eupe.encoders import Encoder, Features
from eupe.heads import DistillationModel
from eupe.losses import match_grids
from pipelines.features.sources import Targets
from pipelines.training.batches import Batch

BASELINE, INITIAL, FINAL = "baseline", "init", "final"
"""Names in `Seen`: the constants, the student before training, the student after."""
RAW_SIDE = 16
"""Side of the raw pictures that an encoder is compared with, pixels."""


class Constants:
    """The best predictions that ignore the image, fitted to training images.

    Over images the mean cosine of a constant c to targets y_i is c/|c| . mean(y_i/|y_i|), so the
    best direction is the normalised mean of the targets' unit vectors: one for the summary, and
    one for each position of the patch grid, since a white border is no knowledge of an image.

    Args:
        grid: (rows, columns) of the student's patches, to which smaller teacher grids are resized
            as in the loss.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self._grid = grid
        self._sums: dict[str, Features] = {}

    def add(self, targets: Mapping[str, Features]) -> None:
        """Take the normalised tokens of some training images, valid rows only."""
        for name, target in targets.items():
            units = Features(
                F.normalize(target.summary.double(), dim=-1).sum(0),
                F.normalize(self._matched(target.patches).double(), dim=-1).sum(0),
            )
            if name in self._sums:
                units = Features(*(a + b for a, b in zip(self._sums[name], units, strict=True)))
            self._sums[name] = units

    def predictions(self, count: int) -> dict[str, Features]:
        """Return teacher -> its constants, the same for each of `count` images."""
        return {
            name: Features(
                sums.summary.float().expand(count, -1),
                sums.patches.float().expand(count, -1, -1, -1),
            )
            for name, sums in self._sums.items()
        }

    def _matched(self, patches: Tensor) -> Tensor:
        count, _, _, width = patches.shape
        grid = patches.new_zeros(()).expand(count, *self._grid, width)  # takes no memory
        return match_grids(grid, patches)[1]


@dataclass
class Seen:
    """What a pass over a dataset saw, valid rows in order.

    Attributes:
        sample_ids: [n].
        pixels: the pictures themselves, RAW_SIDE pixels a side, float32 [n, 3 * RAW_SIDE ** 2];
            empty unless asked for.
        summaries: network -> its summaries [n, D], float32.
        cosines: (model, teacher) -> per image, summary and mean over patches [n, 2].
    """

    sample_ids: list[str]
    pixels: Tensor
    summaries: dict[str, Tensor]
    cosines: dict[tuple[str, str], Tensor]


def look(
    batches: Iterable[Batch],
    models: Mapping[str, DistillationModel] = MappingProxyType({}),
    encoders: Mapping[str, Encoder] = MappingProxyType({}),
    *,
    judge: Constants | None = None,
    others: Mapping[int, Iterator[Mapping[str, Targets]]] = MappingProxyType({}),
    raw: bool = False,
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda count: None,
) -> Seen:
    """Show images to several networks at once, and compare students with the cached teachers.

    Args:
        batches: of the images, each once.
        models: name -> student with its heads, on `device`, whose cosines are wanted.
        encoders: name -> network whose summaries are wanted.
        judge: constants whose cosines are wanted too, under the name BASELINE.
        others: another resolution of the teachers -> their tokens of the same batches there, whose
            cosines are wanted too, under `teacher_at(teacher, resolution)`.
        raw: True to keep the pictures themselves, small.
        device: to compute on.
        advance: told of every batch's size.
    """
    ids, small = list[str](), list[Tensor]()
    summaries: dict[str, list[Tensor]] = {}
    cosines: dict[tuple[str, str], list[Tensor]] = {}
    with torch.inference_mode():
        for batch in batches:
            ids += [name for name, good in zip(batch.sample_ids, batch.valid, strict=True) if good]
            pixels = batch.pixels[torch.from_numpy(batch.valid)].to(device)
            if raw:
                small.append(_small(pixels).cpu())
            for name, encoder in encoders.items():
                summaries.setdefault(name, []).append(encoder(pixels).summary.float().cpu())
            predicted = {name: model(pixels)[1] for name, model in models.items()}
            if judge is not None:
                predicted[BASELINE] = judge.predictions(len(pixels))
            if predicted:
                valid = torch.from_numpy(batch.valid).to(device)
                targets = dict(batch.targets(device))
                for resolution, tokens in others.items():
                    for teacher, target in next(tokens).items():
                        targets[teacher_at(teacher, resolution)] = target
                for named, target in targets.items():
                    held = target.valid[valid]  # a store of another resolution may lack a row
                    own = Features(target.summary[valid][held], target.patches[valid][held])
                    for who, guesses in predicted.items():
                        guess = guesses[named.partition("@")[0]]
                        both = _cosines(Features(guess.summary[held], guess.patches[held]), own)
                        cosines.setdefault((who, named), []).append(both.cpu())
            advance(len(batch))
    return Seen(
        ids,
        torch.cat(small) if raw else torch.empty(0),
        {name: torch.cat(parts) for name, parts in summaries.items()},
        {pair: torch.cat(parts) for pair, parts in cosines.items()},
    )


def teacher_at(teacher: str, resolution: int) -> str:
    """Return the name in `Seen.cosines` of a teacher at one of the other resolutions."""
    return f"{teacher}@{resolution}"


def _small(pixels: Tensor) -> Tensor:
    """Return pictures [B, 3, R, R] as vectors of RAW_SIDE x RAW_SIDE pixels, 0 to 255."""
    small = F.interpolate(pixels.float(), (RAW_SIDE, RAW_SIDE), mode="bicubic", antialias=True)
    return small.flatten(1)


def _cosines(predicted: Features, target: Features) -> Tensor:
    """Return cosine similarity per image: summary, and mean over patches [B, 2]."""
    ours, theirs = match_grids(predicted.patches.float(), target.patches)
    summary = F.cosine_similarity(predicted.summary.float(), target.summary, dim=-1)
    return torch.stack([summary, F.cosine_similarity(ours, theirs, dim=-1).mean((1, 2))], dim=1)
