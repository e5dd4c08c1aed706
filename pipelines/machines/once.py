"""What a process says once, however often it comes to it."""

import sys

_said = set[str]()


def first(sentence: str) -> bool:
    """Return True the first time that this process asks of a sentence."""
    new = sentence not in _said
    _said.add(sentence)
    return new


def say(sentence: str) -> None:
    """Say a sentence on stderr, unless this process has."""
    if first(sentence):
        print(sentence, file=sys.stderr)
