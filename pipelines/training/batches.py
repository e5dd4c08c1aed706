"""Batches: what all feeds bring, put together and made ahead of need.

A batch is addressed by (step, micro-batch, rank) and made by a pure function of that address, in
any thread. A row whose image is lost or cannot be decoded, or that any joined store holds as
invalid, keeps its place and is masked (`valid`): shapes stay fixed, every rank and every resumed
run draws the same rows, and the loss is a mean over valid rows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from eupe.errors import BadInput
from pipelines.features.buffers import Buffers
from pipelines.features.sources import Targets
from pipelines.recipe.config import WorkersConfig
from pipelines.recipe.draws import Draw, Drawn
from pipelines.recipe.resolutions import Resolutions
from pipelines.training.feeds import Feed, Part

HINTED_BATCHES = 32
"""Micro-batches whose shards and images are asked of a bucket ahead of those being made."""

Wait = Callable[[str, str, Callable[[], int]], float]
"""(what, unit, count of what is missing) -> seconds until nothing was; `Arrivals.wait`."""

Address = tuple[int, int, int, int, Drawn]
"""Step, micro-batch, micro-batches of the step, place of the first row, rows."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        step: global step.
        micro: number of this micro-batch in the step, from 0.
        num_micro: micro-batches of this rank in the step.
        first_place: of its first row in the global batch; the others follow.
        resolutions: of student and teachers at this step.
        sample_ids: [B].
        view_numbers: int64 [B].
        pixels: uint8 [B, 3, R, R], the student's input.
        valid: bool [B], on the host.
        parts: who serves which rows.
        wait_seconds: how long the loop waited for this batch.
        coming: the micro-batch after this one, as it is made; None: none follows, or nobody knows.
    """

    step: int
    micro: int
    num_micro: int
    first_place: int
    resolutions: Resolutions
    sample_ids: list[str]
    view_numbers: np.ndarray
    pixels: Tensor
    valid: np.ndarray
    parts: list[Part]
    wait_seconds: float = 0.0
    coming: "Future[Batch] | None" = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def places(self) -> np.ndarray:
        """Places of its rows in the global batch, int64 [B]."""
        return np.arange(self.first_place, self.first_place + len(self))

    @property
    def last(self) -> bool:
        """True if the optimizer steps after this micro-batch."""
        return self.micro == self.num_micro - 1

    def targets(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Decode and normalise the teachers' tokens on the device, rows in the batch's order.

        For each teacher `valid` is the batch's: a row counts for all teachers or for none. A batch
        without parts has no targets.
        """
        decoded = [part.fetched.decode(device) for part in self.parts]
        if len(decoded) < 2:
            return decoded[0] if decoded else {}
        order = torch.from_numpy(np.argsort(np.concatenate([p.places for p in self.parts])))
        order = order.to(device, non_blocking=True)
        joined = {}
        for teacher in decoded[0]:
            columns = zip(*(targets[teacher] for targets in decoded), strict=True)
            joined[teacher] = Targets(*(torch.cat(column)[order] for column in columns))
        return joined


