"""Likeness of two encoders: blind to rotation, scale and shift, and to nothing else."""

import pytest
import torch

from eupe.likeness import linear_cka, shared_neighbours


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_cka_of_a_rotated_scaled_and_shifted_copy_is_one():
    x = normal(50, 8)
    rotation = torch.linalg.qr(normal(8, 8, seed=1)).Q
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    assert linear_cka(x, normal(50, 5, seed=2)) < 0.4


def test_cka_is_the_kernels_alignment():
    """As Kornblith et al. (arXiv:1905.00414) define it, over images by images."""
    x, y = normal(20, 4), normal(20, 6, seed=1)
    centre = torch.eye(20).double() - 1 / 20
    k, own = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    wanted = (k * own).sum() / (k.norm() * own.norm())
    assert linear_cka(x, y) == pytest.approx(float(wanted))


def test_shared_neighbours_are_counted_in_any_order():
    ours = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    theirs = torch.tensor([[4, 3, 2, 1], [8, 0, 1, 2]])
    assert shared_neighbours(ours, theirs).tolist() == [1.0, 0.25]
