"""Host buffers that batches are read into and that come back when nothing refers to them any more.

A fresh array of some 50 MB costs a page fault every 4 kB, more than the copy that fills it; a
buffer that was used before costs nothing. With CUDA they are pinned, so that they cross to the
device while the host goes on.
"""

import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt
import torch


class _Lease:
    """Memory on loan: arrays made of it keep it alive, their views included."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self.__array_interface__ = memory.numpy().__array_interface__


class Buffers:
    """Buffers by size; thread-safe. As many exist as were ever in use at once.

    Args:
        pinned: page-locked memory; None: where there is a CUDA device.
    """

    def __init__(self, pinned: bool | None = None) -> None:
        self._pinned = torch.cuda.is_available() if pinned is None else pinned
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: npt.DTypeLike) -> np.ndarray:
        """Lend an array of that shape and dtype, C-contiguous; what it holds is left over."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        with self._lock:
            free = self._free[num_bytes]
            memory = free.pop() if free else None
        if memory is None:
            memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        lease = _Lease(memory)
        weakref.finalize(lease, self._give_back, memory).atexit = False
        return np.asarray(lease).view(dtype).reshape(tuple(shape))

    def _give_back(self, memory: torch.Tensor) -> None:
        # list.append is atomic; the lock could be held by the very thread that collects garbage.
        self._free[memory.numel()].append(memory)


@cache
def _landing() -> Buffers:
    return Buffers()


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the host, from CUDA into page-locked memory; the CPU's is the same one.

    Into memory that is not, the driver copies piece by piece at a fraction of the speed.
    """
    if tensor.device.type == "cpu":
        return tensor.numpy()
    memory = torch.from_numpy(_landing().take((tensor.nbytes,), np.uint8))
    host = memory.view(tensor.dtype).view(tensor.shape)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host.numpy()


class Crossing:
    """Copies host memory to a device, without waiting where it is pinned.

    It keeps what it copies until the copy has left it: a buffer that nothing else refers to would
    be lent again, and written to.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()

    def __call__(self, host: torch.Tensor, device: str | torch.device) -> torch.Tensor:
        """Return the tensor on the device; the CPU's is the same one."""
        there = host.to(device, non_blocking=True)
        if there.device.type == "cuda":
            while self._under_way and self._under_way[0][0].query():
                self._under_way.popleft()
            copied = torch.cuda.Event()
            copied.record()
            self._under_way.append((copied, host))
        return there
