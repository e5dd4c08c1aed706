"""A forward pass that is recorded once and played again: a CUDA graph, for networks of little work.

A small network's kernels are over before Python has started the next one. A graph starts them all
at once; they are the same kernels, so what they compute is the same to the bit.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from eupe.encoders import Features

WARM_UP = 2
"""Passes before one is recorded: kernels are chosen, constants are made."""


class Replayed:
    """A function of one tensor of a fixed shape on CUDA, which it plays from its second call on.

    What cannot be recorded (it waits for the device, or its shapes depend on values) is called.

    Args:
        function: gives features; its weights stay where they are.
    """

    def __init__(self, function: Callable[[Tensor], Features]) -> None:
        self._function = function
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def recorded(self) -> bool:
        """True if it is played from now on."""
        return self._graph is not None

    def __call__(self, x: Tensor) -> Features:
        """Return the features of x; nobody else holds them."""
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._function(x)
        if self._calls == WARM_UP + 1:
            self._record(x)
        if self._graph is None:
            return self._function(x)
        self._input.copy_(x)
        self._graph.replay()
        return Features(*(tokens.clone() for tokens in self._output))

    def _record(self, x: Tensor) -> None:
        graph, self._input = torch.cuda.CUDAGraph(), x.clone()
        try:
            # Other threads go on: they copy, and encode what was computed.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self._function(self._input)
        except RuntimeError as error:
            said = str(error).partition("\n")[0]
            print(f"a teacher is not recorded as a CUDA graph: {said}", file=sys.stderr)
            return
        self._graph = graph
