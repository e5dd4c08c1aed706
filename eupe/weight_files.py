"""Weight files: the tensors of a file or of a downloaded folder, by name, whoever wrote them.

Nothing is ever unpickled: safetensors, whatever the file is called, or torch.load with
weights_only. Tables in tables become dotted names, so that a training framework's own wrapping is
a prefix like any other.
"""

import argparse
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from eupe.errors import BadInput

CHECKPOINT_FILE = "encoder.safetensors"
"""Name of the encoder's weights inside a checkpoint directory of ours."""

_IN_A_FOLDER = (
    CHECKPOINT_FILE,
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
"""Files that hold a folder's weights, the first one that is there; several hold the same."""
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
_WRAPS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into names, in any place, where it wraps a module."""


def paths(place: Path) -> list[Path]:
    """Return the files that hold the weights of a file, of a folder or of a snapshot of a hub.

    Raises:
        BadInput: there is none, or several of which none is the known one.
    """
    if not place.is_dir():
        if not place.is_file():
            raise BadInput(f"there is no file {place}")
        return _shards(place) if place.name.endswith(".index.json") else [place]
    if (place / "snapshots").is_dir():  # huggingface_hub's own folder of a repository
        return paths(_snapshot(place))
    for name in _IN_A_FOLDER:
        if (place / name).is_file():
            return paths(place / name)
    found = sorted(path for path in place.iterdir() if path.suffix in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:3]) or "none"
        raise BadInput(f"{place}: wants one file of weights in that folder, it has {names}")
    return found


def read(files: list[Path]) -> dict[str, Tensor]:
    """Read every tensor of some files, under its dotted name.

    Raises:
        BadInput: a file that cannot be read, holds more than plain data, or no tensor.
    """
    tensors = dict[str, Tensor]()
    for path in files:
        tensors |= _flat(_load(path))
    if not tensors:
        raise BadInput("the file holds no table of tensors")
    return tensors


def _snapshot(repository: Path) -> Path:
    """Return the revision that a repository's folder has: main, or the only one."""
    main = repository / "refs" / "main"
    revisions = sorted((repository / "snapshots").iterdir())
    if main.is_file():
        revisions = [repository / "snapshots" / main.read_text().strip()]
    if len(revisions) != 1:
        raise BadInput(f"{repository}: wants one of its {len(revisions)} snapshots")
    return revisions[0]


def _shards(index: Path) -> list[Path]:
    """Return the files among which Hugging Face has spread large weights."""
    try:
        named = set(json.loads(index.read_bytes())["weight_map"].values())
        files = [index.parent / name for name in sorted(named)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index.name} is no index of weight files: {error!r}") from error
    if absent := [path.name for path in files if not path.is_file()]:
        raise BadInput(f"{index} names {absent[0]}, which is not there")
    return files


def _load(path: Path) -> object:
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        # timm's training script leaves its arguments in a checkpoint: plain data of a known class.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path.name} holds more than tensors, or is no checkpoint; such a file can run code "
            "and is never loaded: save its state_dict alone"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise BadInput(f"{path.name} cannot be read: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """True if a file begins as safetensors do: the length of a JSON object, and its brace."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length < path.stat().st_size


def _flat(table: object) -> dict[str, Tensor]:
    found = dict(_walk(table, ""))
    for wrap in _WRAPS:
        found = {name.replace(wrap, ""): value for name, value in found.items()}
    return found


def _walk(table: object, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(table, Mapping):
        return
    for name, value in table.items():
        if not isinstance(name, str):  # an optimizer's state, by number
            continue
        if isinstance(value, Tensor):
            yield prefix + name, value
        else:
            yield from _walk(value, f"{prefix}{name}.")
