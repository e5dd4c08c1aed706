"""Drop path by row: the residual branches that a row skips are addressed by the row (law 2).

timm draws them from the global random state for a whole forward pass, so that what a row skips
depends on the rows beside it. Here it depends on its place in the global batch alone: batches may
be cut into micro-batches and shared between workers in any way.
"""

import numpy as np
import torch
from timm.layers import DropBlock2d, DropPath, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from eupe.addressed import hashed
from eupe.errors import BadInput


class RowDropPath(nn.Module):
    """A DropPath that is told which rows pass.

    Attributes:
        rate: share of rows whose branch is left out.
        factors: float32 [B], what each row's branch is multiplied by: 0, or 1 / (1 - rate).
    """

    factors: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Leave out the branches [B, ...] of some rows; in evaluation mode, none."""
        if not self.training:
            return x
        return x * self.factors.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


class RowDraws:
    """All that a network draws in its forward passes.

    Args:
        network: its DropPaths become RowDropPaths in place; weights and their names stay.

    Raises:
        BadInput: it draws something that cannot be addressed by row, dropout say, or drops all.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers: dict[str, RowDropPath] = {}
        for name, module in list(network.named_modules()):
            if isinstance(module, DropPath) and module.drop_prob > 0:
                if module.drop_prob >= 1:
                    raise BadInput(f"drop_path_rate = {module.drop_prob}: wants less than 1")
                parent, _, own = name.rpartition(".")
                self._layers[name] = RowDropPath(module.drop_prob)
                setattr(network.get_submodule(parent), own, self._layers[name])
            elif _draws(module):
                raise BadInput(
                    f"the student's layer {name} ({type(module).__name__}) draws whatever its rows "
                    "are, and a run could not be repeated; of the rates of timm's models "
                    "drop_path_rate alone may be above 0"
                )

    def draw(self, address: str, rows: np.ndarray, device: torch.device) -> None:
        """Draw for the next forward pass, and for its repetition on the way back.

        Args:
            address: of the step.
            rows: int64 [B], places of the batch's rows in the global batch.
            device: of the network.
        """
        if not self._layers:
            return
        factors = np.stack(
            [
                _factors(hashed(rows, f"{address}/{name}"), layer.rate)
                for name, layer in self._layers.items()
            ]
        )
        for layer, own in zip(
            self._layers.values(),
            torch.from_numpy(factors).to(device, non_blocking=True),
            strict=True,
        ):
            layer.factors = own


def _draws(module: nn.Module) -> bool:
    """Return True if a layer draws in training mode, DropPath apart."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, PatchDropout | PatchDropoutWithIndices):
        return bool(module.prob > 0)
    return isinstance(module, DropBlock2d) and bool(module.drop_prob > 0)


def _factors(drawn: np.ndarray, rate: float) -> np.ndarray:
    """Turn random bits, uint64 [B], into a RowDropPath's factors, float32 [B]."""
    uniform = (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.where(uniform < rate, 0.0, 1 / (1 - rate)).astype(np.float32)
