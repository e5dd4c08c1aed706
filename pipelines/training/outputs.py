"""Outputs of stages: each lies at the address of what made it, and runs link to it (law 15).

    <stage root>/stage2-3f2a9c0b77de/     checkpoints/, metrics.jsonl, tensorboard/
                     made_of.json         what the address is the hash of
                     seconds.txt          how long it was trained
    <stage root>/stage2-3f2a9c0b77de.lease who trains it, while somebody does
    <run directory>/stage2                a link to it

Whoever asks for an address that is there gets it. Readers follow the run's link. Where they lie in
a bucket these are copies (cache/files/copies.py), an output a tree.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.files import atomic, copies, trees
from cache.files.refused import writing
from cache.format import layout
from eupe.errors import BadInput
from eupe.weights import digest
from pipelines.recipe import addresses
from pipelines.recipe.addresses import Digest, address, differing, made_of
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.stage import StageConfig, StageName
from pipelines.records import checkpoint, tracking
from pipelines.records.checkpoint import Checkpoint

MADE_OF_FILE, SECONDS_FILE = "made_of.json", "seconds.txt"
GOES_ON_FROM = "goes_on_from"
"""In what makes an output: the address of a shorter one, at its end, that it goes on from."""
MENDED = "training what its folder holds writes it anew, or remove the folder"
LENGTH = {"stage.steps", "stage.warmup_steps"}


@dataclass(frozen=True)
class Output:
    """The output of a stage, there or not.

    Attributes:
        stage: its name.
        made_of: all that makes it.
        root: folder of the outputs.
    """

    stage: StageName
    made_of: dict[str, Any]
    root: Path

    @property
    def address(self) -> str:
        """Its name: the stage, and the hash of what makes it."""
        return address(self.stage, self.made_of)

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.root / self.address

    @property
    def steps(self) -> int:
        """Steps it is trained for."""
        steps: int = self.made_of["stage"]["steps"]
        return steps

    def newest(self) -> Checkpoint | None:
        """Return the checkpoint that training begins from: its own, or of what it goes on from."""
        own = checkpoint.latest(self.directory)
        if own is None and GOES_ON_FROM in self.made_of:
            return checkpoint.latest(self.root / self.made_of[GOES_ON_FROM])
        return own

    def done(self) -> int:
        """Return how many steps are trained."""
        saved = checkpoint.latest(self.directory)
        return 0 if saved is None else saved.step

    def finished(self) -> bool:
        """Return True if it is trained to its end."""
        return self.done() >= self.steps

    def judged(self) -> bool:
        """Return True if it is trained to its end and its last checkpoint has held-out figures."""
        saved = checkpoint.latest(self.directory)
        return saved is not None and saved.step >= self.steps and saved.score is not None

    def seconds(self) -> float:
        """Return how long it was trained, 0.0 where nobody wrote it down."""
        path = self.directory / SECONDS_FILE
        return float(path.read_text()) if path.is_file() else 0.0

    def add_seconds(self, seconds: float) -> None:
        """Write down that a process has trained it for so long."""
        text = f"{self.seconds() + seconds:.1f}\n"
        scratch = layout.scratch_directory(self.directory)
        atomic.write(self.directory / SECONDS_FILE, [text.encode()], scratch)
        trees.publish(self.directory)


def asked(
    recipe: Recipe,
    stage: StageConfig,
    address_of: Callable[[StageName], str] | None = None,
    digest_of: Digest = digest,
) -> Output:
    """Return the output that a stage asks for: the one its run has, where that goes on, or another.

    Args:
        recipe: the run.
        stage: one of its stages.
        address_of: an earlier stage -> the address of its output; None: of the run's own.
        digest_of: of weights.

    Raises:
        BadInput: weights that cannot be read.
        StoreError: of a run in a bucket: it does not answer, or what is there is damaged.
    """
    made = made_of(recipe, stage, address_of or (lambda name: _address(recipe, name)), digest_of)
    wanted = Output(stage.name, made, recipe.outputs)
    trees.bring(wanted.directory)
    there = linked(recipe, stage.name, wanted)
    if there is None or there.address == wanted.address:
        return wanted
    bare = {key: value for key, value in there.made_of.items() if key != GOES_ON_FROM}
    fields = {field for field, *_ in differing(made, bare)}
    if not fields:
        return there
    if all(field.startswith("samples.") for field in fields) and 0 < there.done() < there.steps:
        return there  # it began with fewer samples, and goes on with those
    if fields <= LENGTH and wanted.steps > there.steps and there.finished():
        longer = Output(stage.name, {**made, GOES_ON_FROM: there.address}, recipe.outputs)
        trees.bring(longer.directory)
        return longer
    return wanted


def linked(recipe: Recipe, name: StageName, known: Output | None = None) -> Output | None:
    """Return the output that a run's folder names, None where it names none.

    Args:
        recipe: the run.
        name: of the stage.
        known: an output of it; where that is named, nothing is read.

    Raises:
        BadInput: what it names is no output of a stage, or no longer says what made it.
    """
    path = recipe.stage_directory(name)
    if not path.is_symlink() or not path.exists():
        return None
    there = path.resolve()
    return known if known is not None and known.address == there.name else _read(there, name)


def _address(recipe: Recipe, name: StageName) -> str:
    there = linked(recipe, name)
    return (there or asked(recipe, recipe.stage(name))).address


def bring(run: Path, stages: bool = True) -> None:
    """Bring a run whose folder is a copy of one in a bucket; else nothing.

    Args:
        run: its folder, or in a sweep a link to it.
        stages: False to bring its report alone.

    Raises:
        StoreError: the bucket does not answer, or what is there is damaged.
    """
    if copies.bring_link(run):
        run = run.parent / run.readlink()
    copies.bring(run)
    if stages and copies.remote(run) is not None:
        for link in sorted(path for path in run.iterdir() if path.is_symlink()):
            trees.bring(Path(os.path.normpath(run / link.readlink())))


def here(run: str | Path, stages: bool = True) -> Path:
    """Return the folder of a run, of one in a bucket the copy here, brought as by `bring`."""
    folder = copies.local(run)
    bring(folder, stages)
    return folder


def check_earlier(recipe: Recipe, stage: StageConfig) -> None:
    """Refuse a stage whose earlier stages are not there to their end.

    Raises:
        BadInput: naming the one that is not.
    """
    earlier: list[StageName] = ["stage1"] if PROXY in stage.teachers else []
    for name in earlier if stage.initial is None else [*earlier, stage.initial]:
        checkpoint.finished(recipe.stage_directory(name), recipe.stage(name).steps)


def begin(recipe: Recipe, output: Output) -> None:
    """Make an output's folder, say what made it, and let the run's folder name it.

    Raises:
        BadInput: a folder is where the link would be.
        StoreError: it cannot be written.
    """
    scratch = layout.scratch_directory(output.directory)
    path, text = output.directory / MADE_OF_FILE, json.dumps(output.made_of, indent=2) + "\n"
    if not path.is_file():
        _go_on_from(output)
    if not path.is_file() or path.read_bytes() != text.encode():  # made, or damaged since
        atomic.write(path, [text.encode()], scratch)
        trees.publish(output.directory)
    point(recipe.stage_directory(output.stage), output.directory)


def point(link: Path, folder: Path) -> None:
    """Let a link name a folder, relative to its own, so that both may be moved together.

    Raises:
        BadInput: a folder is where the link would be.
        StoreError: it cannot be written.
    """
    if link.is_dir() and not link.is_symlink():
        raise BadInput(
            f"{link}: is a folder, and wants to be a link to {folder}; move it away, or give "
            "another run_directory"
        )
    there = Path(os.path.relpath(folder.resolve(), _made(link.parent)))
    if link.is_symlink() and link.readlink() == there:
        return
    copies.send_link(link, there, layout.scratch_directory(link.parent))
    temporary = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
    with writing(link):
        temporary.symlink_to(there, target_is_directory=True)
        temporary.replace(link)


def _made(directory: Path) -> Path:
    with writing(directory):
        atomic.make_directories(directory)
    return directory.resolve()


def _go_on_from(output: Output) -> None:
    """Give an output that goes on from another one that one's last checkpoint and figures."""
    if GOES_ON_FROM not in output.made_of:
        return
    earlier = output.root / output.made_of[GOES_ON_FROM]
    checkpoint.copy(checkpoint.require(earlier), output.directory)
    with writing(output.directory):
        events = earlier / tracking.EVENTS_DIRECTORY
        if events.is_dir():
            shutil.copytree(events, output.directory / events.name, dirs_exist_ok=True)
        shutil.copy2(earlier / tracking.METRICS_FILE, output.directory)


