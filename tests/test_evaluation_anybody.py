"""Anybody's models in the table of a recipe: without a run, and equal to what the run says."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_caches, small_run

from eupe.errors import BadInput
from eupe.students import build_student
from flows.cli import main
from pipelines.evaluation import anybody
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.frozen import FrozenStudent
from pipelines.recipe.config import Recipe
from pipelines.release import models
from pipelines.training import launch

pytestmark = pytest.mark.slow
LITE0 = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("run")
    found = small_run.recipe(folder)
    small_run.build(found, folder)
    launch.train(found, found.last)
    return found


def test_a_run_is_judged_as_its_own_evaluation_judges_it(run: Recipe):
    own = evaluation.plain(run, evaluation.evaluate([FrozenStudent(run, run.last, "cpu")]))
    named = models.named(str(run.directory))
    found = anybody.evaluate(run, [named], "cpu")
    ours, theirs = found["encoders"][named.name], own["encoders"]["student_final"]
    for probe in ("knn_paper", "knn_cosine", "knn_cosine_20"):
        assert ours[probe]["value"] == theirs[probe]["value"], probe
    # Pictures are in the source's order here and networks run with channels last: sums round
    # otherwise, and a linear probe chooses its regularisation on another part of so few images.
    assert ours["cka"] == pytest.approx(theirs["cka"], abs=1e-4)
    near = [each["neighbours"]["lite0"]["value"] for each in (ours, theirs)]
    assert near[0] == pytest.approx(near[1], abs=1e-9)
    assert "linear" in ours
    experts = [each["encoders"]["lite0"]["knn_paper"]["value"] for each in (found, own)]
    assert experts[0] == experts[1]
    assert (found["bank"], found["queries"]) == (own["bank"], own["queries"])
    assert found["left_out"] == []
    assert set(found["encoders"]) == {"pixels", "lite0", named.name}


def test_without_caches_the_experts_are_left_out_and_said(run: Recipe, tmp_path: Path):
    elsewhere = run.model_copy(update={"cache_root": str(tmp_path)})
    named = models.named(LITE0, small_caches.WEIGHTS)
    found = anybody.evaluate(elsewhere, [models.at(named, 64)], "cpu")
    assert set(found["encoders"]) == {"pixels", LITE0}
    (sentence,) = found["left_out"]
    assert sentence.startswith("expert lite0 is left out: ")
    assert found["encoders"][LITE0]["resolution"] == 64


def test_a_picture_that_one_cannot_read_counts_for_none(run: Recipe, monkeypatch):
    made = anybody._made

    def fewer(model: models.Model, *rest: object) -> object:
        found = made(model, *rest)
        if model.name == "pixels":
            return found
        return found._replace(samples=found.samples[1:], vectors=found.vectors[1:])

    monkeypatch.setattr(anybody, "_made", fewer)
    whole = anybody.evaluate(run, [models.named(str(run.directory))], "cpu")
    assert (whole["bank"], whole["queries"]) == (31, 15)


def test_two_of_one_name_are_refused(run: Recipe):
    named = models.named(LITE0, small_caches.WEIGHTS)
    for asked in ([named, named], [named.model_copy(update={"name": "lite0"})]):
        with pytest.raises(BadInput, match="wants names of their own"):
            anybody.evaluate(run, asked, "cpu")


def test_the_command_prints_the_table(run: Recipe, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("pipelines.recipe.recipes.get", lambda name, changes: run)
    words = ["eupe", "evaluate", "--model", str(run.directory), "--recipe", "small_run"]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 0
        said = capsys.readouterr().out
        if more:
            assert set(json.loads(said)["encoders"]) == {"pixels", "lite0", str(run.directory)}
        else:
            assert "raw pixels" in said
            assert "expert lite0" in said
    monkeypatch.setattr(sys, "argv", ["eupe", "evaluate", "demo", "--recipe", "small_run"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "demo and --recipe small_run: wants the recipe once" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["eupe", "evaluate", "--weights", "random:0"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2


def test_what_a_model_makes_is_what_its_network_makes(run: Recipe):
    named = models.named(str(run.directory))
    found = anybody._made(named, run.held_out, run, "cpu")
    encoder = build_student(named.encoder, named.weights).eval()
    assert len(found.vectors) == 16
    assert found.vectors.shape[1] == encoder.summary_dim
    assert np.isfinite(found.vectors.numpy()).all()
    again = anybody._made(named, run.held_out, run, "cpu")
    assert torch.equal(found.of(again.samples["sample_id"].to_list()), again.vectors)
