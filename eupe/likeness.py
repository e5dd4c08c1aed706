"""How alike two encoders see the same images: shared neighbours and linear CKA."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def shared_neighbours(
    ours: Int64[Tensor, "q k"], theirs: Int64[Tensor, "q k"]
) -> Float[Tensor, " q"]:
    """Return for each query the share of its neighbours that both encoders name, 0 to 1.

    Args:
        ours: rows of the neighbours in one encoder [q, k], each once.
        theirs: the same in the other.
    """
    both = (ours[:, :, None] == theirs[:, None, :]).any(2)
    return both.double().mean(1)


def linear_cka(ours: Float[Tensor, "n a"], theirs: Float[Tensor, "n b"]) -> float:
    """Return the linear centred kernel alignment of two encoders' vectors, 0 to 1.

    Kornblith et al., arXiv:1905.00414: |Y'X|^2 / (|X'X| |Y'Y|) of centred columns, in Frobenius
    norms. 1 means equal up to rotation, scale and shift. NaN where an encoder gives one vector for
    all images.

    Args:
        ours: vectors of the images [n, A].
        theirs: vectors of the same images [n, B].
    """
    x, y = (each.double() - each.double().mean(0) for each in (ours, theirs))
    own = (torch.linalg.matrix_norm(each.T @ each) for each in (x, y))
    return float(torch.linalg.matrix_norm(y.T @ x).square() / torch.stack([*own]).prod())
