"""Flow `distill`: teacher caches, every stage of a recipe, evaluation and report.

    teacher-cache -> stage 1 -> the proxy's caches -> stages 2 and 3 -> evaluation -> report

Each stage is a Ray job; a recipe without a proxy has stage 2 alone.

A step whose output is there already does nothing: caches by their manifests, a stage by its last
checkpoint, evaluation and report by the fingerprint of what they were made of.
"""

import os
import sys
import time

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import artifacts, summary
from flows.parameters import Overrides, RecipeName
from flows.ray_jobs import job_cluster, run_job
from flows.teacher_cache import build
from pipelines import evaluate, pyramid, recipes, report
from pipelines.config import PROXY, Recipe, StageConfig
from pipelines.errors import BAD_INPUT
from pipelines.evaluate import Evaluation
from pipelines.jobs import cache_jobs, proxy_jobs
from pipelines.progress import Relay
from pipelines.pyramid import StageFigures


@task(name="train", task_run_name="train {stage}", cache_policy=NO_CACHE)
def train(stage: str, recipe: str, overrides: list[str], address: str) -> None:
    """Train one stage as a Ray job, its output and progress shown here.

    Raises:
        ValueError: the job refused its input; its own sentence is the last of its output.
        RuntimeError: the job failed.
    """
    words = [stage, "--recipe", recipe, *(word for item in overrides for word in ("--set", item))]
    env = {
        "EUPE_HOME": str(recipes.home()),
        "EUPE_PROGRESS": "records",
        "OMP_NUM_THREADS": str(os.cpu_count()),  # Ray gives a job's driver one thread
    }
    last = ""

    def say(line: str) -> None:
        nonlocal last
        last = line.strip() or last
        print(line.rstrip("\n"), file=sys.stderr)

    with artifacts.progress(f"train-{stage}"), Relay(say) as relay:
        code = run_job(words, address, env, relay.feed)
    if code == BAD_INPUT:
        raise ValueError(f"{stage}: {last}")
    if code:
        raise RuntimeError(f"{stage} failed with exit code {code}; its output is above")


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate_student(recipe: Recipe, stage: StageConfig) -> Evaluation:
    """Compare the student with itself before training, its teachers and a constant."""
    with artifacts.progress("evaluate"):
        return evaluate.evaluate(recipe, stage, evaluate.device(recipe))


@task(name="stage figures", task_run_name="figures of {stage.stage}", cache_policy=NO_CACHE)
def look_at_stage(recipe: Recipe, stage: StageConfig) -> StageFigures:
    """Measure a stage's losses and its held-out cosine at every scale."""
    return pyramid.stage_figures(recipe, stage, evaluate.device(recipe))


@task(name="report", cache_policy=NO_CACHE)
def write_report(
    recipe: Recipe,
    stage: StageConfig,
    evaluation: Evaluation,
    seconds: dict[str, float],
    stages: dict[str, StageFigures],
) -> dict[str, object]:
    """Write summary.json and report.html; return the summary."""
    return report.write(recipe, stage, evaluation, seconds, stages, evaluate.device(recipe))


@flow(name="distill", flow_run_name="distill {recipe}")
def distill(
    recipe: RecipeName = "demo",
    overrides: Overrides = [],  # noqa: B006 (Prefect shows it as the default; nobody changes it)
) -> dict[str, object]:
    """Run a recipe from images to report.

    Args:
        recipe: name of the recipe.
        overrides: fields to change, path.to.field=value.

    Returns:
        the summary, which is also in the run directory.

    Raises:
        ValueError: bad input: recipe, override, images, weights or a checkpoint of another run.
        StoreError: a store that cannot be used or written.
        RuntimeError: a stage's job failed.
    """
    asked = recipes.get(recipe, overrides)
    seconds: dict[str, float] = {}
    started = time.monotonic()

    def clock(step: str) -> None:
        seconds[step] = time.monotonic() - started - sum(seconds.values())

    with job_cluster() as address:  # one Ray for caching and training
        clock("start ray")
        build([cache_jobs(asked)], f"Stores of recipe {recipe}")
        clock("teacher caches")
        cached = False
        for stage in asked.stages:
            if PROXY in stage.teachers and not cached:
                build([proxy_jobs(asked)], f"Stores of the proxy of recipe {recipe}")
                cached = True
                clock("proxy caches")
            train(stage.stage, recipe, overrides, address)
            clock(stage.stage)
    found = report.current(asked)
    if found is None:
        evaluation = evaluate_student(asked, asked.stages[-1])
        stages = {stage.stage: look_at_stage(asked, stage) for stage in asked.stages}
        clock("evaluation")
        found = write_report(asked, asked.stages[-1], evaluation, seconds, stages)
    artifacts.table("distill-summary", summary.rows(found), summary.steps(found))
    print(f"{asked.directory}: summary.json, report.html", file=sys.stderr)
    return found
