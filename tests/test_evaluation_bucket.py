"""A finished run in a bucket: judged on one machine, found, compared and taken home on another."""

from pathlib import Path

import pytest
from support import small_run
from support.bucket_server import NAME

from cache.files import copies
from eupe.errors import BadInput
from pipelines.evaluation import during, evaluate, finished, pooled, report
from pipelines.release import export, models
from pipelines.sweeps import file as sweeps
from pipelines.training import launch, outputs

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_another_machine_finds_all_of_it_and_computes_nothing(s3, tmp_path, monkeypatch, machine):
    place = f"s3://{NAME}/finished/runs/demo"
    run = small_run.recipe(tmp_path).model_copy(update={"run_directory": place})
    small_run.build(run, tmp_path)
    for stage in run.stages.values():
        launch.train(run, stage, make_evaluate=during.hook)
    assert all(each.output.judged() for each in outputs.standing(run))
    made = report.make(run, {})
    names = {path.name for path, _ in copies.named(run.directory).files_below()}
    assert names == {
        "summary.json",
        "report.html",
        "evaluation.json",
        "correct.parquet",
        "stage2.link",
    }

    machine("second")
    monkeypatch.setattr(evaluate, "evaluate", None)
    assert not run.directory.exists()
    assert finished.summary(run) == made
    assert report.make(run, {}) == made

    machine("third")
    found = pooled.compare([Path(place)])  # as the command line has it, one slash less
    assert found["knn_paper"].final > 0
    judged = pooled.read(run.directory)
    with pytest.raises(BadInput, match=f"^{place}/correct.parquet: nothing of nobody by knn_paper"):
        judged.right("nobody", "knn_paper")
    assert (run.directory / "summary.json").is_file()
    assert not run.outputs.exists()  # checkpoints are not needed for that
    assert models.named(place, None, None).encoder == run.student.encoder
    assert run.outputs.exists()


def test_what_is_no_run_in_a_bucket_is_a_sentence(s3, machine, tmp_path):
    place = f"s3://{NAME}/nothing/runs/demo"
    with pytest.raises(BadInput, match=f"{place} has no summary.json: wants the folder of a run"):
        pooled.compare([Path(place)])
    with pytest.raises(BadInput, match=f"{place}: no checkpoint of any stage there"):
        models.named(place, None, None)
    with pytest.raises(BadInput, match=f"^{place}: no checkpoint of any stage there"):
        export.export(Path(place), tmp_path / "taken")


def test_a_sweep_in_a_bucket_is_refused():
    sweep = sweeps.read(ROOT / "recipes" / "ablations" / "table2_tiny.yaml")
    with pytest.raises(BadInput, match=r"runs of a sweep lie in a folder .* by `eupe run`"):
        sweeps.runs(sweep, [f"run_directory=s3://{NAME}/runs/base"])
