"""What is gathered before anything is judged: of a recipe, of this machine, of a cluster."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from cache.errors import StoreError
from cache.files import copies
from eupe.errors import BadInput
from pipelines.caching import beforehand, planning
from pipelines.caching.outlook import HOUR, Outlook
from pipelines.caching.plan import StagePlan, UnknownSize
from pipelines.caching.rates import GPUS, Machine, Rates, machine
from pipelines.doctor import probe
from pipelines.doctor.node import Node, Question, example, look
from pipelines.machines import cluster, every_node, pool, shared_folders
from pipelines.recipe.config import Recipe
from pipelines.release import licences

HERE = "this machine"
ANSWER_SECONDS = 600.0
"""For a node to look at itself: it hashes all weights."""
VARIABLES = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "PREFECT_API_URL",
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
    "NO_PROXY",
    "no_proxy",
)
SECRETS = ("RAY_AUTH_TOKEN", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
"""Variables of which only that they are set is gathered."""


class Token(NamedTuple):
    """Ray's token.

    Attributes:
        there: True if Ray finds one here, or is told where to look.
        file: where it looks, unless the environment holds the token.
        kept: True if there is such a file.
        exposed: True if others may read it.
    """

    there: bool
    file: str
    kept: bool
    exposed: bool


class Room(NamedTuple):
    """Bytes that the caches want beside what is there, and that are free; and where."""

    root: str
    wanted_bytes: float
    free_bytes: float


class Reading(NamedTuple):
    """Bytes a second that are read here, and by the plan; stage -> its hours (here, planned)."""

    bytes_second: float
    planned: float
    hours: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Facts:
    """Everything that is judged.

    Attributes:
        recipe: its name.
        here: this machine.
        nodes: of the Ray cluster, as they answered.
        no_cluster: why there is none to ask; None if there is, or none was to be asked.
        mute: node -> why it did not answer.
        refused: what a run of the recipe would be refused for.
        licences: weights -> their licence, None where nobody says.
        room: for the caches; None if nobody knows how many pictures there are, as `unplanned` says.
        unplanned: why there is no plan.
        reading: None where no accelerator waits for it.
        no_write: shared folder -> why nothing can be written there.
        token: of Ray.
        environment: variables of VARIABLES that are set; of SECRETS the names alone.
    """

    recipe: str
    here: Node
    nodes: tuple[Node, ...]
    no_cluster: str | None
    mute: Mapping[str, str]
    refused: tuple[str, ...]
    licences: Mapping[str, str | None]
    room: Room | None
    unplanned: str | None
    reading: Reading | None
    no_write: Mapping[str, str]
    token: Token
    environment: Mapping[str, str]


def gather(recipe: Recipe, on_cluster: bool, gpus: str | None) -> Facts:
    """Look at everything that a recipe will want.

    Args:
        recipe: its paths absolute.
        on_cluster: True to ask every node of the cluster that RAY_ADDRESS names.
        gpus: NAME:NUMBER of the accelerators that will be fed; None: those of this machine.

    Raises:
        BadInput: no such accelerator, or no cluster is named.
    """
    if on_cluster and cluster.address_named() is None:
        raise BadInput(
            "--cluster: RAY_ADDRESS names no cluster; set it to its GCS address, HEAD:6379"
        )
    on = machine_here() if gpus is None else machine(gpus)
    token = _token()  # before a connection invents one
    refused = beforehand.refusals(recipe)
    shared = (recipe.cache_root, recipe.run_directory, str(copies.named(recipe.outputs)))
    cluster_said = Asked([], {}, [], None)
    with shared_folders.laid(shared) as laid:
        question = Question(recipe, example(), laid.probes)
        here = look(HERE, question)
        if on_cluster:
            cluster_said = ask(question)
    room, unplanned, reading = _planned(recipe, on)
    sources = licences.sources(recipe.model_dump(mode="json"))
    return Facts(
        recipe=recipe.name,
        here=here,
        nodes=tuple(cluster_said.nodes),
        no_cluster=cluster_said.refused,
        mute=cluster_said.mute,
        refused=(*refused, *cluster_said.too_few),
        licences={f"{s.role} {s.name}": s.licence for s in sources if s.role != licences.PICTURES},
        room=room,
        unplanned=unplanned,
        reading=reading,
        no_write=laid.refused,
        token=token,
        environment={
            **{name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
            **{name: "set" for name in SECRETS if os.environ.get(name)},
        },
    )


def machine_here() -> Machine | None:
    """Return the accelerators of this machine, None without any that a plan knows."""
    if not torch.cuda.is_available():
        return None
    said = torch.cuda.get_device_name().lower()
    name = next((name for name in GPUS if name in said), None)
    return None if name is None else machine(f"{name}:{torch.cuda.device_count()}")


class Asked(NamedTuple):
    """What a cluster says: its nodes, why others are mute, what it has too few of; or a refusal."""

    nodes: list[Node]
    mute: Mapping[str, str]
    too_few: list[str]
    refused: str | None


def ask(question: Question) -> Asked:
    """Ask every live node of the cluster that RAY_ADDRESS names."""
    try:
        with cluster.connect():
            answers = every_node.ask(partial(look, question=question), ANSWER_SECONDS)
            nodes = [*answers.said.values()]
            return Asked(nodes, answers.mute, _too_few(question.recipe), None)
    except BadInput as error:
        return Asked([], {}, [], str(error))


def _too_few(recipe: Recipe) -> list[str]:
    """Return what the connected cluster has too few of for a recipe."""
    import ray

    extraction, workers = recipe.extraction, recipe.workers
    found = []
    try:
        pool.room(ray.nodes(), extraction.cpus_per_actor, extraction.gpus_per_actor)
    except BadInput as error:
        found.append(str(error))
    if workers.use_gpu:
        try:
            cluster.require_gpus(workers.count, f"workers.count = {workers.count}")
        except BadInput as error:
            found.append(str(error))
    return found


def _planned(recipe: Recipe, on: Machine | None) -> tuple[Room | None, str | None, Reading | None]:
    """Return the room that a recipe's plan wants, why there is no plan, and how fast it reads."""
    try:
        found = planning.outlook(recipe, (), on or machine(planning.USUAL), Rates())
    except (UnknownSize, BadInput, StoreError) as error:
        return None, str(error), None
    room = Room(
        recipe.cache_root,
        planning.missing_bytes(recipe, found.plan),
        planning.free_bytes(recipe),
    )
    if on is None or room.free_bytes < 2 * probe.STREAMS * probe.STREAM_BYTES:
        return room, None, None
    try:
        return room, None, against_plan(found, probe.reading(recipe.cache_root))
    except StoreError:  # that nothing can be written there is told by the probes
        return room, None, None


def against_plan(found: Outlook, bytes_second: float) -> Reading:
    """Compare what is read a second here with what a plan assumes, in hours of its stages."""
    rates = found.rates.model_copy(update={"disk_bytes": bytes_second})
    own = replace(found, rates=rates)
    hours = {
        stage.name: (_hours(own, stage), _hours(found, stage))
        for stage in found.plan.stages.values()
    }
    return Reading(bytes_second, found.rates.disk_bytes, hours)


def _hours(found: Outlook, stage: StagePlan) -> float:
    return max(found.stage_seconds(stage).values()) / HOUR


def _token() -> Token:
    file = cluster.token_file()
    kept = file.is_file()
    way = file.absolute().parents
    exposed = kept and file.stat().st_mode & 0o077 and all(f.stat().st_mode & 0o011 for f in way)
    return Token(cluster.has_token(), str(file), kept, bool(exposed))
