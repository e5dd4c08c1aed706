"""The training loop: exact resume, exact accumulation, addressed draws, honest refusals."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from support import small_stage, train_child
from timm.layers import DropPath
from torch import nn

from eupe import fingerprint
from eupe.drop_path import RowDraws
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import build_student
from pipelines.machines.errors import bad_input
from pipelines.recipe import resolutions, whole_batches
from pipelines.recipe.config import Recipe, StudentConfig
from pipelines.recipe.mix import Mix
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig
from pipelines.records import checkpoint, tracking
from pipelines.training import loop, start
from pipelines.training.loop import train_stage

CHILD = Path(__file__).parent / "support" / "train_child.py"
PATIENCE_SECONDS = 400  # a child that imports torch on a busy machine
# Sums of float32 in another order: a few units in the last place, grown over 12 steps of AdamW,
# which divides small gradients by their own size.
SAME_MATHS = {"rtol": 2e-4, "atol": 1e-5}
COMPILED = 1e-4  # composed modules in float32, operations fused and reordered
WORDS = ("loss/", "lr", "gradient_norm")


def figures(directory: Path) -> list[dict[str, float]]:
    """Return what does not depend on the clock, in step order."""
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith(WORDS)}
        for line in tracking.read(directory / tracking.METRICS_FILE)
    ]


def trained(directory: Path, *, invalid=(), **stage: object) -> list[dict[str, float]]:
    run = small_stage.recipe(directory, **stage)
    train_stage(
        run, run.stage("stage2"), small_stage.inputs(run, invalid=invalid), directory / "stage2"
    )
    return figures(directory / "stage2")


def totals(lines: list[dict[str, float]]) -> np.ndarray:
    return np.array([line["loss/total"] for line in lines])


def test_it_learns(tmp_path):
    lines = trained(tmp_path, steps=60, checkpoint_every=60)
    assert totals(lines)[-10:].mean() < 0.8 * totals(lines)[:10].mean()


def test_two_runs_are_bit_equal(tmp_path):
    assert trained(tmp_path / "a") == trained(tmp_path / "b")


def test_global_random_state_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    trained(tmp_path, steps=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drop_path_is_addressed_by_the_step_not_by_what_ran_before(tmp_path):
    torch.manual_seed(1)
    one = trained(tmp_path / "a", steps=3)
    torch.manual_seed(2)
    assert trained(tmp_path / "b", steps=3) == one


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_add_up_to_the_batch(tmp_path, size):
    whole = trained(tmp_path / "whole", micro_batch=1000, steps=6)
    parts = trained(tmp_path / "parts", micro_batch=size, steps=6)
    np.testing.assert_allclose(totals(parts), totals(whole), **SAME_MATHS)


@pytest.mark.parametrize("invalid", [(0, 1, 2), (5,), (0, 7)])
def test_invalid_rows_weigh_nothing_however_they_fall_into_micro_batches(tmp_path, invalid):
    whole = trained(tmp_path / "whole", micro_batch=1000, steps=6, invalid=invalid)
    parts = trained(tmp_path / "parts", micro_batch=2, steps=6, invalid=invalid)
    np.testing.assert_allclose(totals(parts), totals(whole), **SAME_MATHS)
    assert not np.allclose(totals(whole), totals(trained(tmp_path / "all", steps=6)))


def test_what_a_row_skips_is_its_own_whatever_stands_beside_it(tmp_path):
    network = small_stage.recipe(tmp_path).student.encoder
    encoder = build_student(network).train()
    draws = RowDraws(encoder.network)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)

    def summaries(address, places):
        draws.draw(address, np.array(places), torch.device("cpu"))
        return encoder(pixels[places]).summary.detach()

    whole = summaries("network/0/stage2/5", list(range(8)))
    for places in ([3], [6, 7], [0, 2, 5]):
        part = summaries("network/0/stage2/5", places)
        torch.testing.assert_close(part, whole[places], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(summaries("network/0/stage2/6", list(range(8))), whole)


def test_rows_skip_a_branch_as_often_as_the_rate_says_and_the_mean_stays(tmp_path):
    layer = nn.Sequential(DropPath(0.3))
    draws = RowDraws(layer)
    draws.draw("network/0/stage2/0", np.arange(20_000), torch.device("cpu"))
    out = layer.train()(torch.ones(20_000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)  # four sigmas
    assert torch.equal(layer.eval()(out), out)


@pytest.mark.parametrize("rate", ["proj_drop_rate", "attn_drop_rate", "patch_drop_rate"])
def test_a_student_that_draws_what_has_no_row_is_refused(tmp_path, rate):
    run = small_stage.recipe(tmp_path)
    arguments = {**run.student.encoder.model_arguments, rate: 0.1}
    encoder = run.student.encoder.model_copy(update={"model_arguments": arguments})
    run = run.model_copy(update={"student": run.student.model_copy(update={"encoder": encoder})})
    with pytest.raises(BadInput, match="of the rates of timm's models drop_path_rate alone"):
        train_stage(run, run.stage("stage2"), small_stage.inputs(run), tmp_path / "stage2")


def by_batch(directory: Path, **stage: object) -> Recipe:
    """Return a run whose student has batch normalisation."""
    run = small_stage.recipe(directory, **stage)
    encoder = EncoderSpec(architecture="test_resnet", summary="average_pool", layer=8)
    return run.model_copy(update={"student": StudentConfig(name="student", encoder=encoder)})


SCALED = 8 * 2**2  # a global batch of 8, at 16 px and at 32


@pytest.mark.parametrize(
    ("stage", "workers", "words"),
    [
        ({"micro_batch": SCALED - 1}, 1, f"micro_batch = {SCALED - 1} .* it wants {SCALED}"),
        ({"micro_batch": SCALED}, 2, "with 2 workers .* workers.count = 1"),
        (
            {"micro_batch": SCALED, "activation_checkpointing": True},
            1,
            "activation_checkpointing would count each batch twice",
        ),
    ],
)
def test_a_student_with_batch_normalisation_takes_whole_batches_alone(
    tmp_path, stage, workers, words
):
    run = by_batch(tmp_path, steps=2, **stage)
    network = build_student(run.student.encoder).network
    with pytest.raises(BadInput, match=words):
        whole_batches.check(network, run.stage("stage2"), workers)
    sound = by_batch(tmp_path, steps=2, micro_batch=SCALED).stage("stage2")
    whole_batches.check(network, sound, 1)
    vit = build_student(small_stage.recipe(tmp_path).student.encoder).network
    whole_batches.check(vit, run.stage("stage2"), workers)


def test_a_cut_batch_of_a_student_with_batch_normalisation_is_refused_before_a_step(tmp_path):
    run = by_batch(tmp_path, micro_batch=4)
    with pytest.raises(BadInput, match="normalises by batch"):
        train_stage(run, run.stage("stage2"), small_stage.inputs(run), tmp_path / "stage2")
    assert checkpoint.latest(tmp_path / "stage2") is None


def test_batch_statistics_are_resumed_with_the_rest(tmp_path):
    """What a student normalises by when it is used is in its checkpoint, to the bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = by_batch(tmp_path, steps=6, micro_batch=8, student_resolutions=(32,))
    stage = run.stage("stage2")
    wanted = train_stage(run, stage, small_stage.inputs(run), whole).checkpoint.encoder()
    made = small_stage.inputs(run)

    def killed(steps):
        for batch in made.batches(steps):
            if batch.step == 4:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train_stage(run, stage, dataclasses.replace(made, batches=killed), cut)
    found = train_stage(run, stage, small_stage.inputs(run), cut).checkpoint.encoder()
    assert any("running_var" in name for name in wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_batch_without_valid_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step 0: none of the batch's 8 rows is valid"):
        trained(tmp_path, invalid=range(8))


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path):
    run = small_stage.recipe(tmp_path, steps=6, checkpoint_every=2)
    made = small_stage.inputs(run)

    def poisoned(steps):
        for batch in made.batches(steps):
            if batch.step == 4:
                for pixels in batch.parts[0].fetched.pixels.values():
                    pixels[0] = np.nan
            yield batch

    bad = loop.Inputs(poisoned, made.dims, made.normalisers, made.identity, made.pins)
    with pytest.raises(BadInput, match="step 4") as stopped:
        train_stage(run, run.stage("stage2"), bad, tmp_path / "stage2")
    assert bad_input(stopped.value) == str(stopped.value)
    saved = checkpoint.require(tmp_path / "stage2")
    assert saved.step == 4
    assert all(bool(value.isfinite().all()) for value in saved.encoder().values())


