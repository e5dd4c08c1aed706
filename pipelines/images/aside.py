"""What a walk leaves aside: counted by kind, said in a line each, and never one by one."""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

SENTENCES_SHOWN = 10
KINDS_SHOWN = 8
MOST_KINDS = 1000
"""Kinds that are counted apart: numbers after a dot look like extensions, without end."""
OTHER = "others"
UNKNOWN = "not looked at, by extension"
PROFILES = "images with a colour profile other than sRGB, whose values are taken as they are"
_PACKED = frozenset((".bz2", ".gz", ".xz", ".zst"))


class Aside:
    """What was left aside of one source."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._sentences: dict[str, None] = {}
        self._num_more = 0

    def count(self, group: str, kind: str, number: int = 1) -> None:
        """Count things of a kind.

        Args:
            group: the heading that it is said under.
            kind: such as a file's extension.
            number: how many more there are.
        """
        counts = self._counts.setdefault(group, Counter())
        counts[kind if kind in counts or len(counts) < MOST_KINDS else OTHER] += number

    def file(self, name: str) -> None:
        """Count a file, by its extension."""
        self.count(UNKNOWN, extension(name))

    def say(self, sentence: str) -> None:
        """Keep a sentence, said once however often it is given; of many the first ones."""
        if sentence in self._sentences:
            return
        if len(self._sentences) < SENTENCES_SHOWN:
            self._sentences[sentence] = None
        else:
            self._num_more += 1

    def merge(self, other: "Aside") -> None:
        """Add what another one was told."""
        for group, kinds in other._counts.items():
            for kind, number in kinds.items():
                self.count(group, kind, number)
        for sentence in other._sentences:
            self.say(sentence)
        self._num_more += other._num_more

    def lines(self) -> Iterator[str]:
        """Yield what there is to say."""
        for group, counts in self._counts.items():
            yield f"{group}: {listed(counts)}"
        yield from self._sentences
        if self._num_more:
            yield f"and {self._num_more} more such lines"


def extension(name: str) -> str:
    """Return a file's extension as people read it: that of an archive has two parts."""
    suffixes = PurePosixPath(name.lower()).suffixes
    if not suffixes:
        return "none"
    return "".join(suffixes[-2:]) if suffixes[-1] in _PACKED else suffixes[-1]


def listed(counts: Counter[str]) -> str:
    """Say counts in a line, the largest first."""
    most = [each for each in counts.most_common() if each[0] != OTHER][:KINDS_SHOWN]
    rest = counts.total() - sum(number for _, number in most)
    shown = [f"{number} {kind}" for kind, number in most]
    return ", ".join([*shown, f"{rest} {OTHER}"] if rest else shown)
