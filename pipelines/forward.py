"""Teacher forward passes, in one place: what fills the caches and what a live run compares with."""

import numpy as np
import torch

from eupe.encoders import Features
from eupe.teachers import Teacher


def padded_forward(
    teacher: Teacher,
    pixels: np.ndarray,
    compute_batch: int,
    device: str | torch.device = "cpu",
) -> Features:
    """Run a teacher over pictures in batches of one fixed size, the last one padded with black.

    Kernels may round differently by batch size; with one size a picture's features do not depend
    on how many others are asked for (docs/design.md, law 1).

    Args:
        teacher: on `device`.
        pixels: uint8 [n, R, R, 3], n at least 1.
        compute_batch: pictures a forward pass.
        device: where the teacher is.

    Returns:
        Features, float32 on `device`: summary [n, D], patches [n, H, W, D].
    """
    parts = []
    for start in range(0, len(pixels), compute_batch):
        chunk = pixels[start : start + compute_batch]
        batch = np.zeros((compute_batch, *pixels.shape[1:]), np.uint8)
        batch[: len(chunk)] = chunk
        x = torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).contiguous()
        summary, patches = teacher(x)
        parts.append((summary[: len(chunk)], patches[: len(chunk)]))
    summaries, maps = zip(*parts, strict=True)
    return Features(torch.cat(summaries), torch.cat(maps))
