"""Normalisers: what the loss applies to a teacher's tokens, chosen by the run (z-score, PHI-S)."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from eupe.hadamard import hadamard
from eupe.moments import Moments

STD_FLOOR = 1e-6
"""Of the widest coordinate's std: below it a coordinate counts as constant."""


class Normaliser(nn.Module):
    """The affine map y = scale * rotation (x - mean) of tokens [..., D], and back.

    Args:
        mean: [D].
        scale: [D], positive.
        rotation: orthogonal [D, D], or None for none.
    """

    mean: Tensor
    scale: Tensor
    rotation: Tensor | None

    def __init__(
        self,
        mean: Float[Tensor, " d"],
        scale: Float[Tensor, " d"],
        rotation: Float[Tensor, "d d"] | None = None,
    ):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("rotation", rotation)

    def forward(self, tokens: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Normalise a teacher's tokens, float32."""
        centred = tokens.float() - self.mean
        return (centred if self.rotation is None else centred @ self.rotation.T) * self.scale

    def inverse(self, normalised: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """Undo `forward`: normalised tokens back to the teacher's features, float32."""
        centred = normalised.float() / self.scale
        return (centred if self.rotation is None else centred @ self.rotation) + self.mean


def zscore(moments: Moments) -> Normaliser:
    """Return (x - mean) / std of each coordinate: EUPE (arXiv:2603.22387), Fig. 3.

    A coordinate that is constant in the sample is divided by the widest std: EfficientNet-Lite has
    channels that are dead in most images, and one that fires elsewhere must not outweigh the rest.
    """
    std = moments.std()
    widest = std.max() if std.max() > 0 else 1.0
    std = np.where(std < STD_FLOOR * widest, widest, std)
    return Normaliser(_tensor(moments.mean), _tensor(1 / std))


def phi_s(moments: Moments) -> Normaliser:
    """Return PHI-S (arXiv:2410.01680): the PCA basis in Hadamard rotation, one scale for all.

    Every coordinate then has variance 1 and the features' shape is kept, where the z-score
    stretches each coordinate by itself.

    Deviation: EUPE normalises by z-score; this is AM-RADIO's later alternative, for ablations.

    Raises:
        BadInput: a width for which no Hadamard matrix is constructed.
    """
    variances, basis = np.linalg.eigh(moments.covariance())
    # An axis may point either way, as the linear algebra of the machine has it: let it be one way.
    basis *= np.sign(basis[np.abs(basis).argmax(0), np.arange(len(basis))])
    rotation = hadamard(len(variances)) @ basis.T
    spread = np.sqrt(variances.clip(min=0).mean())
    scale = np.full(len(variances), 1 / spread if spread > 0 else 1.0)
    return Normaliser(_tensor(moments.mean), _tensor(scale), _tensor(rotation))


def _tensor(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