@dataclass(frozen=True)
class Loader:
    """How one worker of a run loads its batches: execution, never identity.

    Attributes:
        workers: the run's settings: threads, batches ahead, how stores are read.
        rank: of this worker.
        world_size: workers that share each global batch; the r-th has its r-th stretch.

    Raises:
        BadInput: there is no such rank.
    """

    workers: WorkersConfig
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise BadInput(
                f"rank {self.rank}: a world of {self.world_size} has ranks 0 to "
                f"{self.world_size - 1}"
            )

    def stretch(self, num_rows: int) -> tuple[int, int]:
        """Return this worker's rows of a global batch, first and one past the last."""
        start, stop = (num_rows * each // self.world_size for each in (self.rank, self.rank + 1))
        return start, stop


class Batches:
    """Iterates over a rank's micro-batches, made by threads some batches ahead.

    Args:
        feeds: dataset -> how it is read; at least those that `draw` names.
        draw: step -> global batch.
        resolutions: step -> resolutions.
        micro_batch: (student scale, rows of this rank) -> rows of a micro-batch.
        steps: which steps, in order.
        loader: how this worker loads them.
        wait: called before a step that shards are missing of, once those before it are used up;
            None: all are there.

    Raises:
        BadInput: `draw` names a dataset without a feed.
    """

    def __init__(
        self,
        feeds: Mapping[str, Feed],
        draw: Draw,
        resolutions: Callable[[int], Resolutions],
        micro_batch: Callable[[int, int], int],
        steps: range,
        loader: Loader,
        wait: Wait | None = None,
    ) -> None:
        missing = set(draw.names) - set(feeds)
        if missing:
            raise ValueError(f"no feed of dataset {', '.join(sorted(missing))}")
        self._feeds = [feeds[name] for name in draw.names]
        self._draw, self._resolutions, self._micro_batch = draw, resolutions, micro_batch
        self._steps, self._loader, self._wait = steps, loader, wait
        self._buffers = Buffers()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches in order; the threads end with the iteration."""
        addresses = self._announced(self._addresses())
        settings = self._loader.workers
        prefetch = settings.prefetch_batches
        with _Pool(settings.loader_threads) as drawers, _Pool(prefetch) as makers:
            ahead: deque[tuple[Future[Batch], float]] = deque()
            for address in addresses:
                step, micro, *_ = address
                seconds = 0.0
                if self._wait is not None and micro == 0:
                    missing = self._missing_of(step)
                    while ahead and missing():  # meanwhile the steps before it are trained
                        yield self._waited(ahead)
                    seconds = self._wait(f"step {step}", "shards", missing)
                ahead.append((makers.submit(self._make, *address, drawers), seconds))
                if len(ahead) > prefetch:
                    yield self._waited(ahead)
            while ahead:
                yield self._waited(ahead)

    def _missing_of(self, step: int) -> Callable[[], int]:
        """Return what counts the shards that are not there yet, of all workers' rows of a step.

        All workers wait for the same shards: none waits for a peer inside of a collective.
        """
        drawn, resolutions = self._draw(step), self._resolutions(step)
        asked = [
            (feed, drawn.rows[own], drawn.view_numbers[own])
            for number, feed in enumerate(self._feeds)
            if (own := drawn.datasets == number).any()
        ]
        return lambda: sum(
            feed.num_missing(rows, view_numbers, resolutions) for feed, rows, view_numbers in asked
        )

    def _addresses(self) -> Iterator[Address]:
        """Walk over addresses: cheap, done by the consuming thread."""
        for step in self._steps:
            num_rows = self._draw.size(step)
            start, stop = self._loader.stretch(num_rows)
            if start == stop:
                raise BadInput(
                    f"step {step}: {num_rows} rows for {self._loader.world_size} workers; "
                    "global_batch wants at least one row a worker"
                )
            drawn = self._draw(step, start, stop)
            size = self._micro_batch(self._resolutions(step).student, stop - start)
            starts = range(start, stop, size)
            for micro, first in enumerate(starts):
                rows = slice(first - start, min(first + size, stop) - start)
                yield step, micro, len(starts), first, Drawn(*(column[rows] for column in drawn))

    def _announced(self, addresses: Iterator[Address]) -> Iterator[Address]:
        """Say what is wanted HINTED_BATCHES ahead to feeds that are read through a mirror."""
        if not any(feed.mirrored for feed in self._feeds):
            yield from addresses
            return
        ahead: deque[Address] = deque()
        for address in addresses:
            step, *_, drawn = address
            for number, feed in enumerate(self._feeds):
                places = np.flatnonzero(drawn.datasets == number)
                feed.will_need(
                    drawn.rows[places], drawn.view_numbers[places], self._resolutions(step)
                )
            ahead.append(address)
            if len(ahead) > HINTED_BATCHES:
                yield ahead.popleft()
        yield from ahead

    @staticmethod
    def _waited(ahead: "deque[tuple[Future[Batch], float]]") -> Batch:
        """Take the first batch once it is made, told how long was waited for it, and what comes."""
        future, seconds = ahead.popleft()
        started = time.perf_counter()
        batch = future.result()
        waited = seconds + time.perf_counter() - started
        return replace(batch, wait_seconds=waited, coming=ahead[0][0] if ahead else None)

    def _make(
        self,
        step: int,
        micro: int,
        num_micro: int,
        first_place: int,
        drawn: Drawn,
        drawers: ThreadPoolExecutor,
    ) -> Batch:
        """Make one batch, its images decoded and drawn by `drawers`; called in a thread."""
        resolutions = self._resolutions(step)
        shape = len(drawn), 3, resolutions.student, resolutions.student
        pixels = torch.from_numpy(self._buffers.take(shape, np.uint8))
        valid = np.ones(len(drawn), bool)
        sample_ids = [""] * len(drawn)
        parts = []
        for number, feed in enumerate(self._feeds):
            places = np.flatnonzero(drawn.datasets == number)
            if not len(places):
                continue
            served = feed.serve(
                places, drawn.rows[places], drawn.view_numbers[places], resolutions, drawers
            )
            parts.append(served.part)
            channels_first = torch.from_numpy(served.pixels).permute(0, 3, 1, 2)
            if len(places) == len(drawn):
                pixels.copy_(channels_first)
            else:
                pixels[torch.from_numpy(places)] = channels_first
            valid[places] = served.part.fetched.valid
            for place, name in zip(places.tolist(), served.sample_ids, strict=True):
                sample_ids[place] = name
        return Batch(
            step,
            micro,
            num_micro,
            first_place,
            resolutions,
            sample_ids,
            drawn.view_numbers,
            pixels,
            valid,
            parts,
        )


class _Pool(ThreadPoolExecutor):
    """A thread pool that drops work not yet begun when it is left."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown(wait=True, cancel_futures=True)
