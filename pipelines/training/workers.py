"""Workers: what the training loop needs of the processes that train together.

The loop is written against `Workers`. One process is `OneProcess`; a process group, under Ray
Train or any other launcher, is one of `pipelines.training.distributed`.
"""

import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from eupe.heads import DistillationModel
from pipelines.machines.errors import RemoteBug, bad_input

T = TypeVar("T")


class Workers(Protocol):
    """The processes that train one model, seen from one of them.

    Attributes:
        rank: of this worker, from 0.
        world_size: number of workers.
    """

    @property
    def rank(self) -> int: ...  # noqa: D102

    @property
    def world_size(self) -> int: ...  # noqa: D102

    def wrap(self, model: DistillationModel) -> nn.Module:
        """Return the module to call; its gradients are the mean over workers after `backward`."""
        ...

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Hold back the exchange of gradients until the `last` micro-batch of a step."""
        ...

    def whole(self, model: DistillationModel) -> AbstractContextManager[DistillationModel]:
        """Give rank 0 the model with all of its weights, to look at; every worker must enter."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over workers, the same on each."""
        ...

    def count(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Return the sums over workers of what each has counted on its host; it waits for them.

        Args:
            numbers: counted here.
            device: of this worker.
        """
        ...

    def tell(self, value: T) -> T:
        """Return what rank 0 gave, on every worker; it is pickled, so a small thing."""
        ...

    def barrier(self) -> None:
        """Return once every worker is here."""
        ...


class OneProcess:
    """A world of one: nothing to exchange."""

    rank = 0
    world_size = 1

    def wrap(self, model: DistillationModel) -> nn.Module:
        """Return the model itself."""
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Do nothing: gradients add up where they are."""
        return nullcontext()

    def whole(self, model: DistillationModel) -> AbstractContextManager[DistillationModel]:
        """Return the model."""
        return nullcontext(model)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the tensor."""
        return tensor

    def count(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """Return the numbers; the device is not asked, and not waited for."""
        return list(numbers)

    def tell(self, value: T) -> T:
        """Return the value."""
        return value

    def barrier(self) -> None:
        """Return at once."""


def from_first(workers: Workers, work: Callable[[], T]) -> T:
    """Have rank 0 alone do something, and return what came of it on every worker; see `on_first`.

    It is pickled, so a small thing.
    """
    found: Any = on_first(workers, work)
    told: T = workers.tell(found)
    return told


def on_first(workers: Workers, work: Callable[[], T]) -> T | None:
    """Have rank 0 alone do something, and return what came of it there; elsewhere None.

    Every worker must call it, and waits.

    Raises:
        Exception: what `work` raised, on every worker: the others do not wait for one that left.
            A bug is a RemoteBug on those.
    """
    made: T | None = None
    raised: Exception | None = None
    told: Exception | None = None
    if workers.rank == 0:
        try:
            made = work()
        except Exception as error:
            raised = error
            told = RemoteBug(traceback.format_exc()) if bad_input(error) is None else error
    told = workers.tell(told)
    if raised is not None:
        raise raised
    if told is not None:
        raise told
    return made
