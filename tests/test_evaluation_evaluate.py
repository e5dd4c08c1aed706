"""Evaluation: the baseline is the best constant, and every figure is what a plain loop gives."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from support import small_run

from cache.reader import Reader
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.linear_probe import MAX_ITERATIONS
from eupe.paired import Interval
from eupe.probes import knn_predict, top1
from eupe.teachers import load_teacher
from eupe.views import decode, draw, make_view, render, resize
from pipelines import stages
from pipelines.evaluation import during, evaluate, report
from pipelines.evaluation.compare import Constants
from pipelines.evaluation.encoders import PROBES
from pipelines.evaluation.frozen import FrozenStudent, evaluation_resolutions
from pipelines.evaluation.labels import numbered
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import recipes
from pipelines.recipe.named import by_name
from pipelines.recipe.stores import cache_jobs, open_stores
from pipelines.records import checkpoint
from pipelines.records.checkpoint import Contents
from pipelines.training import inputs, launch, loop, start

# Composed modules in float32 on batches of another size.
COMPOSED = 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    made = small_run.recipe(directory)
    small_run.build(made, directory)
    launch.train(made, made.stage("stage2"), make_evaluate=during.hook)
    return made


@pytest.fixture(scope="module")
def found(run):
    return evaluate.evaluate([FrozenStudent(run, run.stage("stage2"))])


def targets(seed: int, count: int = 40) -> dict[str, Features]:
    generator = torch.Generator().manual_seed(seed)
    summary = torch.randn(count, 5, generator=generator) + 0.5
    patches = torch.randn(count, 2, 2, 3, generator=generator)
    patches[:, 0, 1] += torch.tensor([2.0, -1.0, 0.0])  # one position has something to know
    return {"near": Features(summary, patches)}


def mean_cosines(constants: Constants, of: dict[str, Features]) -> tuple[float, torch.Tensor]:
    target = of["near"]
    guess = constants.predictions(len(target.summary))["near"]
    patches = F.cosine_similarity(guess.patches, target.patches, dim=-1).mean(0)
    return float(F.cosine_similarity(guess.summary, target.summary, dim=-1).mean()), patches


def test_no_constant_does_better_than_the_baseline_at_any_position():
    images = targets(0)
    fitted = Constants((2, 2))
    fitted.add(images)
    summary, patches = mean_cosines(fitted, images)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = Constants((2, 2))
        other.add(
            {
                "near": Features(
                    torch.randn(1, 5, generator=generator),
                    torch.randn(1, 2, 2, 3, generator=generator),
                )
            }
        )
        rival_summary, rival_patches = mean_cosines(other, images)
        assert rival_summary <= summary
        assert bool((rival_patches <= patches).all())


def test_the_baseline_counts_images_not_lengths_and_sums_over_batches():
    images = targets(0)["near"]
    lengths = torch.linspace(0.1, 50, len(images.summary))
    stretched = Features(images.summary * lengths[:, None], images.patches)
    whole, parts = Constants((2, 2)), Constants((2, 2))
    whole.add({"near": stretched})
    for half in (slice(0, 13), slice(13, None)):
        parts.add({"near": Features(images.summary[half], images.patches[half])})
    for ours, theirs in zip(
        whole.predictions(1)["near"], parts.predictions(1)["near"], strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_baseline_is_fitted_on_the_grid_of_the_comparison():
    constants = Constants((4, 4))
    constants.add(targets(0))
    assert constants.predictions(3)["near"].patches.shape == (3, 4, 4, 3)


@pytest.mark.slow
def test_knn_of_teachers_is_that_of_their_cached_summaries(run, found):
    readers = {
        job.dataset.name: Reader(open_stores(job)[0])
        for job in cache_jobs(run)
        if job.views == run.held_out_views
    }
    bank, queries = readers["train"], readers["held-out"]
    labels = {
        name: torch.tensor(['"even"' in text for text in reader.store.samples.table["labels"]])
        for name, reader in readers.items()
    }
    guessed = knn_predict(
        torch.from_numpy(bank.select(range(32)).summaries),
        labels["train"].long(),
        torch.from_numpy(queries.select(range(16)).summaries),
        run.evaluation.k,
    )
    paper = found.encoders["lite0"].probes["knn_paper"]
    assert paper.value == top1(guessed, labels["held-out"].long())
    assert (found.bank, len(found.query_ids)) == (32, 16)


def test_knn_of_raw_pixels_is_that_of_the_pictures_shrunk_by_pillow(run, found):
    vectors, labels = {}, {}
    for dataset in (*run.train.values(), run.held_out):
        reader = ImageReader(base(dataset.source))
        samples = next(
            open_stores(job)[0].samples for job in cache_jobs(run) if job.dataset == dataset
        )
        rows = list(samples.table.iter_rows(named=True))
        views = [
            make_view(reader.read(row), run.held_out_views, row["sample_id"], 0) for row in rows
        ]
        sized = [resize(view.canvas, run.evaluation.resolution) for view in views]
        small = [
            Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC) for picture in sized
        ]
        vectors[dataset.name] = np.stack([np.asarray(each, np.float64).ravel() for each in small])
        labels[dataset.name] = np.array(["even" in row["labels"] for row in rows])
    bank, queries = vectors["train"], vectors["held-out"]
    nearest = ((queries[:, None] - bank[None]) ** 2).sum(-1).argsort(1)[:, : run.evaluation.k]
    votes = labels["train"][nearest].mean(1)
    certain = np.abs(votes - 0.5) > 0.5 / run.evaluation.k  # no tie, which distances would break
    right = (votes > 0.5) == labels["held-out"]
    assert certain.any()
    least, most = (right & certain).mean(), (right | ~certain).mean()
    assert least <= found.encoders["pixels"].probes["knn_paper"].value <= most
    assert 0 < found.versus["knn_paper"]["pixels"].p_value <= 1


def test_cosines_are_those_of_the_student_and_the_live_teacher_image_by_image(run, found):
    stage = run.stage("stage2")
    saved = checkpoint.require(run.stage_directory(stage.name))
    opened = inputs.from_caches(run, stage)
    model = start.initial_model(run, stage, opened.dims)
    start.load(model, saved)
    (config,) = run.teachers.values()
    teacher = load_teacher(config.name, config.encoder, config.weights)
    feed = inputs.centre_feeds(run, stage, opened.normalisers)["held-out"]
    reader, figures = ImageReader(base(run.held_out.source)), []
    for sample in feed.source.samples.table.iter_rows(named=True):
        image = decode(reader.read(sample))
        view = draw(run.held_out_views, sample["sample_id"], 0, *image.size)
        pixels = resize(render(image, run.held_out_views, view), 64)
        x = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        with torch.no_grad():
            ours, theirs = model.eval()(x)[1]["lite0"], teacher(x)
            mean = opened.normalisers["lite0"]
            patches = mean.patches(theirs.patches)
            assert patches.shape[1:3] == (2, 2)
            ours_small = ours.patches
            patches = F.interpolate(patches.permute(0, 3, 1, 2), (4, 4), mode="bicubic")
            figures.append(
                (
                    F.cosine_similarity(ours.summary, mean.summary(theirs.summary)).item(),
                    F.cosine_similarity(ours_small, patches.permute(0, 2, 3, 1), dim=-1)
                    .mean()
                    .item(),
                )
            )
    summary, patches = np.mean(figures, axis=0)
    assert found.agreement[stage.name].summary.final == pytest.approx(summary, abs=COMPOSED)
    assert found.agreement[stage.name].patches.final == pytest.approx(patches, abs=COMPOSED)


@pytest.mark.slow
def test_every_encoder_is_judged_by_scikit_learn_on_the_same_features(run, found):
    """KNN and linear probe of the student after training, its summaries taken here."""
    stage = run.stage("stage2")
    student = FrozenStudent(run, stage)
    vectors, classes = {}, {}
    for name in ("train", "held-out"):
        rows = student.images.rows(name)
        batches = student.images.batches(name, rows, evaluation_resolutions(run, stage))
        with torch.no_grad():
            parts = [student.final.encoder(batch.pixels).summary for batch in batches]
        vectors[name] = torch.cat(parts).double().numpy()
        table = student.images.feeds[name].source.samples.table
        classes[name] = np.array(["even" in text for text in table["labels"]])
    judged, k = found.encoders["student_final"], run.evaluation.k
    scaler = StandardScaler().fit(vectors["train"])
    scaled = {name: scaler.transform(each) for name, each in vectors.items()}
    linear = LogisticRegression(C=judged.regularisation, max_iter=MAX_ITERATIONS)
    cosine = {"metric": "cosine", "weights": lambda apart: np.exp((1 - apart) / 0.07)}
    for probe, model, of in (
        ("knn_paper", KNeighborsClassifier(k), vectors),
        ("knn_cosine", KNeighborsClassifier(k, **cosine), vectors),
        ("knn_cosine_20", KNeighborsClassifier(20, **cosine), vectors),
        ("linear", linear, scaled),
    ):
        guessed = model.fit(of["train"], classes["train"]).predict(of["held-out"])
        right = guessed == classes["held-out"]
        np.testing.assert_array_equal(judged.correct[probe], right, err_msg=probe)
        assert judged.probes[probe].value == right.mean()


def test_where_each_probe_is_right_is_kept_image_by_image(run, found, tmp_path):
    moved = run.model_copy(update={"run_directory": str(tmp_path)})
    path = evaluate.write(moved, found)
    kept = pl.read_parquet(tmp_path / evaluate.CORRECT_FILE)
    assert kept.columns == ["encoder", "probe", "sample_id", "correct"]
    plain = json.loads(path.read_text())
    assert [*plain["encoders"]] == ["pixels", "lite0", "student_init", "student_final"]
    for name, of in plain["encoders"].items():
        for probe in PROBES:
            own = kept.filter(pl.col("encoder") == name, pl.col("probe") == probe)
            assert own["sample_id"].to_list() == found.query_ids
            assert own["correct"].mean() == of[probe]["value"]
            assert of[probe]["low"] <= of[probe]["value"] <= of[probe]["high"]
        assert of["neighbours"]["lite0"]["value"] <= 1
    assert plain["encoders"]["lite0"]["neighbours"]["lite0"]["value"] == 1
    assert plain["encoders"]["lite0"]["cka"]["lite0"] == pytest.approx(1)


def test_a_stage_that_is_judged_alone_has_files_of_its_own(run, found, tmp_path):
    moved = run.model_copy(update={"run_directory": str(tmp_path)})
    whole = evaluate.write(moved, found)
    own = evaluate.write(moved, found, run.stage("stage2"))
    assert (whole.name, own.name) == ("evaluation.json", "evaluation-stage2.json")
    assert (tmp_path / "correct-stage2.parquet").is_file()


def test_training_moved_the_student_from_where_it_began(found):
    assert found.step == 8
    agreement = found.agreement["stage2"]
    for cosine in (agreement.summary, agreement.patches):
        assert cosine.final > cosine.init
        assert cosine.low < cosine.final < cosine.high
    assert {*found.versus} == {*PROBES}
    for versus in found.versus.values():
        assert 0 < versus["init"].p_value <= 1


def test_an_untrained_student_is_told_apart_from_nobody(run, tmp_path):
    stage = run.stage("stage2")
    opened = inputs.from_caches(run, stage)
    model = start.initial_model(run, stage, opened.dims)
    untrained = run.model_copy(update={"run_directory": str(tmp_path)})
    contents = Contents(
        0, {}, opened.pins, model.encoder.network.state_dict(), model.heads.state_dict(), {}
    )
    checkpoint.save(untrained.stage_directory(stage.name), contents, keep=1)
    found = evaluate.evaluate([FrozenStudent(untrained, stage)])
    before, after = (found.encoders[name] for name in ("student_init", "student_final"))
    assert before.probes == after.probes
    for versus in found.versus.values():
        assert versus["init"].p_value == 1
        assert versus["init"].difference == Interval(0.0, 0.0, 0.0)
    agreement = found.agreement["stage2"]
    for cosine in (agreement.summary, agreement.patches):
        assert cosine.init == cosine.final


def test_the_evaluation_during_training_agrees_with_the_one_after(run, found):
    lines = loop.tracking.read(run.stage_directory(run.stage("stage2").name) / "metrics.jsonl")
    seen = {line["step"]: line for line in lines if loop.SCORE in line}
    assert sorted(seen) == [4, 8]
    agreement = found.agreement["stage2"]
    assert seen[8]["held_out/cosine_summary"] == pytest.approx(agreement.summary.final, abs=1e-6)
    assert seen[8]["held_out/cosine_patches"] == pytest.approx(agreement.patches.final, abs=1e-6)
    paper = found.encoders["student_final"].probes["knn_paper"]
    assert seen[8]["held_out/knn_top1"] == paper.value


@pytest.mark.parametrize(("a_class", "said"), [(4, True), (1, False)])
def test_a_bank_of_few_images_a_class_gives_no_knn_during_training(
    run, monkeypatch, capsys, a_class, said
):
    monkeypatch.setattr(during, "HOOK_IMAGES", 6)  # of two classes or more
    monkeypatch.setattr(during, "PER_CLASS", a_class)
    stage = run.stage("stage2")
    figures = during.hook(run, stage, inputs.from_caches(run, stage))(
        FrozenStudent(run, stage).final, stage.steps
    )
    assert ("held_out/knn_top1" in figures) is not said
    assert (f"fewer than {a_class} a class" in capsys.readouterr().err) is said
    assert loop.SCORE in figures


def test_a_label_that_is_not_there_is_named(run):
    asked = run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"label": "colour"})}
    )
    with pytest.raises(ValueError, match=r"label = 'colour': sample '.*' has none; .* label"):
        evaluate.evaluate([FrozenStudent(asked, asked.stage("stage2"))])
    opened = inputs.from_caches(run, run.stage("stage2"))
    with pytest.raises(ValueError, match=r"evaluation\.label=null"):  # before a step is trained
        during.hook(asked, asked.stage("stage2"), opened)


def test_labels_of_two_alphabets_are_refused():
    """ImageNet as class numbers here and as WordNet names there: kNN would be 0.0 %."""
    with pytest.raises(
        BadInput, match=r"labels \('0', '1', \.\.\.\) and .* \('n01440764', \.\.\.\)"
    ):
        numbered(["0", "1", "1"], ["n01440764"])
    known, asked = numbered(["b", "a"], ["a", "c"])
    assert (known.tolist(), asked.tolist()) == ([1, 0], [0, 2])


def test_no_label_is_no_knn(run, found):
    asked = run.model_copy(update={"evaluation": run.evaluation.model_copy(update={"label": None})})
    without = evaluate.evaluate([FrozenStudent(asked, asked.stage("stage2"))])
    assert (without.label, without.versus) == (None, {})
    assert all(each.probes == {} for each in without.encoders.values())
    assert without.agreement == found.agreement
    assert without.encoders["pixels"].neighbours == found.encoders["pixels"].neighbours


def test_a_stage_that_was_not_trained_says_so(run, tmp_path):
    elsewhere = run.model_copy(update={"run_directory": str(tmp_path)})
    with pytest.raises(ValueError, match="no checkpoint; train this stage first"):
        evaluate.evaluate([FrozenStudent(elsewhere, elsewhere.stage("stage2"))])


@pytest.mark.slow
def test_a_report_is_current_until_something_it_was_made_of_changes(run, found, tmp_path):
    moved = run.model_copy(update={"run_directory": str(tmp_path)})
    stage = moved.stage("stage2")
    shutil.copytree(run.stage_directory(stage.name), moved.stage_directory(stage.name))
    assert report.current(moved) is None
    summary = report.write([FrozenStudent(moved, stage)], found, {"evaluation": 1.0}, {})
    assert report.current(moved) == summary
    other = moved.evaluation.model_copy(update={"k": 1})
    assert report.current(moved.model_copy(update={"evaluation": other})) is None
    (moved.directory / report.REPORT_FILE).unlink()
    assert report.current(moved) is None
    report.write([FrozenStudent(moved, stage)], found, {"evaluation": 1.0}, {})
    saved = checkpoint.require(moved.stage_directory(stage.name))
    weights = saved.encoder()
    name = next(iter(weights))
    other_weights = {**weights, name: weights[name] + 1}
    contents = Contents(saved.step, {}, saved.pins, other_weights, saved.heads(), {})
    shutil.rmtree(saved.directory)
    checkpoint.save(moved.stage_directory(stage.name), contents, keep=1)
    assert report.current(moved) is None


def test_a_bank_of_some_sets_is_all_that_is_cached_and_looked_among(run):
    (train_set,) = run.train.values()
    more = train_set.model_copy(update={"name": "more"})
    asked = run.model_copy(
        update={
            "train": by_name(more, train_set),
            "evaluation": run.evaluation.model_copy(update={"bank": (train_set.name,)}),
        }
    )
    centred = [job.dataset.name for job in cache_jobs(asked) if job.views == run.held_out_views]
    assert centred == [train_set.name, run.held_out.name]
    opened = inputs.from_caches(run, run.stage("stage2"))
    feeds = inputs.centre_feeds(asked, asked.stage("stage2"), opened.normalisers)
    assert sorted(feeds) == sorted(centred)


@pytest.fixture
def named(run, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "small_run", lambda: run)
    return run


def test_the_command_goes_on_from_where_it_was(named, capsys):
    with pytest.raises(SystemExit) as ended:
        stages.run("stage2", "small_run", ["--json"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert '"resumed_from": 8' in printed


@pytest.mark.parametrize(
    ("stage", "arguments", "sentence"),
    [
        ("stage2", ["--recipe", "smal_run"], "did you mean 'small_run'?"),
        ("stage2", ["--set", "stages.stage2.stepps=3"], "did you mean 'steps'?"),
        ("stage2", ["--set", "stages.stage2.steps=none"], "stages.stage2.steps"),
        ("stage2", ["--set", "views.seed=6"], "views"),
        ("stage2", ["--set", "cache_root=/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(named, capsys, stage, arguments, sentence):
    with pytest.raises(SystemExit) as exit_code:
        stages.run(stage, "small_run", arguments)
    assert exit_code.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_constants_are_fitted_to_images_spread_over_the_bank():
    few, many = [str(n) for n in range(1420)], [str(n) for n in range(9000)]
    assert evaluate.spread(few) == few
    chosen = [int(each) for each in evaluate.spread(many)]
    assert len(chosen) == evaluate.BANK_PATCHES
    assert chosen[0] == 0
    assert max(np.diff(chosen)) == 5
