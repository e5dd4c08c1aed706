"""What a library warns of is one line of ours, with the picture's name."""

import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from support.small_caches import in_process, job

from pipelines.caching import indexing, precompute
from pipelines.images import index, warned
from pipelines.recipe.config import SourceConfig

LARGE = 9500
"""Pixels a side: more than Pillow opens without a warning, fewer than it refuses."""


def large_png() -> bytes:
    out = io.BytesIO()
    Image.new("1", (LARGE, LARGE)).save(out, "PNG")
    return out.getvalue()


def odd_tiff() -> bytes:
    """A TIFF of one pixel with more channels than its kind has: logged, and then refused."""
    entries = [(256, 1), (257, 1), (258, 8), (259, 1), (262, 2), (273, 8), (277, 9), (278, 1)]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 16) + bytes(8) + directory + bytes(4)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures/a").mkdir(parents=True)
    (tmp_path / "pictures/a/large.png").write_bytes(large_png())
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def _as_by_default():
    """Warnings as Python shows them by default, which pytest changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def lines(err: str) -> list[str]:
    return [line for line in err.splitlines() if not line.startswith("Indexing")]


def test_a_very_large_picture_is_named_in_one_line(folder, capsys):
    found = index.whole(SourceConfig(kind="folder", path=str(folder)))
    assert found.records.num_rows == 1
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith("a/large: a very large picture, which is decoded all the same (")
    assert f"{LARGE * LARGE} pixels" in line


def test_a_build_names_it_too(folder, tmp_path, capsys):
    """Once where it is indexed, and by the actor that decodes it."""
    asked = job(tmp_path / "caches", SourceConfig(kind="folder", path=str(folder)))
    indexing.index_samples(asked)
    capsys.readouterr()
    precompute.resolve_stores(asked, in_process(asked))
    said = [line for line in lines(capsys.readouterr().err) if "pixels" in line]
    assert said
    assert all(line.startswith("a/large: a very large picture") for line in said)


def test_what_a_library_logs_has_the_pictures_name(folder, capsys):
    Path(folder, "a/large.png").unlink()
    (folder / "a/ok.png").write_bytes(b"")
    (folder / "a/odd.tif").write_bytes(odd_tiff())
    index.whole(SourceConfig(kind="folder", path=str(folder)))
    assert lines(capsys.readouterr().err) == [
        "a/odd: More samples per pixel than can be decoded: 9"
    ]


def test_every_thread_has_its_own_picture_and_others_warnings_stay(capsys):
    def warn(name: str) -> None:
        with warned.about(name):
            warnings.warn(f"of {name}", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(warn, map(str, range(40))))
    assert sorted(lines(capsys.readouterr().err)) == sorted(f"{n}: of {n}" for n in range(40))

    def warn_of_both() -> None:
        warn("41")
        warnings.warn("of nothing", UserWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="of nothing"):
        warn_of_both()
    assert lines(capsys.readouterr().err) == ["41: of 41"]
