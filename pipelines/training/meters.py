"""Meters of the training loop: means of the losses between two logs, and the pace of the data."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.training.workers import Workers

TERMS = ("summary", "patch_cosine", "patch_smooth_l1", "total")
"""Columns of the sums: the terms of one teacher's loss, as in eupe.losses.TeacherLoss."""


@dataclass
class Window:
    """Sums since the last log; saved with a checkpoint, so that means after a resume are equal.

    Attributes:
        sums: of each step's terms, float32 [teachers, terms]; this worker's part of the batch.
        norm: of the gradient norms, float32 scalar.
        invalid: rows skipped, over all workers.
        steps: how many steps were added.
    """

    sums: Tensor
    norm: Tensor
    invalid: int = 0
    steps: int = 0

    @classmethod
    def empty(cls, teachers: Mapping[str, object], device: torch.device) -> "Window":
        """Return a window of no steps."""
        sums = torch.zeros(len(teachers), len(TERMS), device=device)
        return cls(sums, torch.zeros((), device=device))

    def add(self, sums: Tensor, norm: Tensor, invalid: int) -> None:
        """Add one step."""
        self.sums, self.norm = self.sums + sums, self.norm + norm
        self.invalid, self.steps = self.invalid + invalid, self.steps + 1

    def take(self, workers: Workers) -> tuple[Tensor, float, int]:
        """Return mean terms over all workers, mean norm and invalid rows, and start over."""
        terms = workers.sum(self.sums).cpu() / self.steps
        taken = terms, self.norm.item() / self.steps, self.invalid
        self.sums, self.norm = torch.zeros_like(self.sums), torch.zeros_like(self.norm)
        self.invalid = self.steps = 0
        return taken

    def state(self, workers: Workers) -> dict[str, Tensor | int]:
        """Return the fields over all workers as plain data, for a checkpoint."""
        sums = workers.sum(self.sums)
        return {"sums": sums, "norm": self.norm, "invalid": self.invalid, "steps": self.steps}

    def part(self, workers: Workers) -> "Window":
        """Return this worker's part of a window over all workers: rank 0 takes the sums."""
        sums = self.sums if workers.rank == 0 else torch.zeros_like(self.sums)
        return Window(sums, self.norm, self.invalid, self.steps)

    def to(self, device: torch.device) -> "Window":
        """Return the window on a device."""
        return Window(self.sums.to(device), self.norm.to(device), self.invalid, self.steps)


@dataclass
class Pace:
    """Rows and time of this process, in all and since the last log.

    Attributes:
        rows: trained on.
        wait_seconds: spent waiting for data.
        seconds: spent on steps: neither logs, evaluation nor checkpoints.
        invalid: rows skipped, over all workers.
    """

    rows: int = 0
    wait_seconds: float = 0.0
    seconds: float = 0.0
    invalid: int = 0
    _told: tuple[int, float, float] = (0, 0.0, 0.0)
    _now: float = field(default_factory=time.perf_counter)

    def add(self, rows: int = 0, wait_seconds: float = 0.0) -> None:
        """Count work done since the last call of `add` or `mark`, and its time."""
        self.rows += rows
        self.wait_seconds += wait_seconds
        self.seconds += self._passed()

    def mark(self) -> None:
        """Leave out the time since the last `add`."""
        self._passed()

    @property
    def images_per_second(self) -> float:
        """Rows a second of this process."""
        return self.rows / self.seconds if self.rows else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the time that went into waiting for data."""
        return self.wait_seconds / self.seconds if self.rows else 0.0

    def since(self, workers: int) -> dict[str, float]:
        """Return the pace since the last call, over all workers."""
        rows, waited, seconds = self._told
        self._told = self.rows, self.wait_seconds, self.seconds
        passed = max(self.seconds - seconds, 1e-9)
        return {
            "images_per_second": (self.rows - rows) * workers / passed,
            "data_wait_share": (self.wait_seconds - waited) / passed,
        }

    def _passed(self) -> float:
        before, self._now = self._now, time.perf_counter()
        return self._now - before


def in_words(figures: Mapping[str, float], teachers: Iterable[str]) -> str:
    """Return what a running stage says of itself: losses by teacher and term, lr, speed, waiting.

    Args:
        figures: of the last logged steps, as they go to the trackers.
        teachers: whose losses to name.
    """
    losses = []
    for name in teachers:
        terms = (f"{figures[f'loss/{name}/{term}']:.3f}" for term in TERMS[:-1])
        losses.append(f"{name} {' / '.join(terms)}")
    return (
        f"loss {figures['loss/total']:.3f} ({', '.join(losses)}), lr {figures['lr']:.1e}, "
        f"{figures['images_per_second']:.0f} images/s, "
        f"{100 * figures['data_wait_share']:.0f} % waiting for data"
    )