@pytest.mark.slow
def test_kill_at_a_random_step_then_resume_gives_bit_equal_losses(tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train_child.train(undisturbed, pause=0)
    wanted = figures(undisturbed / "stage2")
    assert [line["step"] for line in wanted] == list(range(2, 31, 2))
    # log_every = 2 and checkpoint_every = 5: half of the resumes begin inside a window of means.
    last_step = random.Random(os.urandom(8)).randrange(6, 27)
    child = run_child(killed, pause=0.2)
    wait_for_step(killed / "stage2" / tracking.METRICS_FILE, last_step, child)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=60) == -signal.SIGKILL, f"it ended before step {last_step}"
    resumed = train_child.train(killed, pause=0)
    assert 5 <= resumed.first_step < 30
    assert figures(killed / "stage2") == wanted
    ours, theirs = checkpoint.require(killed / "stage2"), checkpoint.require(undisturbed / "stage2")
    for name, value in theirs.encoder().items():
        assert torch.equal(ours.encoder()[name], value), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
def test_a_compiled_stage_learns_as_one_that_is_not(tmp_path):
    """In processes without the shape checks, which a compiler cannot trace."""
    short = {"steps": 4, "log_every": 1, "checkpoint_every": 4, "student_resolutions": [32]}
    for name in ("plain", "compiled"):
        stage = {**short, "compile": name == "compiled"}
        assert run_child(tmp_path / name, 0, **stage).wait(timeout=PATIENCE_SECONDS) == 0
    plain, compiled = (
        [line["loss/total"] for line in figures(tmp_path / name / "stage2")]
        for name in ("plain", "compiled")
    )
    assert len(plain) == 4
    assert compiled == pytest.approx(plain, rel=COMPILED)


