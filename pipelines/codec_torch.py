"""Codecs on the device: stored bytes to float32 tensors, equal to the numpy oracle in cache.codec.

Plain dtypes so far; the quantised codecs join here, behind the same function.
"""

import numpy as np
import torch
from torch import Tensor

from eupe.spec import CodecSpec

_STORED_AS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def decode(codec: CodecSpec, stored: np.ndarray, device: str | torch.device = "cpu") -> Tensor:
    """Decode rows as `cache.reader` gives them.

    Args:
        codec: of the store.
        stored: [n, *storage_shape] in storage dtype, writable, owned by the caller.
        device: to decode on; the narrow bytes are what crosses to it.

    Returns:
        patches, float32 [n, N, D].

    Raises:
        ValueError: a codec this version does not decode.
    """
    dtype = _STORED_AS.get(codec.name)
    if dtype is None:
        raise ValueError(f"codec {codec.name!r}: wants one of {', '.join(_STORED_AS)}")
    bits = stored.view(np.int16) if codec.name == "bfloat16" else stored
    return torch.from_numpy(bits).to(device).view(dtype).float()
