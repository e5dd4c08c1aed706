"""What a plan comes to on a machine: hours, money, bottlenecks, and when caching pays.

Every number is a `Figure`, marked as computed, assumed or measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from pipelines.caching.plan import Plan, StagePlan, StorePlan
from pipelines.caching.rates import Figure, How, Machine, Rates, described
from pipelines.recipe.config import PIXELS

NODE_GPUS = 8
"""Accelerators of a usual node."""
HOUR = 3600.0
MARKS: dict[How, str] = {"computed": "", "assumed": "~", "measured": "="}
"""How a figure in a table is marked."""
LEGEND = (
    "No mark: computed from the recipe and the file format. ~: rests on an assumption, each of "
    "which --json names with its source. =: rests on what was measured here."
)
UNITS = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True)
class Outlook:
    """A plan on a machine.

    Attributes:
        plan: what is planned.
        machine: what it runs on.
        rates: what is assumed.
        measured: fields of `rates` that were measured here.
        disk_bytes: that caches may take.
        here_seconds: of a build on the Ray at hand, as a short one was measured; None: it was not.
    """

    plan: Plan
    machine: Machine
    rates: Rates
    measured: frozenset[str]
    disk_bytes: float
    here_seconds: float | None = None

    def build_seconds(self) -> dict[str, float]:
        """Return what a build takes of each: GPUs, cores, and the disk; the longest counts."""
        flops = sum(store.flops for store in self.plan.stores.values())
        pictures = sum(each.images for each in self.plan.passes.values())
        return {
            "teachers on GPUs": flops / self._flops("extraction_utilisation"),
            "decoding on cores": pictures / self._decoding,
            "writing to disk": self.plan.num_bytes / self._disk,
        }

    def stage_seconds(self, stage: StagePlan, live: bool = False) -> dict[str, float]:
        """Return what a stage takes of each; the longest counts.

        Args:
            stage: which.
            live: with its teachers in the loop, and without caches.
        """
        training = stage.train_flops / self._flops("training_utilisation")
        if live:
            teachers = stage.teacher_flops / self._flops("extraction_utilisation")
            return {
                "training on GPUs": training + teachers,
                "decoding on cores": stage.samples / self._decoding,
            }
        return {
            "training on GPUs": training,
            "reading from disk": stage.read_bytes / self._disk,
            "decoding on cores": stage.decoded / self._decoding,
        }

    def build_dollars(self) -> float:
        """Return the price of building all caches and keeping them."""
        files = sum(store.files for store in self.plan.stores.values())
        return (
            self._gpu_dollars(max(self.build_seconds().values()))
            + files / 1e6 * self.rates.put_million
            + self.plan.num_bytes / 1e12 * self.rates.terabyte_month * self.rates.months
        )

    def run_dollars(self, live: bool) -> float:
        """Return the price of all stages once, from caches or with live teachers."""
        stages = self.plan.stages.values()
        seconds = sum(max(self.stage_seconds(stage, live).values()) for stage in stages)
        asked = 0.0 if live else sum(2 * stage.read_shards for stage in stages)
        return self._gpu_dollars(seconds) + asked / 1e6 * self.rates.get_million

    def break_even(self) -> int | None:
        """Return the runs from which caching costs less; None: it never does."""
        saved = self.run_dollars(live=True) - self.run_dollars(live=False)
        return None if saved <= 0 else max(1, math.ceil(self.build_dollars() / saved))

    def most_views(self) -> int:
        """Return the largest number of views a sample that fits the disk; 0: not even one does."""
        per_view, rest = 0.0, 0.0
        for store in self.plan.stores.values():
            number, _, kind = store.views.partition(" ")
            if kind == "augmented":
                per_view += store.num_bytes / int(number)
            else:
                rest += store.num_bytes
        return max(0, int((self.disk_bytes - rest) // per_view)) if per_view else 1

    def _flops(self, utilisation: str) -> float:
        share: float = getattr(self.rates, utilisation)
        return self.machine.gpu.flops * self.machine.number * share

    @property
    def _nodes(self) -> float:
        return max(1.0, self.machine.number / NODE_GPUS)

    @property
    def _decoding(self) -> float:
        cores = self.machine.gpu.node_cores * self.machine.number
        return cores * self.rates.decode_views

    @property
    def _disk(self) -> float:
        return self.rates.disk_bytes * self._nodes

    def _gpu_dollars(self, seconds: float) -> float:
        return seconds / HOUR * self.machine.number * self.rates.gpu_hour

    def _on(self, value: float, unit: str, *fields: str) -> Figure:
        """Return a figure that rests on these rates."""
        how: How = "measured" if set(fields) <= self.measured else "assumed"
        return Figure(value, unit, how)

    def stores(self) -> list[dict[str, object]]:
        """Return a line a store."""
        lines = [self._store_line(store) for store in self.plan.stores.values()]
        total: dict[str, object] = dict.fromkeys(lines[0], "")
        total |= {
            "store": "all",
            "on disk": Figure(self.plan.num_bytes, "B", "computed"),
            "objects": Figure(sum(s.files for s in self.plan.stores.values()), "", "computed"),
            "forward": Figure(sum(s.flops for s in self.plan.stores.values()), "FLOP", "computed"),
            "GPU hours": self._gpu_hours(sum(s.flops for s in self.plan.stores.values())),
        }
        return [*lines, total]

    def _store_line(self, store: StorePlan) -> dict[str, object]:
        return {
            "store": f"{store.dataset}, {store.teacher} at {store.resolution}",
            "views": store.views,
            "codec": store.codec,
            "built": Figure(100 * store.share, "%", "computed"),
            "images": Figure(store.images, "", "computed"),
            "a row": Figure(store.row_bytes, "B", "computed"),
            "on disk": Figure(store.num_bytes, "B", "computed"),
            "objects": Figure(store.files, "", "computed"),
            "forward": Figure(store.flops, "FLOP", "computed"),
            "GPU hours": self._gpu_hours(store.flops),
        }

    def _gpu_hours(self, flops: float) -> Figure:
        seconds = flops / self._flops("extraction_utilisation") * self.machine.number
        return self._on(seconds / HOUR, "h", "extraction_utilisation")

    def stages(self) -> list[dict[str, object]]:
        """Return a line a stage."""
        lines = list[dict[str, object]]()
        gpus, fields = self.machine.number, ("training_utilisation", "decode_views")
        for stage in self.plan.stages.values():
            cached, live = self.stage_seconds(stage), self.stage_seconds(stage, live=True)
            wall, slow = max(cached.values()), max(live.values())
            order = sorted(cached, key=lambda name: -cached[name])
            cores = stage.samples / wall / self.rates.decode_views / gpus
            own = stage.decoded / wall / self.rates.decode_views / gpus
            lines.append(
                {
                    "stage": stage.name,
                    "samples": Figure(stage.samples, "", "computed"),
                    "epochs": Figure(stage.epochs, "", "computed"),
                    "hours": self._on(wall / HOUR, "h", *fields),
                    "hours live": self._on(slow / HOUR, "h", "extraction_utilisation", *fields),
                    "bound by": order[0],
                    "then by": f"{order[1]} ({100 * cached[order[1]] / wall:.0f} %)",
                    "read a GPU": self._on(stage.read_bytes / wall / gpus, "B/s", *fields),
                    "read a node": self._on(stage.read_bytes / wall / self._nodes, "B/s", *fields),
                    "requests a node": self._on(
                        2 * stage.read_shards / wall / self._nodes, "/s", *fields
                    ),
                    "cores a GPU": self._on(own, "", *fields),
                    "without pixels": self._on(cores, "", *fields),
                    "GPU memory": Figure(stage.memory_bytes, "B", "computed"),
                    "host memory": Figure(stage.host_bytes, "B", "computed"),
                }
            )
        return lines

    def totals(self) -> dict[str, Figure]:
        """Return hours and money, and what of it decides."""
        build = self.build_seconds()
        order = sorted(build, key=lambda name: -build[name])
        runs = self.break_even()
        stages = self.plan.stages.values()
        price = ("gpu_hour", "extraction_utilisation", "training_utilisation", "decode_views")
        hours = {
            live: sum(max(self.stage_seconds(stage, live).values()) for stage in stages) / HOUR
            for live in (False, True)
        }
        stores = self.plan.stores.values()
        pixels = sum(each.num_bytes for each in stores if each.teacher == PIXELS)
        here = {}
        if self.here_seconds is not None:
            here["building here"] = Figure(self.here_seconds / HOUR, "h", "measured")
        return {
            "pictures themselves": _pictures(self.plan, self.rates),
            "caches on disk": Figure(self.plan.num_bytes, "B", "computed"),
            "of which pixels of views": Figure(pixels, "B", "computed"),
            "room for caches": Figure(self.disk_bytes, "B", "computed"),
            **here,
            f"building, bound by {order[0]}, then {order[1]}": self._on(
                build[order[0]] / HOUR, "h", *price[1:]
            ),
            "a run from caches": self._on(hours[False], "h", *price[1:]),
            "a run with live teachers": self._on(hours[True], "h", *price[1:]),
            "price of the caches": self._on(self.build_dollars(), "$", *price),
            "price of a run from caches": self._on(self.run_dollars(live=False), "$", *price),
            "price of a run with live teachers": self._on(self.run_dollars(live=True), "$", *price),
            "runs from which caching pays": self._on(
                math.inf if runs is None else runs, "", *price
            ),
            "most views that fit": Figure(self.most_views(), "", "computed"),
        }

    def misfits(self) -> list[str]:
        """Return a sentence for each thing that does not fit."""
        found = []
        if self.plan.num_bytes > self.disk_bytes:
            found.append(
                f"the caches want {shown(Figure(self.plan.num_bytes, 'B', 'computed'))} and there "
                f"is room for {shown(Figure(self.disk_bytes, 'B', 'computed'))}: "
                f"{self.most_views()} view(s) a sample would fit"
            )
        found += [
            f"{stage.name}: weights, gradients and moments of one whole copy want "
            f"{shown(Figure(stage.memory_bytes, 'B', 'computed'))}, a {self.machine.name} has "
            f"{shown(Figure(self.machine.gpu.memory_bytes, 'B', 'computed'))}: "
            "strategy=fsdp2 shares them out"
            for stage in self.plan.stages.values()
            if stage.memory_bytes > 0.8 * self.machine.gpu.memory_bytes
        ]
        return found

    def plain(self) -> dict[str, Any]:
        """Return all of it as plain data, for JSON."""
        return {
            "machine": {"name": self.machine.name, "number": self.machine.number},
            "stores": [_plain(line) for line in self.stores()],
            "stages": [_plain(line) for line in self.stages()],
            "totals": _plain(self.totals()),
            "misfits": self.misfits(),
            "notes": list(self.plan.notes),
            "constants": described(self.rates, self.machine),
        }

    def draw(self, path: Path) -> None:
        """Draw cost against the number of runs, cached and live, as an SVG or PNG."""
        matplotlib.use("Agg")
        from matplotlib import pyplot

        even = self.break_even()
        most = max(10, 2 * (even or 0))
        runs = range(1, most + 1)
        cached = [self.build_dollars() + n * self.run_dollars(live=False) for n in runs]
        live = [n * self.run_dollars(live=True) for n in runs]
        figure, axes = pyplot.subplots(figsize=(6, 4))
        axes.plot(runs, cached, label="from caches, built once")
        axes.plot(runs, live, label="with live teachers")
        if even is not None:
            axes.axvline(even, color="grey", linestyle=":", label=f"caching pays from {even}")
        axes.set(xlabel="runs", ylabel="dollars (assumed prices)", ylim=(0, None))
        axes.legend()
        figure.tight_layout()
        figure.savefig(path)
        pyplot.close(figure)


def shown(figure: Figure) -> str:
    """Return a figure for people: three digits, its unit and its mark."""
    value, unit = figure.value, figure.unit
    if math.isinf(value):
        return "never"
    if unit in ("B", "B/s", "FLOP", "") and abs(value) >= 1000:
        power = min(int(math.log10(abs(value)) // 3), len(UNITS) - 1)
        value, unit = value / 1000**power, UNITS[power] + unit
    number = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{MARKS[figure.how]}{number} {unit}".strip()


def lines(table: list[dict[str, object]]) -> list[dict[str, str]]:
    """Return a table for people."""
    return [
        {name: shown(cell) if isinstance(cell, Figure) else str(cell) for name, cell in row.items()}
        for row in table
    ]


def _pictures(plan: Plan, rates: Rates) -> Figure:
    """Return the bytes of all sets' pictures."""
    sets = plan.pictures.values()
    total = sum(each.number * (each.mean_bytes or rates.picture_bytes) for each in sets)
    known = all(each.mean_bytes is not None for each in sets)
    return Figure(total, "B", "measured" if known else "assumed")


def _plain(row: Mapping[str, object]) -> dict[str, object]:
    return {
        name: cell._asdict() | ({"value": None} if math.isinf(cell.value) else {})
        if isinstance(cell, Figure)
        else cell
        for name, cell in row.items()
    }
