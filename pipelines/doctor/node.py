"""What a machine says of itself: one function, called here and on every node of a cluster."""

import hashlib
import io
import platform
import resource
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import ray._common.utils
from PIL import Image

import cache
import eupe
from cache.errors import StoreError
from cache.files import atomic
from eupe import views, weights
from eupe.errors import BadInput
from pipelines.caching import beforehand
from pipelines.images import index
from pipelines.machines import shared_folders
from pipelines.recipe.config import Recipe

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "pillow",
    "numpy",
    "pyarrow",
    "polars",
    "ray",
)
"""On whose versions the bytes of features rest, or that speak with their like on other nodes."""
PROJECT = "eupe's own code"
NUM_VIEWS = 4
"""Of the example picture, that are drawn: some of them blurred, jittered and mirrored."""
SIDES = 500, 375
"""Width and height of the example picture."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at, not written to)


@dataclass(frozen=True)
class Question:
    """What a machine is asked about.

    Attributes:
        recipe: its paths absolute.
        picture: encoded, whose views are drawn everywhere.
        probes: file -> contents, as whoever asks has laid them.
    """

    recipe: Recipe
    picture: bytes
    probes: Mapping[str, bytes]


@dataclass(frozen=True)
class Node:
    """What a machine said.

    Attributes:
        name: whoever asked calls it so.
        host: host name and pid namespace; equal ones are one machine.
        versions: package -> version; "absent" where there is none.
        view_digests: view policy -> digest over views of the example picture.
        weights: field of the recipe -> digest of its weights.
        no_weights: field -> why they cannot be read.
        no_pictures: data set -> why none of its pictures can be read.
        unseen: probes that are not there, or hold something else.
        shared_memory_bytes: free in /dev/shm.
        memory_bytes: that this machine, or its container, has.
        open_files: that a process may have open; and the most it may ask for.
    """

    name: str
    host: str
    versions: Mapping[str, str]
    view_digests: Mapping[str, str]
    weights: Mapping[str, str]
    no_weights: Mapping[str, str]
    no_pictures: Mapping[str, str]
    unseen: tuple[str, ...]
    shared_memory_bytes: int
    memory_bytes: int
    open_files: tuple[int, int]


def look(name: str, question: Question) -> Node:
    """Look at the machine that this runs on."""
    digests, no_weights = _weights(question.recipe)
    return Node(
        name=name,
        host=atomic.host(),
        versions=versions(),
        view_digests=view_digests(question.recipe, question.picture),
        weights=digests,
        no_weights=no_weights,
        no_pictures=_no_pictures(question.recipe),
        unseen=shared_folders.unseen(question.probes),
        shared_memory_bytes=_free(SHARED_MEMORY),
        memory_bytes=int(ray._common.utils.get_system_memory()),  # of the container, if in one
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
    )


def example() -> bytes:
    """Return a picture as a JPEG, the same at every call: waves, an edge and noise."""
    width, height = SIDES
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    waves = np.stack([np.sin(x / 9), np.sin(y / 23), np.sin((x + y) / 41)], -1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    pixels = np.clip(128 + 100 * waves + noise, 0, 255).astype(np.uint8)
    pixels[:, width // 3] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def versions() -> dict[str, str]:
    """Return the versions of Python, of our own code and of what features rest on."""
    found = {"Python": platform.python_version(), PROJECT: _code()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def view_digests(recipe: Recipe, picture: bytes) -> dict[str, str]:
    """Return, for both view policies, a digest over views of a picture at the teachers' scales."""
    resolutions = sorted({r for teacher in recipe.teachers.values() for r in teacher.resolutions})
    found = {}
    for field, policy in (("views", recipe.views), ("held_out_views", recipe.held_out_views)):
        image, total = views.decode(picture, policy.background), hashlib.sha256()
        for number in range(NUM_VIEWS if policy.kind == "augmented" else 1):
            canvas = views.view_of(image, policy, "example", number).canvas
            for resolution in resolutions:
                total.update(views.digest(views.resize(canvas, resolution)).encode())
        found[field] = total.hexdigest()[:12]
    return found


def _code() -> str:
    """Return a digest of our own code as it lies here."""
    total = hashlib.sha256()
    for room in (Path(eupe.__path__[0]), Path(cache.__path__[0]), Path(__file__).parents[1]):
        for file in sorted(room.rglob("*.py")):
            total.update(f"{file.relative_to(room.parent)}\n".encode())
            total.update(file.read_bytes())
    return total.hexdigest()[:12]


def _weights(recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """Return the digests of a recipe's weights by field, and why others cannot be read."""
    found, missing = dict[str, str](), dict[str, str]()
    for field, encoder, uri, _ in beforehand.networks(recipe):
        if uri is None:
            continue
        try:
            weights.check(uri, encoder)
            weights.check_here(uri, encoder)
            drawn = uri.startswith("random:")  # the same everywhere, and long to draw
            found[field] = uri if drawn else weights.digest(uri, encoder)
        except BadInput as error:
            missing[field] = f"{field}: {error}"
    return found, missing


def _no_pictures(recipe: Recipe) -> dict[str, str]:
    """Return why pictures cannot be read, by data set."""
    missing = dict[str, str]()
    for dataset in (*recipe.train.values(), recipe.held_out):
        try:
            index.check_there(dataset.source)
            index.check_readable(dataset.source)
        except (BadInput, StoreError) as error:
            missing[dataset.name] = str(error)
    return missing


def _free(folder: Path) -> int:
    """Return the bytes free in a file system; of one that is not there, none."""
    return shutil.disk_usage(folder).free if folder.is_dir() else 0
