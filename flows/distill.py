"""Flow `distill`: teacher caches, every stage of a recipe, evaluation and report.

    teacher-cache -> stage 1 -> the proxy's caches -> stages 2 and 3 -> evaluation -> report

Each stage is a Ray job, and so are evaluation and report together; a recipe without a proxy has
stage 2 alone.

A step whose output is there already does nothing: caches by their manifests, a stage by its
address, evaluation and report by the fingerprint of what they were made of. What is old is said.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from cache.files import copies
from eupe.errors import BadInput
from flows import artifacts
from flows.parameters import Overrides, RecipeName
from flows.ray_jobs import job_cluster, run_job
from flows.teacher_cache import build
from pipelines.caching import beforehand
from pipelines.evaluation import report, tables
from pipelines.machines import cluster, job_folder
from pipelines.machines.errors import BAD_INPUT, failure
from pipelines.machines.progress import followed
from pipelines.recipe import recipes
from pipelines.recipe.config import PROXY
from pipelines.recipe.stores import cache_jobs, proxy_jobs
from pipelines.training import outputs


@task(name="train", task_run_name="train {stage}", cache_policy=NO_CACHE)
def train(stage: str, arguments: list[str], directory: Path, address: str, gpus: int) -> None:
    """Train one stage of the recipe that `arguments` name, as a Ray job; see `run`."""
    run(f"train-{stage}", [stage, "--recipe", *arguments], directory, address, gpus)


@task(name="report", cache_policy=NO_CACHE)
def make_report(
    arguments: list[str], seconds: dict[str, float], directory: Path, address: str, gpus: int
) -> None:
    """Evaluate the recipe that `arguments` name and write its report, as a Ray job; see `run`."""
    clocked = [f"--seconds={step}={took:.1f}" for step, took in seconds.items()]
    run("report", ["eupe", "report", *arguments, *clocked], directory, address, gpus)


def run(key: str, words: list[str], directory: Path, address: str, gpus: int) -> None:
    """Run one of our commands as a Ray job, its output and progress shown here.

    Args:
        key: of the progress artifact.
        words: of the command.
        directory: of the run, which the job sees too: it says there how far it is.
        address: of the job API.
        gpus: that the command itself, not workers that it starts, computes on.

    Raises:
        BadInput: the job refused its input; with its own sentence.
        RuntimeError: the job failed.
    """
    env = {"EUPE_HOME": str(recipes.home())}
    if cluster.address_named() is None:  # Ray gives a job's driver one thread; a cluster's own
        env["OMP_NUM_THREADS"] = str(os.cpu_count())  # setting is that of its nodes

    def say(chunk: str) -> None:
        print(chunk, end="", file=sys.stderr, flush=True)

    with job_folder.made(directory, key) as folder:
        env[job_folder.VARIABLE] = str(folder)
        with artifacts.progress(key), followed(folder):
            code = run_job(words, address, env, say, gpus)
        why = failure(folder)
    if not code:
        return
    said = "its output is above" if why is None else why.sentence
    if code == BAD_INPUT:
        raise BadInput(f"{words[0]}: {said}")
    raise RuntimeError(f"{words[0]} failed with exit code {code}: {said}")


@flow(name="distill", flow_run_name=artifacts.run_name("distill", "recipe"))
def distill(
    recipe: RecipeName = "demo",
    overrides: Overrides = [],  # noqa: B006 (Prefect shows it as the default; nobody changes it)
) -> dict[str, object]:
    """Run a recipe from images to report.

    Args:
        recipe: name of a recipe, or a YAML file that changes one.
        overrides: fields to change, path.to.field=value; a stage, teacher or train set is
            addressed by its name.

    Returns:
        the summary, which is also in the run directory.

    Raises:
        BadInput: bad input: recipe, override, images, weights or a checkpoint of another run.
        StoreError: a store that cannot be used or written.
        RuntimeError: a stage's job failed.
    """
    asked = recipes.get(recipe, overrides)
    arguments = [recipe, *(word for item in overrides for word in ("--set", item))]
    gpus = int(asked.workers.use_gpu)
    seconds: dict[str, float] = {}
    last = time.monotonic()

    def clock(step: str) -> None:
        nonlocal last
        seconds[step], last = time.monotonic() - last, time.monotonic()

    beforehand.check(asked)
    outputs.bring(asked.directory)
    with job_cluster() as address:  # one Ray for caching and training
        clock("start ray")
        beforehand.check_cluster(asked)
        if asked.workers.use_gpu:
            cluster.require_gpus(asked.workers.count, "workers.use_gpu = true")
        look_over = partial(beforehand.check_labels, asked)
        build([cache_jobs(asked)], f"Stores of recipe {recipe}", look_over=look_over)
        clock("teacher caches")
        cached = False
        for stands in outputs.standing(asked):
            print(stands, file=sys.stderr)
        for stage in asked.stages.values():
            if PROXY in stage.teachers and not cached:
                build([proxy_jobs(asked)], f"Stores of the proxy of recipe {recipe}")
                cached = True
                clock("proxy caches")
            if (output := outputs.asked(asked, stage)).judged():
                outputs.begin(asked, output)
                seconds[stage.name] = output.seconds()
                continue
            own = gpus if asked.workers.count == 1 else 0
            train(stage.name, arguments, asked.directory, address, own)
            outputs.bring(asked.directory)
            clock(stage.name)
        found = report.current(asked)
        if found is None:
            make_report(arguments, seconds, asked.directory, address, gpus)
            outputs.bring(asked.directory)
            found = report.read(asked)
    said = [*tables.verdicts(found), tables.steps_line(found)]
    artifacts.table("distill-encoders", tables.encoder_rows(found), tables.table_line(found))
    artifacts.table("distill-summary", tables.closing_rows(found), "\n\n".join(said))
    print(f"{copies.named(asked.directory)}: summary.json, report.html", file=sys.stderr)
    return found
