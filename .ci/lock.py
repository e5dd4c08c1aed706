"""Write the exact versions that the project stands on in this environment: `lock.py FILE EXTRA...`.

The closure of the project's dependencies and of the extras named, without addresses, as a
constraints file for pip: whoever installs with it gets the set that the tests passed with.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "eupe"
HEADER = """\
# Written by `make lock` from the environment that the tests passed in (Python {python}).
# `make install` uses it; elsewhere: pip install -c constraints.txt ...
"""


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Map each distribution that `name[extras]` needs here to its version, itself left out."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        owner, extra = waiting.pop()
        for line in metadata.requires(owner) or ():
            wanted = Requirement(line)
            if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                continue
            needed = canonicalize_name(wanted.name)
            versions[needed] = metadata.version(needed).partition("+")[0]  # any build of it
            for each in ("", *wanted.extras):
                if (needed, each) not in seen:
                    seen.add((needed, each))
                    waiting.append((needed, each))
    versions.pop(name, None)
    versions.pop("pip", None)  # each environment brings its own
    return versions


def constraints(versions: dict[str, str]) -> str:
    """Return the text of the constraints file, one line a distribution, by name."""
    header = HEADER.format(python=".".join(map(str, sys.version_info[:2])))
    return header + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(constraints(closure(PROJECT, frozenset(sys.argv[2:]))))
