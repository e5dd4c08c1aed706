"""Folders of images as people have them: links, pipes, odd names, other files beside."""

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import polars as pl
import pytest
from PIL import Image, ImageCms
from support.small_caches import job

from cache.format.sample_table import frame
from pipelines.caching import indexing
from pipelines.images import index
from pipelines.images.aside import Aside
from pipelines.recipe.config import SourceConfig

PATIENCE_SECONDS = 300

CLASSES = ("cat", "dog", "owl")
NOBODY = 65534  # an account that may read nothing of ours


def png(shade: int = 0, **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 0, 0)).save(out, "PNG", **options)
    return out.getvalue()


def write(file: Path, content: bytes | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png() if content is None else content)
    return file


@pytest.fixture
def pictures(tmp_path):
    """A folder of twelve pictures in three classes."""
    root = tmp_path / "pictures"
    for name in CLASSES:
        for number in range(4):
            write(root / name / f"{number}.png")
    return root


def looked(path: Path, **asked: object) -> tuple[pl.DataFrame, dict[str, str], list[str]]:
    """Index a folder: its samples, the reason of each failure by its id, and what was said."""
    source, aside = SourceConfig(kind="folder", path=str(path), **asked), Aside()
    parts = list(index.look(source, index.pieces(source, aside), aside=aside))
    failures = [found for part in parts for found in index.failures(part.sources)]
    records = pl.concat([frame(part.records) for part in parts])
    return records, {each[0]: each[3] for each in failures}, list(aside.lines())


def test_a_link_to_a_parent_adds_no_sample(pictures):
    (pictures / "cat/up").symlink_to(pictures)
    (pictures / "dog/further-up").symlink_to(pictures.parent)
    records, failures, said = looked(pictures)
    assert len(records) == 12
    assert not failures
    assert f"{pictures}/cat/up: a link to {pictures}, whose images are there without it" in said
    again = f"{pictures}/dog/further-up/pictures: its images are there through another link"
    assert again in said  # what else lies up there was looked at


def test_a_folder_is_read_once_whatever_links_lead_to_it(pictures, tmp_path):
    write(tmp_path / "elsewhere/sub/x.png")
    (pictures / "a-link").symlink_to(pictures / "owl")  # before the folder by name
    for name in ("first", "second"):
        (pictures / name).symlink_to(tmp_path / "elsewhere")
    (pictures / "sub").symlink_to(tmp_path / "elsewhere/sub")
    records, _, said = looked(pictures)
    assert sorted(set(records["sample_id"]) - {f"{c}/{n}" for c in CLASSES for n in range(4)}) == [
        "first/sub/x"
    ]
    assert len(records) == 13
    assert len([line for line in said if "whose images are there without it" in line]) == 3


def test_a_folder_that_a_link_leads_to_is_read_through_it_when_hidden(pictures, tmp_path):
    """git-annex and DVC keep the pictures in a hidden folder and link to it."""
    write(pictures / ".store/fox/1.png")
    (pictures / "fox").symlink_to(".store/fox")
    assert "fox/1" in set(looked(pictures)[0]["sample_id"])


def test_links_to_nowhere_and_in_a_circle_are_named(pictures):
    (pictures / "cat/gone.png").symlink_to("nowhere.png")
    (pictures / "dog/loop.png").symlink_to("loop.png")
    (pictures / "train").symlink_to("/mnt/not-mounted/train")
    records, failures, said = looked(pictures)
    assert len(records) == 12
    assert failures == {
        "cat/gone": "a link to nowhere (No such file or directory)",
        "dog/loop": "a link to nowhere (Too many levels of symbolic links)",
    }
    assert said == [f"{pictures}/train: a link to nowhere (No such file or directory)"]


@pytest.mark.timeout(60)
def test_what_is_no_file_is_not_waited_for(pictures):
    os.mkfifo(pictures / "cat/pipe.png")
    os.mkfifo(pictures / "cat/pipe")
    records, failures, said = looked(pictures)
    assert len(records) == 12
    assert failures == {"cat/pipe": "no file but a FIFO"}
    assert said == [f"{pictures}/cat/pipe: no file but a FIFO"]


