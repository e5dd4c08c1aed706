"""The loss of one teacher on the device, for `benchmarks.gpu`: time, kernels and peak memory."""

from functools import partial

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.tables import Row
from eupe.encoders import Features
from eupe.losses import row_losses, teacher_loss
from pipelines.training import compiled as compiling

COLUMNS = {
    "student_grid": "",
    "compiled": "",
    "us_a_picture": ".1f",
    "bound_share": ".1%",
    "kernels": ".0f",
    "mb_a_picture": ".1f",
}


def measure(bench: Bench) -> None:
    """Measure forward and backward: a student's grid as large as the teacher's, and half of it."""
    for compiled in (False, True):
        for grid in (16, 8):
            label = f"grid {grid}, compiled {compiled}"
            bench.do(label, partial(_measured, bench, grid, compiled))


def _measured(bench: Bench, grid: int, compiled: bool) -> list[Row]:
    batch, side, width = (2, 16, 24) if bench.small else (128, 16, 1536)
    dtype = torch.float32 if bench.small else torch.bfloat16
    make = partial(torch.randn, device=bench.device)
    target = Features(make(batch, width), make(batch, side, side, width))
    patches = make(batch, grid, grid, width, dtype=dtype).requires_grad_()
    summary = make(batch, width, dtype=dtype).requires_grad_()
    valid = torch.ones(batch, dtype=torch.bool, device=bench.device)
    rows = compiling.row_losses() if compiled else row_losses

    def both() -> None:
        patches.grad = summary.grad = None
        prediction = Features(summary, patches)
        loss = teacher_loss(prediction, target, valid, count=float(batch), row_losses=rows)
        loss.total.backward()

    both()
    with bench.peak_memory() as peak:
        there = _allocated(bench)
        both()
    seconds, busy = bench.seconds(both), bench.busy(both)
    # Prediction and target read once on the way out and once on the way back, gradient written.
    own = patches.element_size() * grid**2
    passes = width * (2 * target.patches.element_size() * side**2 + 3 * own)
    return [
        {
            "student_grid": grid,
            "teacher_grid": side,
            "width": width,
            "batch": batch,
            "compiled": compiled,
            "us_a_picture": seconds / batch * 1e6,
            "bound_share": batch * passes / bench.peak["device to device"] / seconds,
            "kernels": busy.kernels,
            "kernel_seconds": busy.seconds,
            "mb_a_picture": (peak[0] - there) * 2**30 / batch / 1e6,
        }
    ]


def _allocated(bench: Bench) -> float:
    """Return what is taken of the device now, GiB."""
    if bench.device.type != "cuda":
        return 0.0
    return torch.cuda.memory_allocated(bench.device) / 2**30
