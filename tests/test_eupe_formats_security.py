"""A picture is opened by the formats named, never by whatever Pillow would run for it."""

import contextlib
import io
import os

import pytest
from PIL import Image

from eupe import views


def test_postscript_is_no_image_and_runs_no_program(tmp_path, monkeypatch):
    """Pillow gives EPS to `gs`, wherever one is on the PATH, whatever the file is called."""
    called = tmp_path / "called"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {called}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    with contextlib.suppress(OSError), Image.open(io.BytesIO(eps)) as opened:
        opened.load()
    assert called.exists()  # so Pillow alone would have
    called.unlink()
    with pytest.raises(views.ImageError, match="no image format known here"):
        views.decode(eps)
    assert not called.exists()