def test_a_name_that_is_not_utf8_is_a_failure_with_its_name(pictures):
    latin = os.fsdecode(b"caf\xe9")
    write(pictures / "cat" / f"{latin}.png")
    write(pictures / latin / "1.png")
    write(pictures / "owl" / "café-日本.png")
    records, failures, _ = looked(pictures)
    assert len(records) == 13
    assert "owl/café-日本" in set(records["sample_id"])
    assert failures == dict.fromkeys(
        [r"cat/caf\xe9.png", r"caf\xe9/1.png"], "the name is not UTF-8"
    )


def test_other_files_are_counted_by_extension(pictures):
    for name in ("a.heic", "b.HEIC", "notes.md", "x.tar.gz", "photo.jpg.part", "LICENSE"):
        write(pictures / "cat" / name, b"other")
    for name in (".DS_Store", "._0.png"):
        write(pictures / "cat" / name, b"other")
    records, _, said = looked(pictures)
    assert len(records) == 12
    (line,) = said
    assert line.startswith("not looked at, by extension: 2 .heic, 1 ")
    assert {"1 .md", "1 .tar.gz", "1 .part", "1 none"} <= set(line.split(": ")[1].split(", "))


@pytest.mark.slow
def test_numbers_after_a_dot_are_no_end_of_extensions(pictures):
    """What is kept of files that are left aside does not grow with them."""
    for number in range(1200):
        write(pictures / "cat" / f"part.{number:05}", b"")
        (pictures / "dog" / f"link-{number:05}").symlink_to("nowhere")
    _, _, said = looked(pictures)
    counts, *sentences, more = said
    assert counts.endswith(", 1192 others")
    assert counts.count("1 .0") == 8
    assert len(sentences) == 10
    assert more == "and 1190 more such lines"


def test_what_is_left_aside_is_said_once(pictures, tmp_path, capsys):
    write(pictures / "cat/a.heic", b"other")
    asked = job(tmp_path / "caches", SourceConfig(kind="folder", path=str(pictures)))
    for wanted in (1, 0):  # an unchanged source is not looked at again
        indexing.index_samples(asked)
        err = capsys.readouterr().err
        assert err.count("emoji: not looked at, by extension: 1 .heic\n") == wanted


def test_a_folder_of_splits_in_the_place_of_classes_is_said(pictures, tmp_path):
    (tmp_path / "whole").mkdir()
    pictures.rename(tmp_path / "whole/train")
    _, _, said = looked(tmp_path / "whole")
    assert said == [
        f"every image has the label 'train', its top folder; source.path={tmp_path}/whole/train "
        "would have those below it as classes (3, such as train/cat)"
    ]
    write(tmp_path / "whole/val/cat/9.png")
    (line,) = looked(tmp_path / "whole")[2]
    assert line.startswith("every image has the label 'train' or 'val', its top folder")
    assert looked(tmp_path / "whole/train")[2] == []
    assert looked(tmp_path / "whole", where={"label": "train"})[2] == []


def test_pictures_without_classes_are_in_no_doubt(tmp_path):
    write(tmp_path / "1.png")
    write(tmp_path / "2.png")
    assert looked(tmp_path)[2] == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "/dog: this folder cannot be listed (Permission denied)"),
        ("/dog", "/dog: this folder cannot be listed (Permission denied)"),
        ("/dog/big", "/dog/big: a folder on the way there may not be entered (Permission denied)"),
    ],
)
def test_a_folder_that_one_may_not_look_into_is_refused(source, words):
    with tempfile.TemporaryDirectory() as name:  # others may look into this one
        Path(name).chmod(0o755)
        write(Path(name, "cat/1.png"))
        write(Path(name, "dog/big/1.png")).parents[1].chmod(0)
        code = (
            "import os; from pipelines.images import index, folders\n"
            "from pipelines.recipe.config import SourceConfig\n"
            f"os.getuid() or os.setuid({NOBODY})\n"
            f"index.pieces(SourceConfig(kind='folder', path={name + source!r}))"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS
        )
        assert f"{name}{words}" in found.stderr
        assert "BadInput" in found.stderr.splitlines()[-1]


def test_colour_profiles_are_counted_by_name_and_srgb_is_none(pictures):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    write(pictures / "cat/0.png", png(icc_profile=srgb))
    write(pictures / "cat/1.png", png(icc_profile=lab))
    write(pictures / "cat/2.png", png(icc_profile=b"broken"))
    (line,) = looked(pictures)[2]
    assert line == (
        "images with a colour profile other than sRGB, whose values are taken as they are: "
        "1 Lab identity built-in, 1 damaged"
    )
