"""Trains the small stage plain and compiled, in a process without the shape checks.

Prints JSON: losses of either, how many graphs were compiled by each step, names in checkpoints.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipelines.records import checkpoint, tracking
from pipelines.training import compiled
from pipelines.training.batches import Batch
from pipelines.training.inputs import Inputs
from pipelines.training.loop import train_stage
from support import small_stage

GRAPHS: list[str] = []


def counting(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile nothing: the graph runs as it was traced."""
    GRAPHS.append(str(graph.graph))
    return graph.forward


def refusing(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Fail as a compiler would."""
    raise OSError("no compiler here")


def trained(directory: Path, compile_: bool) -> dict[str, Any]:
    """Train six steps of two and of one row; invalid rows and an evaluation are among them."""
    run = small_stage.recipe(
        directory,
        steps=6,
        micro_batch=2,
        global_batch=5,
        log_every=1,
        evaluate_every=3,
        student_resolutions=(16, 32),
        compile=compile_,
    )
    made, by_step = small_stage.inputs(run, invalid=[3]), []

    def counted(steps: range) -> Iterator[Batch]:
        for batch in made.batches(steps):
            if batch.micro == 0:
                by_step.append(len(GRAPHS))
            yield batch

    given = Inputs(counted, made.dims, made.normalisers, made.identity, made.pins)
    pixels = torch.zeros(7, 3, 32, 32, dtype=torch.uint8)
    judge = lambda model, done: {"seen": float(model(pixels)[0].patches.sum())}  # noqa: E731
    train_stage(run, run.stage("stage2"), given, directory / "stage2", evaluate=judge)
    saved = checkpoint.require(directory / "stage2")
    lines = tracking.read(directory / "stage2" / tracking.METRICS_FILE)
    return {
        "losses": [line["loss/total"] for line in lines if "loss/total" in line],
        "seen": [line["seen"] for line in lines if "seen" in line],
        "graphs": [*by_step, len(GRAPHS)],
        "names": [*saved.encoder(), *saved.heads()],
    }


def main(directory: Path) -> None:
    """Train plain and compiled, then with a compiler that fails."""
    compiled.BACKEND = counting
    found = {name: trained(directory / name, name == "compiled") for name in ("plain", "compiled")}
    torch._dynamo.reset()
    compiled.BACKEND = refusing
    try:
        trained(directory / "refused", True)
    except Exception as error:  # whatever it is: the test looks at it
        found["refused"] = {"said": str(error)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