@dataclass(frozen=True)
class Standing:
    """How a run's stage stands.

    Attributes:
        output: that it asks for.
        state: `finished`, `begun` or `to do`.
        old: the first field in which what the run has differs from what it asks for, with both
            values; None where it has nothing, or what it asks for.
    """

    output: Output
    state: str
    old: str | None

    def __str__(self) -> str:
        words = f"{self.output.address}: {self.state}"
        return f"{words}; what is there is old: {self.old}" if self.old else words


def standing(recipe: Recipe) -> list[Standing]:
    """Say of each stage of a run what is there of it, what is old and what would be trained.

    Raises:
        BadInput: weights that cannot be read.
    """
    found, known = list[Standing](), dict[StageName, str]()
    for stage in recipe.stages.values():
        output = asked(recipe, stage, known.__getitem__)
        there = linked(recipe, stage.name, output)
        known[stage.name] = output.address
        done = output.done()
        state = "finished" if done >= output.steps else "begun" if done else "to do"
        old = None
        if there is not None and there.address != output.address:
            old = first_difference(output.made_of, there.made_of)
        found.append(Standing(output, state, old))
    return found


def first_difference(asked: Mapping[str, Any], there: Mapping[str, Any]) -> str:
    """Return the first field in which two outputs differ, with both values."""
    lines = (
        f"{field} is {addresses.said(new)}, was {addresses.said(old)}"
        for field, new, old in differing(asked, there)
    )
    return next(lines, "files of it are missing")


def known(root: Path) -> list[Output]:
    """List the outputs below a root that say what they are made of."""
    names = (path.parent for path in sorted(root.glob(f"[!.]*/{MADE_OF_FILE}")))
    return [_read(path, path.name.partition("-")[0]) for path in names]


def _read(directory: Path, name: str) -> Output:
    path = directory / MADE_OF_FILE
    try:
        made = json.loads(path.read_bytes())
        stage: StageName = made["stage"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path}: says not what made {name}: {error}; {MENDED}") from error
    output = Output(stage, made, directory.parent)
    if output.address != directory.name:
        raise BadInput(
            f"{path}: tells of {output.address}, its folder is {directory.name}: it was damaged or "
            f"changed; {MENDED}"
        )
    return output
