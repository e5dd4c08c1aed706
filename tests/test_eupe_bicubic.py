"""Resizing by matrix products is F.interpolate's bicubic, forward and backward, on any grids."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import devices

from eupe import bicubic

SIDES = st.integers(1, 9)
NEAR = {torch.float64: 1e-12, torch.float32: 1e-6}


def interpolated(maps: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize as torch's documentation says."""
    channels_first = maps.permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, (height, width), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def with_gradient(way, maps, height, width, upstream):
    leaf = maps.clone().requires_grad_()
    resized = way(leaf, height, width)
    resized.backward(upstream)
    return resized.detach(), leaf.grad


@settings(max_examples=60)
@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(sorted(NEAR, key=str)), st.integers(0, 2**32))
def test_products_are_the_interpolation(rows, columns, height, width, dtype, seed):
    """Larger, smaller, odd, not square, one sample.

    The interpolation is float64's: in float32 its coordinates err by more than the products do.
    """
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(2, rows, columns, 3, generator=generator, dtype=dtype)
    upstream = torch.randn(2, height, width, 3, generator=generator, dtype=dtype)
    ours = with_gradient(bicubic.by_products, maps, height, width, upstream)
    theirs = with_gradient(interpolated, maps.double(), height, width, upstream.double())
    # A sample's gradient is a sum over as many as came of it.
    largest = max(1.0, float(maps.abs().max()), float(upstream.abs().max()))
    near = NEAR[dtype] * largest * max(1.0, height * width / (rows * columns))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=near)


@pytest.mark.parametrize("grids", [(8, 16), (14, 32), (16, 37), (7, 64)])
def test_products_are_the_interpolation_of_the_papers_grids(grids):
    side, to = grids
    maps = torch.randn(1, side, side, 5, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(1, to, to, 5, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        with_gradient(way, maps, to, to, upstream) for way in (bicubic.by_products, interpolated)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6 * float(b.abs().max()))


def test_grids_of_that_size_already_stay_as_they_are():
    maps = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert bicubic.resize(maps, 3, 5) is maps


def test_weights_that_an_evaluation_asked_for_first_serve_training():
    bicubic._weights.cache_clear()
    maps = torch.rand(1, 2, 2, 1)
    with torch.inference_mode():
        bicubic.by_products(maps, 4, 4)
    leaf = maps.requires_grad_()
    bicubic.by_products(leaf, 4, 4).sum().backward()
    assert leaf.grad is not None


@devices
def test_backward_repeats_itself_to_the_bit(device):
    maps = torch.randn(4, 8, 8, 96, generator=torch.Generator().manual_seed(0)).to(device)
    upstream = torch.randn(4, 16, 16, 96, generator=torch.Generator().manual_seed(1)).to(device)
    first, *others = (with_gradient(bicubic.resize, maps, 16, 16, upstream)[1] for _ in range(5))
    assert all(torch.equal(first, other) for other in others)
    cpus = with_gradient(bicubic.resize, maps.cpu(), 16, 16, upstream.cpu())[1]
    torch.testing.assert_close(first.cpu(), cpus, rtol=0, atol=1e-5)
