"""What mending finds in a folder of a cache root, and whether it does it or only says so."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from cache.files import atomic
from cache.format import layout
from cache.verify import Problem


@dataclass
class Mended:
    """What was found in a sample table or a store.

    Attributes:
        mended: what is put right, and how.
        lost: what cannot be put right, and what helps.
    """

    mended: list[Problem] = field(default_factory=list)
    lost: list[Problem] = field(default_factory=list)


class Mending:
    """Does what is to be done, or only says so.

    Attributes:
        write: False: only says so.
        result: what was found so far.
    """

    def __init__(self, write: bool):
        self.write = write
        self.result = Mended()

    def alone(self, directory: Path) -> AbstractContextManager[None]:
        """Keep committers away while something may be changed."""
        if not self.write:
            return nullcontext()
        return atomic.only_writer(directory, layout.scratch_directory(directory))

    def mend(self, path: Path, what: str, do: Callable[[], object]) -> None:
        """Put something right."""
        self.result.mended.append(Problem(path, what))
        if self.write:
            do()

    def lose(self, path: Path, what: str) -> None:
        """Say that something cannot be put right."""
        self.result.lost.append(Problem(path, what))
