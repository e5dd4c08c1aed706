"""Checkpoints: weights in safetensors, training state loaded weights-only, written atomically.

    <stage directory>/checkpoints/step-00000100/
        encoder.safetensors       the encoder under timm's own names; `checkpoint:<this folder>`
        heads.safetensors         adapter heads, named <teacher>.<summary|patches>...
        normalisers.safetensors   what a teacher's tokens went through before the loss
        state.pt                  optimizer and figures, for resuming
        config.json               what the run is, where it stands, whose code wrote it; manifest
                                  versions it reads, the crc32c of the files above, its own sha256

What is read is compared with these first: a bit that the disk has lost would train on unseen.
A folder has its name only while all of it is on disk: whatever is called step-* is whole. It gets
the name last, and loses it before the first of its files is deleted. Only one process writes below
a stage directory (pipelines.training.loop holds its lock), so a save sweeps what a kill left.
"""

import json
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.files import atomic, sealed, trees
from cache.files.refused import writing
from cache.format import layout
from eupe import fingerprint as fp
from eupe.errors import BadInput
from eupe.weight_files import CHECKPOINT_FILE
from eupe.weights import state_digest
from pipelines.records.made_by import this_code

FORMAT = 1
FOLDER = "checkpoints"
CONFIG, STATE = "config.json", "state.pt"
CHECKSUM = "config_sha256"
HEADS, NORMALISERS = "heads.safetensors", "normalisers.safetensors"
_PREFIX, _TEMPORARY = "step-", ".tmp-"
READ_BYTES = 1 << 24
INSTEAD = "remove this checkpoint to go on from the one before it"
MAX_LINES = 12
"""Differing fields that a refusal names; the rest it counts."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        step: steps done.
        identity: what the run learns from and how, plain data; another one is refused.
        pins: store directory -> manifest version that the run reads.
        encoder: the encoder network's tensors by name.
        heads: the adapter heads' tensors by name.
        normalisers: the normalisers' buffers by name.
        state: plain data and tensors, what else is needed to go on exactly.
        recipe: the whole configuration, for readers; never compared.
    """

    step: int
    identity: Mapping[str, object]
    pins: Mapping[str, int]
    encoder: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    normalisers: Mapping[str, Tensor]
    state: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk; tensors are read when asked for.

    Attributes:
        score: held-out figure by which checkpoints are compared, higher is better; None if the
            step was not evaluated.
        checksums: crc32c of each of its other files, by name.
        made_by: version and commit of the code that wrote it; older ones do not say.
    """

    directory: Path
    step: int
    identity: dict[str, object]
    pins: dict[str, int]
    score: float | None
    recipe: dict[str, object]
    checksums: dict[str, int]
    made_by: str = "not recorded"

    def encoder(self) -> dict[str, Tensor]:
        """Read the encoder's tensors."""
        return _tensors(self._checked(CHECKPOINT_FILE))

    def heads(self) -> dict[str, Tensor]:
        """Read the heads' tensors."""
        return _tensors(self._checked(HEADS))

    def weights_digest(self) -> str:
        """Return the digest of the encoder's and the heads' tensors."""
        return state_digest({**self.encoder(), **self.heads()})

    def normalisers(self) -> dict[str, Tensor]:
        """Read the normalisers' buffers."""
        return _tensors(self._checked(NORMALISERS))

    def state(self) -> dict[str, Any]:
        """Read the training state, on the CPU; never unpickles anything but plain data."""
        path = self._checked(STATE)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            raise BadInput(f"{path}: is no training state: {error}") from error
        return state

    def _checked(self, name: str) -> Path:
        """Return the path of a file that is as it was written.

        Raises:
            BadInput: it is not, or cannot be read.
        """
        path = self.directory / name
        try:
            found = _crc32c(path)
        except OSError as error:
            raise BadInput(f"{path}: cannot be read: {error}; {INSTEAD}") from error
        if found != self.checksums.get(name):
            raise BadInput(f"{path}: contents do not match the crc32c in {CONFIG}; {INSTEAD}")
        return path

    def check(self, identity: Mapping[str, object]) -> None:
        """Refuse to go on with another run's checkpoint.

        Raises:
            BadInput: naming the fields in which the runs differ.
        """
        lines = fp.difference(json.loads(fp.canonical_json(identity)), self.identity)
        if lines:
            more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            raise BadInput(
                f"{self.directory} is of another run (asked != there): "
                + "; ".join(lines[:MAX_LINES] + more)
                + "; give another run directory, or remove this one to start anew"
            )


