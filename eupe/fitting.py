"""Fitting: a file's tensors brought under a network's own names, or what is left over said."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from eupe import interchange
from eupe.errors import BadInput
from eupe.networks import build_network, shapes_alone
from eupe.spec import EncoderSpec

_AVERAGED = re.compile(r"(^|[._])(ema|teacher)([._]|$)")
"""Parts of a prefix that name a moving average of the network beside it."""
NAMED_KEYS = 3
"""Keys of each side that a refusal names; the rest it counts."""


class Fitted(NamedTuple):
    """Tensors under a network's own names.

    Attributes:
        state: exactly those that the network has.
        chosen: what was taken where a file holds several networks that fit; "" for one alone.
    """

    state: dict[str, Tensor]
    chosen: str


class _Attempt(NamedTuple):
    """What one part of a file is to a network; faults are empty if it fits."""

    prefix: str
    state: dict[str, Tensor]
    faults: str
    num_missing: int


def fit(found: Mapping[str, Tensor], spec: EncoderSpec, weights: str = "weights") -> Fitted:
    """Return exactly the tensors that the network of `spec` has, out of all those of a file.

    Whatever precedes a network's names is left off (DDP's `module.`, Lightning's `model.`, a
    `teacher.backbone.`, the `visual.` of a whole CLIP), and what lies elsewhere in the file is not
    looked at; a classifier is dropped. Of several networks that fit, the moving average is taken.

    Args:
        found: tensors of the file by dotted name.
        spec: the encoder that is to take them.
        weights: what a refusal calls them.

    Raises:
        BadInput: nothing in the file fits, naming what is left over; or several networks do.
    """
    network, whole = (_empty(spec.model_dump_json(), classifier) for classifier in (False, True))
    attempts = [_attempt(found, prefix, spec, network, whole) for prefix in _prefixes(found, whole)]
    fitting = [each for each in attempts if not each.faults]
    if not fitting:
        best = min(attempts, key=lambda each: each.num_missing)
        raise BadInput(f"{weights} {best.faults}")
    averaged = [each for each in fitting if _AVERAGED.search(each.prefix)]
    first, *others = averaged or fitting
    if any(not _equal(first.state, other.state) for other in others):
        names = ", ".join(repr(each.prefix) for each in (first, *others))
        raise BadInput(
            f"{weights} hold several networks that fit {spec.architecture}, at {names}: wants a "
            "file with the one that is meant"
        )
    chosen = ""
    if averaged and len(fitting) > len(averaged):
        others = [each for each in fitting if each not in averaged]
        chosen = f"the moving average at {first.prefix!r}, not {others[0].prefix!r}"
    return Fitted(first.state, chosen)


@lru_cache(maxsize=16)
def _empty(spec: str, classifier: bool) -> nn.Module:
    """Build the network of a spec for its names and shapes alone; nobody changes it."""
    with shapes_alone():
        return build_network(EncoderSpec.model_validate_json(spec), classifier=classifier)


def _prefixes(found: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """Return what may precede a network's names in a file: where most of them are, or a known mark.

    Some layouts are known by names that are not the network's.
    """
    wanted, counts = set(network.state_dict()), Counter[str]()
    marked = set[str]()
    for name in found:
        parts = name.split(".")
        for start in range(len(parts)):
            end = ".".join(parts[start:])
            prefix = name.removesuffix(end)
            if end in wanted:
                counts[prefix] += 1
            if end in interchange.MARKS:
                marked.add(prefix)
    most = max(counts.values(), default=0)
    prefixes = {prefix for prefix, count in counts.items() if count == most} | marked
    return sorted(prefixes or {""})


def _attempt(
    found: Mapping[str, Tensor],
    prefix: str,
    spec: EncoderSpec,
    network: nn.Module,
    whole: nn.Module,
) -> _Attempt:
    state = {
        name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)
    }
    wanted, known = network.state_dict(), {**whole.state_dict(), **network.state_dict()}
    if set(wanted) - set(state) or set(state) - set(known):
        try:
            state = _renamed(state, spec, network, whole)
        except BadInput as error:
            return _Attempt(prefix, state, f"for {spec.architecture}: {error}", len(wanted))
    missing = [name for name in wanted if name not in state]
    unknown = [name for name in state if name not in known]
    shapes = [
        f"{name} is {list(state[name].shape)} and wants {list(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    faults = [f"{len(shapes)} tensors of other shapes: {_some(shapes)}"] if shapes else []
    faults += [f"{len(missing)} are missing: {_some(missing)}"] if missing else []
    faults += [f"{len(unknown)} are unknown: {_some(unknown)}"] if unknown else []
    if not faults:
        return _Attempt(prefix, {name: state[name] for name in wanted}, "", 0)
    what = _verdict(spec.architecture, wanted, state, bool(shapes), len(missing), bool(unknown))
    return _Attempt(prefix, state, f"{what}: {'; '.join(faults)}", len(missing))


def _verdict(
    architecture: str,
    wanted: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    reshaped: bool,
    num_missing: int,
    unknown: bool,
) -> str:
    """Say what tensors are that do not fit; of another architecture only where they are."""
    if not reshaped and num_missing and not unknown:
        return f"are a part of {architecture}"
    if not reshaped and unknown and not num_missing:
        return f"hold {architecture} and more"
    there = Counter(tuple(value.shape) for value in state.values())
    if not reshaped and not Counter(tuple(value.shape) for value in wanted.values()) - there:
        return f"have the shapes of {architecture} under names that are not known here"
    return f"are of another architecture than {architecture}"


def _renamed(
    state: dict[str, Tensor], spec: EncoderSpec, network: nn.Module, whole: nn.Module
) -> dict[str, Tensor]:
    """Rename tensors of another layout, as far as one is known."""
    if spec.architecture.startswith("tf_efficientnet_lite"):
        return _by_order(state, whole)
    if spec.library == "timm":
        return interchange.to_timm(state, network)
    return state


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


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _some(names: list[str]) -> str:
    more = ", ..." if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more
