"""Bicubic resizing of token grids as two matrix products.

`F.interpolate(mode="bicubic", align_corners=False)` is a fixed linear map along rows and one along
columns. Its own kernels are slow: on CUDA the backward adds with atomics, whose sums come in
another order at every run, which exact replay cannot bear; on a CPU it runs in one thread, ten to
thirty times as long as the products.
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
    return by_products(maps_BHWD.float(), height, width)


def by_products(
    maps_BHWD: Float[Tensor, "b h1 w1 d"], height: int, width: int
) -> Float[Tensor, "b h w d"]:
    """Resize grids by a product along columns and one along rows, in their own dtype."""
    batch, rows, columns, dim = maps_BHWD.shape
    across = _weights(columns, width, maps_BHWD.dtype, maps_BHWD.device)
    down = _weights(rows, height, maps_BHWD.dtype, maps_BHWD.device)
    wide = torch.matmul(across, maps_BHWD.reshape(batch * rows, columns, dim))
    return torch.matmul(down, wide.view(batch, rows, width * dim)).view(batch, height, width, dim)


@lru_cache(maxsize=64)
def _weights(size: int, to: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what each of `to` samples takes of each of `size`, as torch has it: [to, size]."""
    with torch.inference_mode(False):  # kept for later calls, which may want gradients
        impulses = torch.eye(size, dtype=torch.float64)[None, :, :, None]
        taken = F.interpolate(impulses, (to, 1), mode="bicubic", align_corners=False)
        return taken[0, :, :, 0].T.contiguous().to(device, dtype)
