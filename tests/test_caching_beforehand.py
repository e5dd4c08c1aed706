"""What is refused before anything starts, and before teachers run: paths, labels."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.small_caches import pictures, write_folder, write_parquet, write_tar
from support.small_recipe import random_teacher, recipe, stage, vit

from cache.samples import Samples
from eupe.errors import BadInput
from pipelines.caching import beforehand, indexing, precompute
from pipelines.recipe import recipes
from pipelines.recipe.config import DatasetConfig, EvaluationConfig, Recipe, SourceConfig
from pipelines.recipe.named import by_name
from pipelines.recipe.stores import cache_jobs

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 400


def asked(
    directory: Path, train: SourceConfig, held_out: SourceConfig, label: str | None = "label"
) -> Recipe:
    """A small recipe of two sources; nothing of its teacher is ever computed here."""
    return recipe(
        directory,
        [random_teacher("t", (32,), vit())],
        [stage({"t": (32,)}, (32,))],
        train=by_name(DatasetConfig(name="train", source=train)),
        held_out=DatasetConfig(name="held-out", source=held_out),
        evaluation=EvaluationConfig(resolution=64, label=label),
    )


@pytest.fixture
def sources(tmp_path, emoji):
    """Folders of the same two classes."""
    images = pictures(emoji, 24)
    half = len(images) // 2
    names = list(images)
    return [
        write_folder(tmp_path / folder, {name: images[name] for name in some})
        for folder, some in (("a", names[:half]), ("b", names[half:]))
    ]


def indexed(asked: Recipe) -> Recipe:
    for job in {job.dataset.name: job for job in cache_jobs(asked)}.values():
        indexing.index_samples(job)
    return asked


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet"])
def test_a_source_that_is_not_there_is_refused_by_name(tmp_path, sources, kind):
    absent = SourceConfig(kind=kind, path=str(tmp_path / "absent"))
    for pair in ((sources[0], absent), (absent, sources[0])):
        with pytest.raises(BadInput, match=f"^{tmp_path}/absent: no "):
            beforehand.check_sources(asked(tmp_path, *pair, label=None))
    beforehand.check_sources(asked(tmp_path, *sources))


def test_a_wrong_path_is_refused_before_another_source_is_indexed(tmp_path, sources):
    absent = SourceConfig(kind="webdataset", path=str(tmp_path / "{00..07}.tar"))
    small = asked(tmp_path, sources[0], absent)
    with pytest.raises(BadInput, match=r"8 of its 8 names are not there"):
        precompute.build([cache_jobs(small)])
    assert not Path(small.cache_root).exists()


def test_a_parquet_file_that_is_not_asked_for_the_label_is_refused(tmp_path, emoji, sources):
    table = write_parquet(tmp_path / "x.parquet", pictures(emoji, 8))
    beforehand.check_sources(asked(tmp_path, sources[0], table))
    without = table.model_copy(update={"label_columns": ()})
    with pytest.raises(BadInput, match=r"'label' is no label of held-out: its source keeps no col"):
        beforehand.check_sources(asked(tmp_path, sources[0], without))
    beforehand.check_sources(asked(tmp_path, sources[0], without, label=None))


def test_a_label_that_is_nowhere_is_refused_before_the_teachers_run(tmp_path, sources, emoji):
    flat = {Path(name).name: data for name, data in pictures(emoji, 8).items()}
    small = asked(tmp_path, sources[0], write_tar(tmp_path / "x.tar", flat))

    def check() -> None:
        beforehand.check_labels(small)

    wanted = r"evaluation\.label = 'label': sample '.*' has none; its labels are name; eval"
    with pytest.raises(BadInput, match=wanted):
        precompute.build([cache_jobs(small)], look_over=check)
    written = [path for path in Path(small.cache_root).rglob("*") if path.name == "spec.json"]
    assert written == []
    assert len(Samples.open(small.cache_root, "train")) == 12
    unlabelled = EvaluationConfig(resolution=64, label=None)
    beforehand.check_labels(small.model_copy(update={"evaluation": unlabelled}))


def test_two_alphabets_are_refused_before_the_teachers_run(tmp_path, sources, emoji):
    other = {f"class-{name}": data for name, data in pictures(emoji, 8).items()}
    small = indexed(asked(tmp_path, sources[0], write_folder(tmp_path / "other", other)))
    with pytest.raises(BadInput, match="have not one in common"):
        beforehand.check_labels(small)
    beforehand.check_labels(indexed(asked(tmp_path / "again", *sources)))


@pytest.mark.slow
def test_a_student_that_wants_whole_batches_is_refused_before_its_teachers_run():
    cut = recipes.get(recipes.DEFAULT, ["stages.stage3.micro_batch=32"])
    with pytest.raises(BadInput, match=r"stage3: the student's layer .* normalises by batch"):
        beforehand.check(cut)
    with pytest.raises(BadInput, match=r"wants workers.count = 1"):
        beforehand.check(recipes.get(recipes.DEFAULT, ["workers.count=2"]))


@pytest.mark.slow
@pytest.mark.parametrize("words", [("run", "demo"), ("cache", "build", "demo")])
def test_the_command_line_refuses_a_wrong_path_before_it_starts_anything(tmp_path, words):
    """Neither Prefect's folder nor Ray's processes are there afterwards; exit code 2."""
    field = "held_out.source.path=data/absent"
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", *words, "--set", field],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    said = [line for line in found.stderr.splitlines() if not line.startswith("import time:")]
    assert found.returncode == 2
    assert said[-1].endswith("pattern such as data/train-{000..099}.parquet or data/*.parquet")
    assert "data/absent: no .parquet file there" in said[-1]
    assert "prefect" not in imported
    assert not (tmp_path / "runs").exists()
