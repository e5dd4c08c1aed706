"""What can be wrong with a store, each fault a sentence that says what would be right."""

from collections.abc import Sequence

AGAIN = "delete the file and build again"
"""Advice for a file of a shard that has its recorded size: a build looks at sizes alone."""


class StoreError(Exception):
    """A cache root, store or file that cannot be used as asked."""


class NotBuilt(StoreError):
    """Nothing is there (yet): the store, the samples or a shard has not been built."""


class FingerprintMismatch(StoreError):
    """Something else is there: a store or dataset of another spec.

    Attributes:
        lines: the fields that differ, one `path: asked != found` each.
    """

    def __init__(self, message: str, lines: Sequence[str]):
        super().__init__(f"{message}: {'; '.join(lines)}")
        self.lines = list(lines)
        self._message = message

    def __reduce__(self) -> tuple[type["FingerprintMismatch"], tuple[str, list[str]]]:
        """Pickle by what made it: a worker's refusal is shown where the user is."""
        return type(self), (self._message, self.lines)


class Corrupt(StoreError):
    """A file is not what its checksum, its index or its format says."""


class WrongSize(Corrupt):
    """A file does not have the size its record says."""


class MissingSamples(StoreError):
    """Sample ids or rows were asked for that the dataset or store does not hold."""


class Busy(StoreError):
    """Another process is committing."""