def run_child(directory: Path, pause: float, **stage: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(CHILD), str(directory), str(pause), json.dumps(stage)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def wait_for_step(path: Path, step: int, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists() or not any(line["step"] >= step for line in tracking.read(path)):
        assert child.poll() is None, "the child ended before it was killed"
        assert time.monotonic() < deadline, f"no step {step}"
        time.sleep(0.01)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    run = small_stage.recipe(tmp_path)
    stage, made = run.stage("stage2"), small_stage.inputs(run)
    train_stage(run, stage, made, tmp_path / "stage2")
    before = figures(tmp_path / "stage2")
    again = train_stage(run, stage, made, tmp_path / "stage2")
    assert (again.first_step, again.checkpoint.step) == (12, 12)
    assert figures(tmp_path / "stage2") == before


def test_another_configuration_is_refused_field_by_field_and_nothing_is_lost(tmp_path):
    trained(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"stage\.optimizer\.lr: 0\.1 != 0\.003") as refused:
        trained(tmp_path, optimizer=OptimizerConfig(lr=0.1))
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_how_it_runs_may_change_on_resuming(tmp_path):
    trained(tmp_path)
    assert trained(tmp_path, micro_batch=2, keep_checkpoints=7, log_every=3)


def test_other_manifest_versions_are_refused(tmp_path):
    run = small_stage.recipe(tmp_path)
    made = small_stage.inputs(run)
    train_stage(run, run.stage("stage2"), made, tmp_path / "stage2")
    grown = loop.Inputs(made.batches, made.dims, made.normalisers, made.identity, {"memory": 2})
    with pytest.raises(ValueError, match="manifest versions"):
        train_stage(run, run.stage("stage2"), grown, tmp_path / "stage2")


def test_train_sets_in_another_order_are_another_run(tmp_path):
    """The mix numbers them as they stand: every draw would be another."""
    run = small_stage.recipe(tmp_path)
    (first,) = run.train.values()
    second = first.model_copy(update={"name": "second"})
    made = small_stage.inputs(run)
    orders = [
        run.model_copy(update={"train": by_name(*sets)})
        for sets in ((first, second), (second, first))
    ]
    mixes = [Mix(each.shares, each.homogeneous, 64, each.seed) for each in orders]
    drawn = [np.array(mix.names)[mix.slots(0)[0]].tolist() for mix in mixes]
    assert drawn[0] != drawn[1]
    said = [start.identity(each, each.stage("stage2"), made, None) for each in orders]
    assert fingerprint.canonical_json(said[0]) != fingerprint.canonical_json(said[1])


def test_without_resume_an_existing_run_is_refused(tmp_path):
    trained(tmp_path)
    run = small_stage.recipe(tmp_path)
    with pytest.raises(ValueError, match="has a checkpoint of step 12"):
        train_stage(
            run, run.stage("stage2"), small_stage.inputs(run), tmp_path / "stage2", resume=False
        )


def test_two_processes_cannot_train_in_one_directory(tmp_path):
    (tmp_path / "stage2").mkdir()
    with (
        FileLock(tmp_path / "stage2" / "train.lock"),
        pytest.raises(ValueError, match="another process is training there"),
    ):
        trained(tmp_path)
    assert trained(tmp_path)


def test_evaluation_is_called_when_due_and_its_score_is_kept(tmp_path):
    asked = []

    def evaluate(model, done):
        assert not model.training
        asked.append(done)
        return {loop.SCORE: -abs(done - 5.0), "held_out/cosine": 0.5}

    run = small_stage.recipe(tmp_path, evaluate_every=5, checkpoint_every=5, keep_checkpoints=1)
    directory = tmp_path / "stage2"
    train_stage(run, run.stage("stage2"), small_stage.inputs(run), directory, evaluate=evaluate)
    assert asked == [5, 10, 12]
    assert [found.step for found in checkpoint.find(directory)] == [5, 12]
    best = checkpoint.best(directory)
    assert best is not None
    assert (best.step, best.score) == (5, 0.0)


def test_an_evaluation_that_fails_loses_no_step(tmp_path):
    run = small_stage.recipe(tmp_path, evaluate_every=7, checkpoint_every=100)
    directory = tmp_path / "stage2"

    def evaluate(model, done):
        raise ValueError("no label")

    with pytest.raises(ValueError, match="no label"):
        train_stage(run, run.stage("stage2"), small_stage.inputs(run), directory, evaluate=evaluate)
    assert checkpoint.require(directory).step == 7
    # Going on makes up for it, as if it had never failed.
    asked = []

    def sound(model, done):
        asked.append(done)
        return {loop.SCORE: -float(done)}

    train_stage(run, run.stage("stage2"), small_stage.inputs(run), directory, evaluate=sound)
    assert asked == [7, 12]
    assert checkpoint.best(directory).step == 7
    train_stage(run, run.stage("stage2"), small_stage.inputs(run), directory, evaluate=sound)
    assert asked == [7, 12]


def test_evaluation_does_not_change_what_is_learnt(tmp_path):
    run = small_stage.recipe(tmp_path / "with", evaluate_every=2)

    def evaluate(model, done):
        torch.rand(3)  # draws from the global state, as an evaluation may
        return {}

    train_stage(
        run, run.stage("stage2"), small_stage.inputs(run), tmp_path / "with", evaluate=evaluate
    )
    with_it = [line for line in figures(tmp_path / "with") if "loss/total" in line]
    assert with_it == trained(tmp_path / "without")


def test_figures_name_every_teacher_and_term(tmp_path):
    trained(tmp_path, steps=2)
    line = tracking.read(tmp_path / "stage2" / tracking.METRICS_FILE)[0]
    for teacher in small_stage.TEACHERS:
        terms = [line[f"loss/{teacher}/{term}"] for term in loop.TERMS]
        assert terms[3] == pytest.approx(terms[0] + 0.9 * terms[1] + 0.1 * terms[2], rel=1e-5)
    assert line["loss/total"] == pytest.approx(
        sum(line[f"loss/{teacher}/total"] for teacher in small_stage.TEACHERS), rel=1e-6
    )
    assert line["images_per_second"] > 0
    assert 0 <= line["data_wait_share"] <= 1


def test_the_share_of_waiting_is_that_of_a_slow_source(tmp_path):
    """The source knows how long it took, and how long the loop was away between two batches."""
    run = small_stage.recipe(tmp_path, steps=6, log_every=6, checkpoint_every=6, micro_batch=64)
    made = small_stage.inputs(run)
    waited, busy, away = 0.0, 0.0, 0.0

    def slowly(steps):
        nonlocal waited, busy, away
        for batch in made.batches(steps):
            pause = max(0.2, away)  # steps on a busy machine are slow: so is the source, then
            time.sleep(pause)
            waited += pause
            left = time.perf_counter()
            yield dataclasses.replace(batch, wait_seconds=pause)
            away = time.perf_counter() - left
            busy += away if batch.step < 5 else 0.0

    slow = dataclasses.replace(made, batches=slowly)
    result = train_stage(run, run.stage("stage2"), slow, tmp_path / "stage2")
    (line,) = tracking.read(tmp_path / "stage2" / tracking.METRICS_FILE)
    share = waited / (waited + busy * 6 / 5)  # what the last step took is not known here
    for found in (line["data_wait_share"], result.wait_share):
        assert found == pytest.approx(share, abs=0.15)
    assert share > 0.3, "the loop was so slow that waiting hardly counts: the test proves little"


def test_scales_are_drawn_independently_uniformly_and_by_address():
    pyramid = (16, 32, 48)
    stage = small_stage.recipe(Path(".")).stage("stage2")
    stage = stage.model_copy(
        update={
            "teacher_resolutions": {"near": pyramid, "far": (32,)},
            "student_resolutions": pyramid,
        }
    )
    drawn = [resolutions.draw(stage, 3, step) for step in range(9000)]
    pairs = np.array([(each.student, each.teachers["near"]) for each in drawn])
    for student in pyramid:
        for teacher in pyramid:
            count = int(((pairs == (student, teacher)).all(1)).sum())
            assert abs(count - 1000) < 6 * (9000 * 1 / 9 * 8 / 9) ** 0.5  # six sigma
    assert resolutions.draw(stage, 3, 4321) == drawn[4321]
    assert [resolutions.draw(stage, 4, step) for step in range(9)] != drawn[:9]


def test_micro_batch_shrinks_with_the_students_scale():
    stage = small_stage.recipe(Path("."), micro_batch=64).stage("stage2")
    assert resolutions.micro_batch(stage, 16, 1000) == 64
    assert resolutions.micro_batch(stage, 32, 1000) == 16
    assert resolutions.micro_batch(stage, 16, 10) == 10
    assert resolutions.micro_batch(stage.model_copy(update={"micro_batch": 1}), 32, 10) == 1


def test_weight_decay_is_on_matrices_only(tmp_path):
    run = small_stage.recipe(tmp_path)
    model = start.initial_model(run, run.stage("stage2"), small_stage.TEACHERS)
    decayed, free = start.optimizer(model, run.stage("stage2")).param_groups
    assert decayed["weight_decay"] > 0 == free["weight_decay"]
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    assert any(p is model.encoder.network.cls_token for p in free["params"])


def test_a_stage_starts_from_the_checkpoint_of_the_one_before(tmp_path):
    run = small_stage.recipe(tmp_path)
    before = run.stage("stage2")
    after = before.model_copy(update={"name": "stage3", "initial": "stage2"})
    run = run.model_copy(update={"stages": by_name(before, after)})
    with pytest.raises(ValueError, match="no checkpoint; train this stage first"):
        start.initial_model(run, after, small_stage.TEACHERS)
    done = train_stage(run, before, small_stage.inputs(run), run.stage_directory(before.name))
    model = start.initial_model(run, after, small_stage.TEACHERS)
    for name, value in done.checkpoint.encoder().items():
        assert torch.equal(model.encoder.network.state_dict()[name], value), name
    for name, value in done.checkpoint.heads().items():
        assert torch.equal(model.heads.state_dict()[name], value), name
    wider = after.model_copy(update={"head_hidden": 17})
    told = r"not fit the model: far.patches.0.weight is \(16, 32\), wanted \(17, 32\); .* 13 more$"
    with pytest.raises(BadInput, match=told):
        start.initial_model(run, wider, small_stage.TEACHERS)
