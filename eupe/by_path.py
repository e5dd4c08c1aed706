"""Networks by import path: `python:package.module:function`, named with the digest of its source.

The digest is of the file that the function is in, and stands behind the path: `...:function@<16
digits>`. So it is a part of every identity that the architecture is a part of. What the file
imports is not: keep what decides the features in it, or rename the function.
"""

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from eupe.errors import BadInput

PREFIX = "python:"
_FORM = re.compile(r"python:([\w.]+):(\w+)(?:@([0-9a-f]{16}))?")
WANTED = "python:<package.module>:<function>"


def with_digest(architecture: str) -> str:
    """Return an import path with its source's digest; one that has it stays as it is.

    Raises:
        BadInput: another form, or a module that is not there.
    """
    module, function, digest = _parts(architecture)
    return architecture if digest else f"{PREFIX}{module}:{function}@{_digest(module)}"


def build(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """Call the function of an import path with a recipe's model arguments; return what it gives.

    Raises:
        BadInput: the module or the function is not there, the source is another one, or the
            function refuses the arguments.
    """
    module, function, digest = _parts(architecture)
    if digest and digest != (here := _digest(module)):
        raise BadInput(
            f"architecture {architecture}: the source of {module} here has digest {here}; features "
            "and checkpoints of another source are another network's"
        )
    try:
        made: Callable[..., Any] = getattr(_loaded(module, digest or _digest(module)), function)
    except (ImportError, AttributeError) as error:
        raise BadInput(f"architecture {architecture}: {error}") from error
    try:
        return made(**arguments)
    except (TypeError, ValueError) as error:
        raise BadInput(f"{architecture} refuses {dict(arguments)}: {error}") from error


def _parts(architecture: str) -> tuple[str, str, str]:
    """Return module, function and digest ("" if there is none)."""
    found = _FORM.fullmatch(architecture)
    if found is None:
        raise BadInput(f"architecture {architecture!r}: wants {WANTED}")
    return found[1], found[2], found[3] or ""


@cache
def _loaded(module: str, digest: str) -> ModuleType:
    """Run a module's source of that digest: one imported before may be of an older source."""
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None  # `_digest` has read it
    made = importlib.util.module_from_spec(found)
    sys.modules[module] = made  # as an import does, for what looks itself up there
    # Not by its loader, which may take older bytecode for that of a file of the same second.
    source = compile(Path(found.origin).read_bytes(), found.origin, "exec")
    exec(source, made.__dict__)  # noqa: S102 (an import, of a path that the recipe names)
    return made


def _digest(module: str) -> str:
    """Return 16 hexadecimal digits of the sha256 of a module's source file."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise BadInput(f"architecture {PREFIX}{module}: {error}; {_hint(module)}") from error
    if found is None or not found.has_location or found.origin is None:
        raise BadInput(f"architecture {PREFIX}{module}: no such module; {_hint(module)}")
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]


def _hint(module: str) -> str:
    return (
        "install it wherever the network is built, or name its folder in PYTHONPATH "
        f"({module.partition('.')[0]!r} is looked for)"
    )
