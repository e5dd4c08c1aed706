"""Runs under several seeds, pooled: paired by image, and refused where they cannot be paired."""

import json

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

from eupe.errors import BadInput
from eupe.paired import paired_test
from flows.cli import app
from pipelines.evaluation import pooled
from pipelines.evaluation.encoders import PROBES

IDS = [f"{number:03}" for number in range(200)]
SHARES = {"pixels": 0.5, "near": 0.7, "far": 0.8, "student_init": 0.45, "student_final": 0.75}


@pytest.fixture
def runs(tmp_path):
    """Three runs; what is not trained is the same in all of them, rows in another order each."""
    made = []
    for seed in range(3):
        directory = tmp_path / f"seed{seed}"
        directory.mkdir()
        parts = []
        for place, (name, share) in enumerate(SHARES.items()):
            drawn = np.random.default_rng(100 * place + (seed if "student" in name else 0))
            for probe in PROBES:
                correct = drawn.random(len(IDS)) < share
                frame = pl.DataFrame({"sample_id": IDS, "correct": correct})
                named = frame.with_columns(encoder=pl.lit(name), probe=pl.lit(probe))
                parts.append(named.sample(fraction=1, shuffle=True, seed=seed))
        pl.concat(parts).write_parquet(directory / "correct.parquet")
        summary = {
            "label": "category",
            "k": 10,
            "student": {"initial": "student_init", "final": "student_final"},
            "encoders": {"pixels": {"neighbours": {"near": {}, "far": {}}}},
            "versus": {},
        }
        (directory / "summary.json").write_text(json.dumps(summary))
        made.append(directory)
    return made


def right(directory, encoder: str, probe: str) -> np.ndarray:
    table = pl.read_parquet(directory / "correct.parquet")
    own = table.filter(pl.col("encoder") == encoder, pl.col("probe") == probe)
    by_id = dict(zip(own["sample_id"], own["correct"], strict=True))
    return np.array([by_id[name] for name in IDS])


@pytest.mark.parametrize("probe", PROBES)
def test_runs_are_paired_by_image(runs, probe):
    found = pooled.compare(runs)[probe]
    ours, pixels, init, far = (
        np.stack([right(run, name, probe) for run in runs])
        for name in ("student_final", "pixels", "student_init", "far")
    )
    assert found.final == pytest.approx(ours.mean())
    for other, theirs in (("pixels", pixels), ("init", init)):
        against = found.versus[other]
        assert against.difference.value == pytest.approx(ours.mean() - theirs.mean())
        assert against.difference.low < against.difference.value < against.difference.high
        assert against.p_value == pytest.approx(paired_test(ours, theirs))
        assert against.p_value < 0.01
    assert found.expert == "far"
    way = (ours.mean() - pixels.mean()) / (far.mean() - pixels.mean())
    assert found.way.value == pytest.approx(way)
    assert found.way.low < way < found.way.high


def test_one_run_is_compared_too(runs):
    found = pooled.compare(runs[:1])["linear"]
    assert found.final == right(runs[0], "student_final", "linear").mean()


def change(directory, **fields) -> None:
    path = directory / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_cannot_be_pooled_is_refused(runs, tmp_path):
    with pytest.raises(BadInput, match=r"has no summary\.json: wants the folder of a run"):
        pooled.compare([*runs, tmp_path])
    with pytest.raises(BadInput, match="named twice"):
        pooled.compare([runs[0], runs[1], runs[0]])
    change(runs[1], label="subcategory")
    with pytest.raises(BadInput, match=r"label is 'subcategory', and in .* 'category'"):
        pooled.compare(runs)
    change(runs[1], label=None)
    with pytest.raises(BadInput, match="without labels"):
        pooled.compare(runs)
    path = runs[2] / "correct.parquet"
    pl.read_parquet(path).filter(pl.col("sample_id") != "007").write_parquet(path)
    with pytest.raises(BadInput, match="judged on other held-out images"):
        pooled.compare([runs[0], runs[2]])


@pytest.mark.slow
def test_the_command_prints_a_table_and_json(runs):
    words = ["compare", *map(str, runs)]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0
    assert "raw 16 x 16 pixels" in said.output
    assert "of the way from raw pixels to far" in said.output
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert [*found] == [*PROBES]
    assert {*found["linear"]["versus"]["init"]} == {"difference", "p_value"}


def test_nothing_is_a_part_of_no_way(runs):
    for run in runs:
        path = run / "correct.parquet"
        worse = (pl.col("encoder").is_in(["near", "far"])) & (pl.col("probe") == "linear")
        table = pl.read_parquet(path).with_columns(correct=pl.col("correct") & ~worse)
        table.write_parquet(path)
    found = pooled.compare(runs)
    assert found["linear"].way is None
    assert "no expert is above raw pixels" in {row["difference"] for row in pooled.rows(found)}