def save(stage_directory: Path, contents: Contents, keep: int) -> Checkpoint:
    """Write a checkpoint whole, then drop all but the newest `keep` and the best.

    Args:
        stage_directory: of the run's stage.
        contents: what to write.
        keep: how many of the newest to keep, at least 1.

    Returns:
        the checkpoint as it is on disk.

    Raises:
        FileExistsError: that step is saved. A run goes on after its newest checkpoint, so it never
            comes to a saved step again.
        StoreError: it cannot be written (disk full, say); the checkpoints before it are untouched.
    """
    folder = stage_directory / FOLDER
    final = folder / f"{_PREFIX}{contents.step:08d}"
    if final.exists():
        raise FileExistsError(f"{final}: step {contents.step} is already saved")
    with _made_whole(final) as temporary:
        atomic.sweep(layout.scratch_directory(stage_directory))
        _write(temporary, contents)
    _prune(stage_directory, keep)
    return _open(final)


def copy(found: Checkpoint, stage_directory: Path) -> None:
    """Copy a checkpoint whole to another stage's directory, unless it is there.

    Raises:
        StoreError: it cannot be written.
    """
    final = stage_directory / FOLDER / found.directory.name
    if final.exists():
        return
    with _made_whole(final) as temporary:
        shutil.copytree(found.directory, temporary, dirs_exist_ok=True)
        for path in (*temporary.iterdir(), temporary):
            _sync(path)


@contextmanager
def _made_whole(final: Path) -> Iterator[Path]:
    """Yield a folder to be filled and synced, which has its name once the block has ended.

    Raises:
        StoreError: it cannot be written; nothing of it stays.
    """
    folder, temporary = final.parent, final.parent / f"{_TEMPORARY}{final.name}"
    with writing(final):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
        temporary.mkdir()
        try:
            yield temporary
        except BaseException:  # of a full disk it would keep what the next try wants
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        temporary.rename(final)
        _sync(folder)


def _write(directory: Path, contents: Contents) -> None:
    """Write all files of a checkpoint and wait until the disk has them."""
    for name, tensors in (
        (CHECKPOINT_FILE, contents.encoder),
        (HEADS, contents.heads),
        (NORMALISERS, contents.normalisers),
    ):
        # Cloned: safetensors refuses tensors that share memory, are parts of larger ones, or lie
        # channels last.
        owned = {
            key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for key, value in tensors.items()
        }
        try:
            save_file(owned, directory / name)
        except SafetensorError as error:
            if (told := re.search(r"\(os error (\d+)\)", str(error))) is None:
                raise
            number = int(told[1])
            raise OSError(number, os.strerror(number)) from error
    with (directory / STATE).open("wb") as file:
        try:
            torch.save(dict(contents.state), file)
        except RuntimeError as error:  # torch's own, in place of what the file raised
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    description = {
        "format": FORMAT,
        "step": contents.step,
        "score": None,
        "identity": contents.identity,
        "pins": contents.pins,
        "recipe": contents.recipe,
        "made_by": this_code(),
        "crc32c": {path.name: _crc32c(path) for path in sorted(directory.iterdir())},
    }
    fp.canonical_json(description)  # refuses what would not be read back as it was written
    _write_config(directory, description)
    for path in (*directory.iterdir(), directory):
        _sync(path)


