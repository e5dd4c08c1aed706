"""Plant known faults in a copy of the tree, one at a time; a test must fail for each of them.

`python tests/mutants/run.py` (`make mutants`) runs all; names of faults run those alone. Exits 1 if
a fault survives, if its patch no longer applies, or if its tests fail without it.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATCHES = Path(__file__).resolve().parent
TESTS_FAILED = 1  # pytest's exit code, apart from those of an interrupted or a broken run


@dataclass(frozen=True)
class Mutant:
    """A fault as a patch file says it.

    Attributes:
        path: of the patch.
        fault: in a few words.
        tests: pytest's arguments for the tests that must notice.
    """

    path: Path
    fault: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def mutants(folder: Path = PATCHES) -> list[Mutant]:
    """Return the faults of a folder, by name.

    Raises:
        ValueError: a patch does not begin with its two lines.
    """
    found = []
    for path in sorted(folder.glob("*.patch")):
        head = re.match(r"Fault: (.+)\nCaught by: (.+)\n", path.read_text())
        if head is None:
            raise ValueError(f"{path}: wants the lines `Fault: ...` and `Caught by: ...` first")
        found.append(Mutant(path, head[1], tuple(shlex.split(head[2]))))
    return found


def misfit(mutant: Mutant, tree: Path) -> str | None:
    """Return why a patch does not apply to a tree; None: it does."""
    run = _git(tree, "apply", "--check", str(mutant.path))
    return None if run.returncode == 0 else run.stderr.strip()


def copy_tree(to: Path) -> None:
    """Copy what git tracks or would track."""
    listed = _git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed.check_returncode()
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # not one that is deleted and not yet committed
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def failing(tree: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Run tests in a tree until one fails; return pytest's exit code and the failed test."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(tree), str(tree / "tests"))),
        "PYTHONDONTWRITEBYTECODE": "1",  # a patch taken back in the same second would leave its own
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    failed = re.search(r"^FAILED (\S+)", run.stdout, re.MULTILINE)
    return run.returncode, failed[1] if failed else run.stdout[-1500:] + run.stderr[-500:]


def caught(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Plant one fault, run its tests and take it back; return (caught, a line that says so)."""
    if (why := misfit(mutant, tree)) is not None:
        return False, f"broken    {mutant.fault}: the patch no longer applies: {why}"
    _git(tree, "apply", str(mutant.path)).check_returncode()
    code, test = failing(tree, mutant.tests)
    _git(tree, "apply", "--reverse", str(mutant.path)).check_returncode()
    if code == TESTS_FAILED and "::" in test.partition("\n")[0]:
        return True, f"caught    {mutant.fault}  by {test}"
    if code == 0:
        return False, f"SURVIVED  {mutant.fault}  ({shlex.join(mutant.tests)})"
    return False, f"broken    {mutant.fault}: pytest ended with {code}: {test}"


def _git(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Not the index of a repository around the copy, if there is one.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def main(names: list[str]) -> int:
    """Run the named faults, or all; return the exit code."""
    from pipelines.machines.progress import track

    wanted = [each for each in mutants() if not names or each.name in names]
    if unknown := set(names) - {each.name for each in wanted}:
        print(f"no such fault: {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    sound = True
    with tempfile.TemporaryDirectory(prefix="eupe-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        with track(len(wanted) + 1, "Planting faults", "runs") as progress:
            together = tuple(dict.fromkeys(test for each in wanted for test in each.tests))
            code, test = failing(tree, together)
            if code:
                print(f"broken    without any fault: {test}", flush=True)
                return 1
            progress.advance()
            for mutant in wanted:
                good, line = caught(mutant, tree)
                print(line, flush=True)
                sound = sound and good
                progress.advance()
    return 0 if sound else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of the patches, without their ending")
    sys.exit(main(parser.parse_args().names))
