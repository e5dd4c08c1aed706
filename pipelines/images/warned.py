"""Warnings of libraries about a picture: one line of ours each, with the picture's name."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from PIL import Image

_now = threading.local()
_shown_before = warnings.showwarning
_LIBRARY = logging.getLogger("PIL")


@contextmanager
def about(sample_id: str) -> Iterator[None]:
    """Say of warnings in this block, in this thread, that they are of a sample's picture."""
    global _shown_before
    if _HANDLER not in _LIBRARY.handlers:
        _LIBRARY.addHandler(_HANDLER)
    if warnings.showwarning is not _show:  # others replace it too, and put it back
        _shown_before, warnings.showwarning = warnings.showwarning, _show
    _now.sample_id = sample_id
    try:
        yield
    finally:
        _now.sample_id = None


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    sample_id = getattr(_now, "sample_id", None)
    if sample_id is None:
        _shown_before(message, category, filename, lineno, file, line)
        return
    said = " ".join(str(message).split())
    if issubclass(category, Image.DecompressionBombWarning):
        said = f"a very large picture, which is decoded all the same ({said.partition(',')[0]})"
    print(f"{sample_id}: {said}", file=sys.stderr)


class _Named(logging.Handler):
    """Prints what a library logs about a picture, with the picture's name."""

    def emit(self, record: logging.LogRecord) -> None:
        sample_id = getattr(_now, "sample_id", None) or record.name
        print(f"{sample_id}: {' '.join(record.getMessage().split())}", file=sys.stderr)


_HANDLER = _Named(logging.WARNING)