def judge(stage_directory: Path, judged: Checkpoint, score: float, keep: int) -> Checkpoint:
    """Write down the held-out figure of a checkpoint that was evaluated after it was saved.

    Args:
        stage_directory: of the run's stage.
        judged: its newest checkpoint.
        score: the figure.
        keep: as for `save`; a best one that is beaten now goes.
    """
    _write_config(judged.directory, {**_description(judged.directory), "score": score})
    _prune(stage_directory, keep)
    return replace(judged, score=score)


def _write_config(directory: Path, description: Mapping[str, object]) -> None:
    """Write what a checkpoint's folder says of it; the file appears whole."""
    scratch = layout.scratch_directory(directory.parents[1])
    atomic.write(directory / CONFIG, [sealed.seal(description, CHECKSUM)], scratch)


def find(stage_directory: Path) -> list[Checkpoint]:
    """Return a stage's checkpoints, oldest first; none if there are none.

    Raises:
        BadInput: one of them cannot be read.
    """
    folders = (stage_directory / FOLDER).glob(f"{_PREFIX}*")
    return [_open(directory) for directory in sorted(folders)]


def latest(stage_directory: Path) -> Checkpoint | None:
    """Return a stage's newest checkpoint."""
    return next(iter(find(stage_directory)[::-1]), None)


def best(stage_directory: Path) -> Checkpoint | None:
    """Return the checkpoint with the highest score, the newest of equals; None if none has one."""
    scored = [found for found in find(stage_directory) if found.score is not None]
    return max(scored, key=lambda found: (found.score, found.step), default=None)


def require(stage_directory: Path) -> Checkpoint:
    """Return a stage's newest checkpoint, which a later step cannot do without.

    Raises:
        BadInput: there is none.
    """
    found = latest(stage_directory)
    if found is None:
        raise BadInput(f"{stage_directory}: no checkpoint; train this stage first")
    return found


def finished(stage_directory: Path, steps: int) -> Checkpoint:
    """Return the checkpoint of a stage's last step, which another stage begins from.

    Raises:
        BadInput: there is none, or the stage is still on its way.
    """
    found = require(stage_directory)
    if found.step < steps:
        raise BadInput(
            f"{stage_directory}: trained for {found.step} of {steps} steps; finish this stage first"
        )
    return found


def bring(weights: str) -> None:
    """Have the checkpoint that weights name on this machine, if its run lies in a bucket.

    Raises:
        StoreError: the bucket does not answer, or what is there is damaged.
    """
    scheme, _, directory = weights.partition(":")
    if scheme == "checkpoint":
        trees.bring(Path(directory).parents[1])


def _open(directory: Path) -> Checkpoint:
    config = _description(directory)
    return Checkpoint(
        directory,
        config["step"],
        config["identity"],
        config["pins"],
        config["score"],
        config["recipe"],
        config["crc32c"],
        config.get("made_by", Checkpoint.made_by),
    )


def _description(directory: Path) -> dict[str, Any]:
    """Read what a checkpoint's folder says of it."""
    path = directory / CONFIG
    try:
        content = path.read_bytes()
        said = json.loads(content)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read: {error}; remove the checkpoint") from error
    there = said.get("format") if isinstance(said, dict) else None
    if there != FORMAT:
        raise BadInput(f"{path}: checkpoint format {there!r}; this version reads {FORMAT}")
    if not sealed.is_whole(content, CHECKSUM):
        raise BadInput(f"{path}: contents do not match the {CHECKSUM} in it; {INSTEAD}")
    assert isinstance(said, dict)
    return said


def _prune(stage_directory: Path, keep: int) -> None:
    found, champion = find(stage_directory), best(stage_directory)
    for old in found[:-keep]:
        if champion is None or old.step != champion.step:
            nameless = old.directory.rename(
                old.directory.with_name(_TEMPORARY + old.directory.name)
            )
            _sync(nameless.parent)  # a power cut must not undo the renaming and keep the deletions
            shutil.rmtree(nameless)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: cannot be read: {error}") from error
    return found


def _crc32c(path: Path) -> int:
    """Return the crc32c of a file, which disks are slower than, as they are not than a sha256."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            checksum.update(part)
    return int.from_bytes(checksum.digest(), "big")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
