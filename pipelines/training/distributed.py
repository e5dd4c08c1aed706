"""Workers of a torch.distributed process group: copies that average gradients, or shards."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from eupe.errors import BadInput
from eupe.heads import DistillationModel
from pipelines.recipe.stage import StageConfig
from pipelines.records import whole_state
from pipelines.training.compiled import blocks
from pipelines.training.workers import Workers

T = TypeVar("T")


def of_process_group(stage: StageConfig, device: str | torch.device) -> Workers:
    """Return the workers of the process group that this process has joined.

    Args:
        stage: says by `strategy` how the model is spread, and in which precision.
        device: this worker's; gloo serves the CPU, nccl CUDA.

    Raises:
        BadInput: shards of a batch that does not divide by the number of workers.
    """
    if stage.strategy == "ddp":
        return Copies()
    if stage.global_batch % dist.get_world_size():
        # Every forward gathers: a worker with a micro-batch less would leave the others waiting.
        raise BadInput(
            f"{stage.name}: global_batch = {stage.global_batch} and {dist.get_world_size()} "
            "workers: with strategy fsdp2 each needs as many rows; make it a multiple"
        )
    half = stage.precision == "bfloat16" and torch.device(device).type == "cuda"
    return Shards(torch.bfloat16 if half else None)


class _ProcessGroup:
    """What copies and shards have in common: the default process group."""

    def __init__(self) -> None:
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers, the same on each."""
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def count(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Return the sums over workers of what each has counted on its host."""
        here = torch.tensor(numbers, dtype=torch.float32, device=device)
        return [int(total) for total in self.sum(here).tolist()]

    def tell(self, value: T) -> T:
        """Return what rank 0 gave, on every worker; it is pickled, so a small thing."""
        told = [value]
        dist.broadcast_object_list(told)
        return told[0]

    def barrier(self) -> None:
        """Return once every worker is here."""
        dist.barrier()


class Copies(_ProcessGroup):
    """Each worker holds the whole model; gradients are averaged during backward (DDP)."""

    def wrap(self, model: DistillationModel) -> nn.Module:
        """Return the model in DDP, as rank 0 has it.

        Every parameter must get a gradient at every step.
        """
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Add gradients up in each worker until the last micro-batch, whose backward averages."""
        assert isinstance(model, DistributedDataParallel)
        return nullcontext() if last else model.no_sync()

    def whole(self, model: DistillationModel) -> AbstractContextManager[DistillationModel]:
        """Return the model: it is whole on every worker."""
        return nullcontext(model)


class Shards(_ProcessGroup):
    """Each worker holds a part of every parameter and of its optimizer state (FSDP2).

    The parts are float32, what the optimizer steps on. A block's parameters are gathered when it
    runs and dropped after. Micro-batches before the last exchange nothing: their gradients stay
    whole in each worker, at the cost of one more copy of the model.

    Args:
        gathered: dtype in which parameters are gathered and used; gradients are reduced in
            float32 all the same. None for float32.
    """

    def __init__(self, gathered: torch.dtype | None = None) -> None:
        super().__init__()
        # Inputs are not cast: autocast sees to that where the loop asks for it, and the angles of
        # rotary positions, which blocks take as an input, would lose their digits.
        self._precision = (
            MixedPrecisionPolicy()
            if gathered is None
            else MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
        )
        self._unsharded: DistillationModel | None = None

    def wrap(self, model: DistillationModel) -> nn.Module:
        """Shard rank 0's model over all, each where it stands, block by block, and return it."""
        model.to(memory_format=torch.contiguous_format)  # FSDP2 shards no other
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)  # as DDP does
        if self.rank == 0:
            self._unsharded = deepcopy(model).cpu()
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        for module in (*blocks(model), model):
            fully_shard(module, mesh=mesh, mp_policy=self._precision)
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Add gradients up in each worker until the last micro-batch, whose backward averages."""
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(last)
        return nullcontext()

    @contextmanager
    def whole(self, model: DistillationModel) -> Iterator[DistillationModel]:
        """Gather the float32 weights into an unsharded copy, on rank 0.

        A copy, because a forward of the sharded model is work for all: it gathers, and leaves the
        order in which it did for the next backward to follow.
        """
        gathered = whole_state.weights(model)
        if self._unsharded is None:
            yield model
            return
        self._unsharded.load_state_dict(gathered)
        del gathered
        try:
            yield self._unsharded.to(next(model.parameters()).device)
        finally:
            self._unsharded.cpu()  # its memory on the device is the next step's
