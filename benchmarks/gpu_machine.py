"""What the machine itself reaches, for `benchmarks.gpu`: every share is a share of this."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.tables import Row

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "polars", "pyarrow", "pydantic", "pillow")
MARKED = "from support.devices import"
"""In the files whose tests run on a CUDA device where there is one."""
TEST_SECONDS = 120


def describe(device: torch.device) -> dict[str, object]:
    """Return what is measured on."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    said: dict[str, object] = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": versions,
        "device": "cpu",
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        said |= {
            "device": about.name,
            "memory_gib": about.total_memory / 2**30,
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    return said


def measure(bench: Bench) -> None:
    """Measure matrix products and copies; `Bench.peak` keeps them for the others."""
    side, num_bytes = (64, 1 << 12) if bench.small else (8192, 1 << 29)
    for dtype in (torch.bfloat16, torch.float32):
        bench.do(str(dtype), partial(_products, bench, dtype, side))
    if bench.device.type == "cuda":
        bench.do("float32 as TF32", partial(_tf32, bench, side))
    for kind in ("host to device, pinned", "host to device", "device to host", "device to device"):
        bench.do(kind, partial(_copies, bench, kind, num_bytes))


def _products(bench: Bench, dtype: torch.dtype, side: int, name: str | None = None) -> list[Row]:
    a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    name = name or str(dtype).removeprefix("torch.")
    bench.peak[name] = 2 * side**3 / bench.seconds(lambda: a @ b)
    return [{"what": f"product of {side} x {side}, {name}", "per_s": bench.peak[name]}]


def _tf32(bench: Bench, side: int) -> list[Row]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return _products(bench, torch.float32, side, "float32 as TF32")
    finally:
        torch.set_float32_matmul_precision(before)


def _copies(bench: Bench, kind: str, num_bytes: int) -> list[Row]:
    pinned = bench.device.type == "cuda" and kind.endswith("pinned")
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=bench.device)
    moved = num_bytes
    if kind == "device to device":
        call, moved = partial(torch.empty_like(there).copy_, there), 2 * num_bytes
    elif kind == "device to host":
        call = partial(host.copy_, there)
    else:
        call = partial(there.copy_, host, non_blocking=True)
    bench.peak[kind] = moved / bench.seconds(call)
    return [{"what": f"copy, {kind}", "per_s": bench.peak[kind]}]


def run_tests(bench: Bench) -> None:
    """Run the tests that are marked gpu, in a process of their own; the rest of the suite not."""
    bench.do("pytest", partial(_tests, bench))


def _tests(bench: Bench) -> list[Row]:
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        if MARKED in path.read_text(encoding="utf-8")
    ]
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    words += ["--durations=10", "--tb=short", *(["--collect-only"] if bench.small else [])]
    try:
        done = subprocess.run(
            [*words, *files[: 1 if bench.small else None]],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(1.0, min(TEST_SECONDS, bench.seconds_left)),
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")
        raise RuntimeError(
            f"pytest: no end after {error.timeout:.0f} s\n{said[-12_000:]}"
        ) from error
    if done.returncode:
        raise RuntimeError(
            f"pytest: {done.returncode}\n{done.stdout[-12_000:]}{done.stderr[-4000:]}"
        )
    return [{"files": files, "said": done.stdout.strip().splitlines()[-30:]}]
