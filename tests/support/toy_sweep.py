"""A sweep over stages in small: four runs of eight stages, five of them distinct. Also a child.

And a smaller one still, over the width of heads of one stage.

    python -m support.toy_sweep FOLDER SWEEP

works the sweep and prints what it computed as JSON; COUNT in its environment names a file that gets
a line for each node it has computed.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from pipelines.caching import precompute
from pipelines.machines.in_process import InProcess
from pipelines.recipe import recipes
from pipelines.recipe.stores import CacheJob
from pipelines.sweeps import results, work
from pipelines.sweeps.file import Run, read, runs
from pipelines.sweeps.graph import Node
from support import stage_runs
from support.small_caches import in_process

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "emoji.parquet"
NAME = "toy"
STAGES = {
    "1-2-3": {},
    "1-2": {"stages": ["stage1", "stage2"]},
    "1-3": {"stages": ["stage1", "stage3"], "stages.stage3.initial": None},
    "2": {
        "stages": ["stage2"],
        "stages.stage2.teachers": ["lite0", "vit8"],
        "stages.stage2.teacher_resolutions": {"lite0": [64], "vit8": [32]},
    },
}


WIDTHS = {f"w{width}": {**STAGES["2"], "stages.stage2.head_hidden": width} for width in (8, 16, 24)}


def sweep(folder: Path, **fields: object) -> Path:
    """Write the sweep file, some of its fields others; return its path."""
    path = folder / "toy_stages.yaml"
    path.write_text(
        yaml.safe_dump({"recipe": NAME, "axes": {"stages": STAGES}, **fields}, sort_keys=False)
    )
    return path


def install(folder: Path) -> None:
    """Let the toy recipe be found by its name, and caches be built in this process."""
    recipe = stage_runs.three_stages(folder, EMOJI)
    recipes.RECIPES[NAME] = lambda: recipe
    precompute.extractors = here  # type: ignore[assignment]


@contextmanager
def here(job: CacheJob) -> Iterator[InProcess]:
    """Do in this process what actors do."""
    yield in_process(job)


def asked(path: Path) -> list[Run]:
    return runs(read(path))


def counting(node: Node) -> bool:
    """Compute a node, and write down that this process did."""
    computed = work.compute(node)
    if computed:
        with open(os.environ["COUNT"], "a") as file:
            file.write(f"{node.address} {os.getpid()}\n")
    return computed


if __name__ == "__main__":
    install(Path(sys.argv[1]))
    done = work.work(work.prepare(asked(Path(sys.argv[2]))), counting)
    results.write(done.graph)
    print(json.dumps({"computed": done.computed, "failed": done.failed}))
