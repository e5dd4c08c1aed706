"""The distillation losses of EUPE (arXiv:2603.22387), Eq. 4 to 7, on normalised teacher tokens."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from eupe.bicubic import resize
from eupe.encoders import Features


class TeacherLoss(NamedTuple):
    """The terms of one teacher's loss, float32 scalars, means over rows.

    Attributes:
        summary: cosine loss of the summary (Eq. 4).
        patch_cosine: cosine loss of the patches, not yet times alpha (Eq. 5).
        patch_smooth_l1: smooth L1 of the patches, not yet times beta (Eq. 5).
        total: summary + gamma * (alpha * patch_cosine + beta * patch_smooth_l1).
    """

    summary: Float[Tensor, ""]
    patch_cosine: Float[Tensor, ""]
    patch_smooth_l1: Float[Tensor, ""]
    total: Float[Tensor, ""]


def cosine_loss(
    prediction: Float[Tensor, "*n d"], target: Float[Tensor, "*n d"]
) -> Float[Tensor, "*n"]:
    """Return 1 - cosine similarity of each token [..., D], float32 [...] (EUPE, Eq. 4)."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1)


def match_grids(
    a_BHWD: Float[Tensor, "b h1 w1 d"], b_BHWD: Float[Tensor, "b h2 w2 d"]
) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b h w d"]]:
    """Resize the smaller patch grid to the larger, bicubic; both get max(N_a, N_b) tokens.

    Args:
        a_BHWD: patches [B, H1, W1, D].
        b_BHWD: patches [B, H2, W2, D].

    Returns:
        Both on the larger grid, in their order; the larger is returned as it came.

    Raises:
        ValueError: grids of which neither holds the other, such as 4x2 and 2x4.
    """
    (height_a, width_a), (height_b, width_b) = a_BHWD.shape[1:3], b_BHWD.shape[1:3]
    if height_a >= height_b and width_a >= width_b:
        return a_BHWD, resize(b_BHWD, height_a, width_a)
    if height_b >= height_a and width_b >= width_a:
        return resize(a_BHWD, height_b, width_b), b_BHWD
    raise ValueError(
        f"patch grids {height_a}x{width_a} and {height_b}x{width_b}: neither holds the other"
    )


def row_losses(
    prediction: Features, target: Features, valid: Bool[Tensor, " b"], smooth_l1_beta: float
) -> Float[Tensor, "3 b"]:
    """Return each row's losses, float32 [3, B]: summary, patch cosine, patch smooth L1.

    Everything element by element, which a compiler makes one pass of; `teacher_loss` names the
    arguments. The grids are equal here.
    """
    # Masked before the arithmetic: a NaN times zero would still be a NaN in the gradient.
    summary = torch.where(valid[:, None], target.summary, 0)
    patches = torch.where(valid[:, None, None, None], target.patches, 0).float()
    predicted = prediction.patches.float()
    return torch.stack(
        [
            cosine_loss(prediction.summary, summary),
            cosine_loss(predicted, patches).mean((1, 2)),
            F.smooth_l1_loss(predicted, patches, reduction="none", beta=smooth_l1_beta).mean(
                (1, 2, 3)
            ),
        ]
    )


RowLosses = Callable[[Features, Features, Tensor, float], Tensor]


def teacher_loss(
    prediction: Features,
    target: Features,
    valid: Bool[Tensor, " b"],
    *,
    alpha: float = 0.9,
    beta: float = 0.1,
    smooth_l1_beta: float = 1.0,
    gamma: float = 1.0,
    count: float | Tensor | None = None,
    row_losses: RowLosses = row_losses,
) -> TeacherLoss:
    """Return one teacher's loss, EUPE (arXiv:2603.22387), Eq. 4, 5 and 7.

    Assumed: the prediction is resized after its head, smooth L1 is averaged over coordinates as
    well as tokens, and its beta is 1; the paper states none of these.

    Args:
        prediction: the heads' output, summary [B, D] and patches [B, H1, W1, D2].
        target: normalised teacher features, summary [B, D] and patches [B, H2, W2, D2].
        valid: [B], True if the row counts; others weigh nothing, whatever they hold (NaN too).
        alpha: weight of the patches' cosine loss.
        beta: weight of the patches' smooth L1.
        smooth_l1_beta: where smooth L1 turns from squared to linear.
        gamma: factor of this teacher's patch term (Eq. 7).
        count: rows to divide by; None for the valid rows given. With gradient accumulation, the
            valid rows of the whole global batch: the losses of its parts then add up to its loss.
        row_losses: the function of this module, or the same compiled.

    Raises:
        ValueError: a prediction of another width than the target.
    """
    for kind, ours, theirs in zip(Features._fields, prediction, target, strict=True):
        if ours.shape[-1] != theirs.shape[-1]:
            raise ValueError(
                f"{kind}: prediction is {ours.shape[-1]} wide, target {theirs.shape[-1]}"
            )
    predicted, patches = match_grids(prediction.patches, target.patches)
    rows = row_losses(
        Features(prediction.summary, predicted),
        Features(target.summary, patches),
        valid,
        smooth_l1_beta,
    )
    if count is None:
        count = valid.sum()
    elif not isinstance(count, Tensor):
        count = torch.full((), count, device=valid.device)  # made there: a copy would wait for it
    terms = (rows * valid).sum(1) / count.to(valid.device).clamp(min=1)
    total = terms[0] + gamma * (alpha * terms[1] + beta * terms[2])
    return TeacherLoss(terms[0], terms[1], terms[2], total)


def total_loss(losses: Iterable[TeacherLoss]) -> Float[Tensor, ""]:
    """Return the sum over teachers, EUPE (arXiv:2603.22387), Eq. 6."""
    return torch.stack([loss.total for loss in losses]).sum()
