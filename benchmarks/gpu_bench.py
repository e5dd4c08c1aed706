"""One run of `benchmarks.gpu`: its device, its time, and what it has found, kept in a file."""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # it is there

from benchmarks.tables import Row

CODECS = ("float16", "rot4", "grid1")
ROUNDS = 3
WARM_UP = 2
"""Calls before any is timed: kernels are chosen and memory is taken."""


@dataclass(frozen=True)
class Busy:
    """What a device did in some calls, by its own clock, each a mean over calls.

    Attributes:
        seconds: in which at least one kernel ran.
        copy_seconds: in which memory was copied or set.
        any_seconds: in which either was under way; what is left of the wall time was idle.
        kernels: that were started.
    """

    seconds: float
    copy_seconds: float
    any_seconds: float
    kernels: float

    def idle_share(self, wall_seconds: float) -> float:
        """Return the share of a call's wall time in which the device did nothing."""
        return max(0.0, 1 - self.any_seconds / wall_seconds)


@dataclass
class Bench:
    """A run of the sections.

    Attributes:
        device: that is measured.
        small: True for everything at the size of a test.
        ends: when it shall be done, `time.monotonic`.
        folder: for stores and checkpoints.
        path: of the JSON; None: it is kept nowhere.
        labels: parts of the labels that are measured; none for all of them.
        codecs: of the stores that a training step reads.
        rounds: over what a training step is measured in.
        peak: what the machine was found to reach: FLOP/s by dtype, bytes/s by kind of copy.
        found: everything, as it is written.
    """

    device: torch.device
    small: bool
    ends: float
    folder: Path
    path: Path | None
    labels: Sequence[str] = ()
    codecs: Sequence[str] = CODECS
    rounds: int = ROUNDS
    peak: dict[str, float] = field(default_factory=dict)
    found: dict[str, object] = field(default_factory=dict)
    _sections: dict[str, dict[str, object]] = field(default_factory=dict)
    _section_ends: float = 0.0
    _now: str = ""

    @contextmanager
    def section(self, name: str, seconds: float) -> Iterator[None]:
        """Do a section; a fault in it is written down, and the next one begins.

        Args:
            name: of the section.
            seconds: that it may take; what it has not begun by then is left out.
        """
        started = time.monotonic()
        self._now, self._section_ends = name, min(self.ends, started + seconds)
        own: dict[str, object] = {"rows": [], "faults": {}, "left_out": []}
        self._sections[name] = own
        self.found["sections"] = self._sections
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            yield
        except Exception:  # whatever it was: it is reported, and the rest is measured
            self._fault(name)
        own["seconds"] = time.monotonic() - started
        print(f"{name}: {own['seconds']:.1f} s", file=sys.stderr, flush=True)
        self.write()

    def do(self, label: str, measure: Callable[[], Sequence[Row]]) -> None:
        """Measure one thing of the section, if there is time; keep its rows, or its fault."""
        own = self._sections[self._now]
        if self.labels and not any(each in label for each in self.labels):
            return
        if time.monotonic() >= self._section_ends:
            own["left_out"] += [label]  # type: ignore[operator]
            return
        started = time.monotonic()
        try:
            rows = [*measure()]
        except Exception:  # whatever it was: it is reported, and the rest is measured
            self._fault(label)
            rows = []
        took = time.monotonic() - started
        own["rows"] += [{**row, "took_seconds": took} for row in rows]  # type: ignore[operator]
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        self.write()

    def _fault(self, label: str) -> None:
        text = traceback.format_exc()
        print(f"{self._now}, {label}: {text}", file=sys.stderr, flush=True)
        self._sections[self._now]["faults"][label] = text  # type: ignore[index]

    def rows(self, name: str) -> list[Row]:
        """Return the rows of a section; none if it was not begun."""
        found = self._sections.get(name, {}).get("rows", [])
        assert isinstance(found, list)
        return found

    @property
    def faults(self) -> dict[str, str]:
        """Section and label -> the fault's traceback."""
        return {
            f"{name}, {label}": text
            for name, own in self._sections.items()
            for label, text in own["faults"].items()  # type: ignore[attr-defined]
        }

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Section -> what it had no time to begin."""
        return {
            name: own["left_out"]  # type: ignore[misc]
            for name, own in self._sections.items()
            if own["left_out"]
        }

    @property
    def seconds_left(self) -> float:
        """Until the section shall be done."""
        return self._section_ends - time.monotonic()

    def write(self) -> None:
        """Write what is known now, whole or not at all."""
        if self.path is None:
            return
        beside = self.path.with_name(f"{self.path.name}.tmp")
        beside.write_text(json.dumps(self.found, indent=1, default=str) + "\n")
        os.replace(beside, self.path)

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(
        self, call: Callable[[], object], least: float = 0.3, most_calls: int = 200
    ) -> float:
        """Return the mean time of a call in a row of them, warm-up apart.

        Args:
            call: what to time.
            least: seconds that are measured, unless `most_calls` are done before.
            most_calls: at most.
        """
        for _ in range(WARM_UP):
            call()
        self.synchronise()
        if self.small:
            least, most_calls = 0.0, 1
        started, calls = time.perf_counter(), 0
        while calls < most_calls and (not calls or time.perf_counter() - started < least):
            call()
            calls += 1
            if calls % 8 == 0:  # else the queue hides what was asked for
                self.synchronise()
        self.synchronise()
        return (time.perf_counter() - started) / calls

    def busy(self, call: Callable[[], object], calls: int = 3) -> Busy:
        """Return what the device does in a call."""
        call()
        with self.profiled(calls) as found:
            for _ in range(calls):
                call()
        return found[0]

    @contextmanager
    def profiled(self, calls: int) -> Iterator[list[Busy]]:
        """Profile what runs meanwhile: `calls` calls; the list has what was found afterwards.

        On a CPU torch's operators stand for kernels.
        """
        found: list[Busy] = []
        kind = "CUDA" if self.device.type == "cuda" else "CPU"
        self.synchronise()
        activities = [getattr(torch.profiler.ProfilerActivity, kind)]
        with torch.profiler.profile(activities=activities) as profile:
            yield found
            self.synchronise()
        kernels, copies = list[tuple[float, float]](), list[tuple[float, float]]()
        for event in profile.events() or []:
            if event.device_type == getattr(DeviceType, kind):
                own = copies if event.name.startswith(("Memcpy", "Memset")) else kernels
                own.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
        computed, copied, either = (
            covered(each) / calls for each in (kernels, copies, kernels + copies)
        )
        found.append(Busy(computed, copied, either, len(kernels) / calls))

    @contextmanager
    def peak_memory(self) -> Iterator[list[float]]:
        """Return what a block takes of the device at most, GiB, once it is over; 0 on a CPU."""
        found: list[float] = []
        if self.device.type != "cuda":
            yield found
            found.append(0.0)
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        found.append(torch.cuda.max_memory_allocated(self.device) / 2**30)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return how long at least one of some spans was under way."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total
