"""Whose code wrote something: the version that is installed, and the commit of a checkout."""

import subprocess
import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@cache
def this_code() -> str:
    """Return the version of eupe and, in a checkout, its commit: `0.1.0, commit 4856078c`.

    A checkout with changes of its own says so.
    """
    version = _version()
    if not (ROOT / ".git").exists():  # installed: git would find whatever folder it lies in
        return version
    try:
        commit = _git("rev-parse", "--short=8", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user's
        return version
    return f"{version}, commit {commit}{' with changes' if changed else ''}"


def _version() -> str:
    try:
        return metadata.version("eupe")
    except metadata.PackageNotFoundError:  # a checkout that is run as it lies there
        said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        return str(said["project"]["version"])


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
