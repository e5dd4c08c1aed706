"""Flow `distill`: teacher caches, every stage of a recipe, evaluation and report.

    teacher-cache -> each stage as a Ray job -> evaluation -> summary.json, report.html

A step whose output is there already does nothing: caches by their manifests, a stage by its last
checkpoint.
"""

import os
import sys

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import artifacts
from flows.errors import BAD_INPUT
from flows.ray_jobs import run_job
from pipelines.progress import Relay


@task(name="train", task_run_name="train {stage}", cache_policy=NO_CACHE)
def train(stage: str, recipe: str, overrides: list[str], address: str) -> None:
    """Train one stage as a Ray job, its output and progress shown here.

    Raises:
        ValueError: the job refused its input; its own sentence is the last of its output.
        RuntimeError: the job failed.
    """
    words = [stage, "--recipe", recipe, *(word for item in overrides for word in ("--set", item))]
    env = {"EUPE_PROGRESS": "records", "OMP_NUM_THREADS": str(os.cpu_count())}
    if "EUPE_HOME" in os.environ:
        env["EUPE_HOME"] = os.environ["EUPE_HOME"]
    last: list[str] = []

    def say(line: str) -> None:
        last[:] = [line.strip()] if line.strip() else last
        print(line.rstrip("\n"), file=sys.stderr)

    with artifacts.progress(f"train-{stage}"), Relay(say) as relay:
        code = run_job(words, address, env, relay.feed)
    if code == BAD_INPUT:
        raise ValueError(f"{stage}: {''.join(last)}")
    if code:
        raise RuntimeError(f"{stage} failed with exit code {code}; its output is above")
