"""Bicubic resizing of token grids: interpolated on a CPU, as matrix products on a GPU.

Both are `F.interpolate(mode="bicubic", align_corners=False)`, a fixed linear map along rows and one
along columns. On CUDA its backward adds with atomics: it is slow, and its sums come in another
order at every run, which exact replay cannot bear (`torch.use_deterministic_algorithms` refuses
it). Matrix products are neither.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize(
    maps_BHWD: Float[Tensor, "b h1 w1 d"], height: int, width: int
) -> Float[Tensor, "b h w d"]:
    """Resize grids of tokens to height x width, in float32; of that size they stay as they are."""
    if maps_BHWD.shape[1:3] == (height, width):
        return maps_BHWD
    way = by_products if maps_BHWD.device.type == "cuda" else by_interpolation
    return way(maps_BHWD.float(), height, width)


def by_interpolation(
    maps_BHWD: Float[Tensor, "b h1 w1 d"], height: int, width: int
) -> Float[Tensor, "b h w d"]:
    """Resize grids by torch's own kernel."""
    maps_BDHW = maps_BHWD.permute(0, 3, 1, 2)
    resized = F.interpolate(maps_BDHW, (height, width), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1)


def by_products(
    maps_BHWD: Float[Tensor, "b h1 w1 d"], height: int, width: int
) -> Float[Tensor, "b h w d"]:
    """Resize grids by a product along columns and one along rows."""
    batch, rows, columns, dim = maps_BHWD.shape
    across = _weights(columns, width, maps_BHWD.dtype, maps_BHWD.device)
    down = _weights(rows, height, maps_BHWD.dtype, maps_BHWD.device)
    wide = torch.matmul(across, maps_BHWD.reshape(batch * rows, columns, dim))
    return torch.matmul(down, wide.view(batch, rows, width * dim)).view(batch, height, width, dim)


@lru_cache(maxsize=64)
def _weights(size: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what each of `to` samples takes of each of `size`: [to, size]."""
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        impulses = torch.eye(size, dtype=torch.float64)[None, :, None]
        return by_interpolation(impulses, to, 1)[0, :, 0].to(device, dtype)
