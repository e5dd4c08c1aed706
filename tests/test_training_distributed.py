"""Several workers learn what one process learns: DDP, FSDP2, Ray Train; any may resume another."""

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import small_stage, two_workers
from support.two_workers import Pair, Trained

from eupe.errors import BadInput
from eupe.weights import state_digest
from pipelines.machines.errors import bad_input
from pipelines.recipe import recipes
from pipelines.recipe.config import Recipe, StudentConfig, WorkersConfig
from pipelines.recipe.named import by_name
from pipelines.records import checkpoint, tracking
from pipelines.training import launch, ray_train

pytestmark = pytest.mark.slow

STEPS = 20
LOG_EVERY, CHECKPOINT_EVERY, STOP_AT = 3, 4, 10  # a checkpoint falls between two logs
# The bound that the project sets itself for 20 steps: float32 sums in another order, grown by
# AdamW, which divides small gradients by their own size. Losses are about 3.
LOSS_ATOL = 1e-5
# Weights move by at most lr = 3e-3 a step; those whose gradient is nearly nothing go astray first.
WEIGHT_ATOL = 1e-3
# Three steps in bfloat16, which has 8 bits: half a unit in the last place is 0.2 %.
BFLOAT16_RTOL = 0.03
STRATEGIES = ("ddp", "fsdp2")
Alone = Callable[..., Trained]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with two_workers.pair(tmp_path_factory.mktemp("pair") / "meeting-point") as started:
        yield started


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Trained]:
    """The same run in this process, undisturbed."""
    run = small(tmp_path_factory.mktemp("alone"))
    return run, two_workers.train(run)


def small(directory: Path, **stage: object) -> Recipe:
    settings = {
        "steps": STEPS,
        "micro_batch": 2,
        "log_every": LOG_EVERY,
        "checkpoint_every": CHECKPOINT_EVERY,
        **stage,
    }
    return small_stage.recipe(directory / "run", **settings)


def losses(run: Recipe) -> dict[int, dict[str, float]]:
    """Return step -> every term of the loss, as tracked."""
    lines = tracking.read(run.directory / "stage2" / tracking.METRICS_FILE)
    return {
        int(line["step"]): {k: v for k, v in line.items() if k.startswith("loss/")}
        for line in lines
        if "loss/total" in line
    }


def assert_same_losses(ours: Recipe, theirs: Recipe) -> None:
    a, b = losses(ours), losses(theirs)
    assert list(a) == list(b)
    assert all(list(a[step]) == list(b[step]) for step in b)
    np.testing.assert_allclose(
        [list(line.values()) for line in a.values()],
        [list(line.values()) for line in b.values()],
        rtol=0,
        atol=LOSS_ATOL,
    )


def order(trained: list[Trained]) -> dict[int, list[tuple[str, int]]]:
    """Return step -> the (sample, view) pairs of its global batch, ranks in order."""
    out: dict[int, list[tuple[str, int]]] = {}
    for worker in trained:
        for step, ids, views in worker.order:
            out.setdefault(step, []).extend(zip(ids, views, strict=True))
    return out


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_and_one_process_agree(tmp_path, pair, alone, strategy):
    run = small(tmp_path, strategy=strategy)
    trained = pair.run(two_workers.train, run)
    theirs, undisturbed = alone
    assert_same_losses(run, theirs)
    assert order(trained) == order([undisturbed])
    micro_batches = [len(worker.order) for worker in trained]
    assert min(micro_batches) > STEPS, "nothing was accumulated: the test would prove less"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_does_not_show_how_many_workers_wrote_it(tmp_path, pair, alone, strategy):
    run = small(tmp_path, strategy=strategy)
    pair.run(two_workers.train, run)
    ours, theirs = (checkpoint.require(each.directory / "stage2") for each in (run, alone[0]))
    assert ours.step == theirs.step == STEPS
    assert ours.identity == theirs.identity
    for part in ("encoder", "heads"):
        a, b = getattr(ours, part)(), getattr(theirs, part)()
        assert list(a) == list(b)
        for name, value in b.items():
            assert a[name].dtype == torch.float32
            torch.testing.assert_close(a[name], value, rtol=0, atol=WEIGHT_ATOL)
    assert shape_of(ours.state()) == shape_of(theirs.state())


def shape_of(tree: Any) -> Any:
    """Return a state with shapes and dtypes in the place of its tensors."""
    if isinstance(tree, dict):
        return {key: shape_of(value) for key, value in tree.items()}
    if isinstance(tree, torch.Tensor):
        return tuple(tree.shape), tree.dtype
    return tree


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_two_began_one_ends(tmp_path, pair, alone, strategy):
    run = small(tmp_path, strategy=strategy)
    begun = pair.run(two_workers.train, run, STOP_AT)
    assert all(worker.result is None for worker in begun)
    ended = two_workers.train(run)
    assert_resumed(run, ended, [ended], alone)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_one_began_two_end(tmp_path, pair, alone, strategy):
    run = small(tmp_path, strategy=strategy)
    assert two_workers.train(run, STOP_AT).result is None
    ended = pair.run(two_workers.train, run)
    assert_resumed(run, ended[0], ended, alone)


def assert_resumed(
    run: Recipe, first: Trained, ended: list[Trained], alone: tuple[Recipe, Trained]
) -> None:
    assert first.result is not None
    assert first.result.first_step == STOP_AT - STOP_AT % CHECKPOINT_EVERY
    theirs, undisturbed = alone
    wanted = order([undisturbed])
    steps = range(first.result.first_step, STEPS)
    assert order(ended) == {step: wanted[step] for step in steps}
    assert_same_losses(run, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rank_0_alone_reads_weights_and_states(tmp_path, pair, alone, strategy):
    """In the memory of eight ranks a proxy's 22 GB would lie eight times."""
    earlier = checkpoint.require(alone[0].directory / "stage2").directory
    student = alone[0].student.model_copy(update={"weights": f"checkpoint:{earlier}"})
    undisturbed, run = (
        small(tmp_path / name, strategy=strategy).model_copy(update={"student": student})
        for name in ("undisturbed", "resumed")
    )
    ((_, first), (_, second)) = pair.run(two_workers.train_counting, undisturbed, earlier)
    assert (first > 0, second) == (True, 0)

    pair.run(two_workers.train, run, STOP_AT)
    saved = checkpoint.require(run.directory / "stage2").directory
    # Nobody goes on from the normalisers.
    wanted = [
        path for path in saved.iterdir() if path.suffix != ".json" and "norm" not in path.name
    ]
    whole = sum(path.stat().st_size for path in wanted)
    ((_, first), (_, second)) = pair.run(two_workers.train_counting, run, saved)
    assert (first, second) == (2 * whole, 0)  # for its crc32c, and for itself

    ours, theirs = (checkpoint.require(r.directory / "stage2") for r in (run, undisturbed))
    assert ours.weights_digest() == theirs.weights_digest()
    assert_same_losses(run, undisturbed)


def test_what_rank_0_cannot_read_all_refuse(tmp_path, pair):
    run = small(tmp_path)
    pair.run(two_workers.train, run, STOP_AT)
    path = checkpoint.require(run.directory / "stage2").directory / checkpoint.STATE
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(BadInput, match=r"contents do not match the crc32c"):
        pair.run(two_workers.train, run)
    path.write_bytes(sound)
    assert all(worker.result is not None for worker in pair.run(two_workers.train, run))


def test_what_rank_0_raises_all_raise(pair):
    said = pair.run(two_workers.fail_on_rank_0, BadInput("a disk is full"))
    assert said == ["BadInput('a disk is full')"] * 2
    here, there = pair.run(two_workers.fail_on_rank_0, KeyError("a bug"))
    assert here == "KeyError('a bug')"
    assert there.startswith("RemoteBug(")
    assert "in work\\n" in there


def test_another_order_would_be_noticed(tmp_path, alone):
    run = small(tmp_path).model_copy(update={"seed": 1})
    other = two_workers.train(run)
    assert order([other]) != order([alone[1]])
    with pytest.raises(AssertionError):
        assert_same_losses(run, alone[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_looking_at_the_model_shows_all_of_it_and_changes_nothing(tmp_path, pair, alone, strategy):
    run = small(tmp_path, strategy=strategy, evaluate_every=CHECKPOINT_EVERY)
    trained = pair.run(partial(two_workers.train, look=True), run)
    assert list(trained[0].looked_at) == list(range(CHECKPOINT_EVERY, STEPS + 1, CHECKPOINT_EVERY))
    assert trained[1].looked_at == {}
    for saved in checkpoint.find(run.directory / "stage2"):
        assert trained[0].looked_at[saved.step] == state_digest(saved.encoder())
    assert_same_losses(run, alone[0])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiled_copies_and_shards_agree(tmp_path, pair, strategy):
    fixed = {"steps": 4, "checkpoint_every": 4, "student_resolutions": (32,)}
    both, one = (
        small(tmp_path / name, strategy=strategy, compile=name == "compiled", **fixed)
        for name in ("compiled", "plain")
    )
    assert all(traced > 0 for traced in pair.run(two_workers.train_compiled, both))
    two_workers.train(one)
    assert_same_losses(both, one)
    ours, theirs = (checkpoint.require(each.directory / "stage2") for each in (both, one))
    assert list(ours.encoder()) == list(theirs.encoder())
    assert list(ours.heads()) == list(theirs.heads())


def test_shards_with_activation_checkpointing_agree(tmp_path, pair, alone):
    run = small(tmp_path, strategy="fsdp2", activation_checkpointing=True)
    pair.run(two_workers.train, run)
    assert_same_losses(run, alone[0])


def test_shards_gathered_in_bfloat16_keep_float32_weights(tmp_path, pair, alone):
    run = small(tmp_path, precision="bfloat16", strategy="fsdp2", steps=6)
    pair.run(partial(two_workers.train, gathered=torch.bfloat16), run)
    for value in checkpoint.require(run.directory / "stage2").encoder().values():
        assert value.dtype == torch.float32
        lost = (value - value.bfloat16().float()).abs().max()
        assert lost > 0 or value.unique().numel() < 3, "no weight has more digits than bfloat16"
    first, exact = losses(run)[LOG_EVERY], losses(alone[0])[LOG_EVERY]
    for name, value in exact.items():
        assert first[name] == pytest.approx(value, rel=BFLOAT16_RTOL)
    assert first != exact


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_workers_of_a_cnn_agree_and_go_on(tmp_path, pair, strategy):
    asked = {"strategy": strategy, "steps": 6, "checkpoint_every": 2}
    both, one = (cnn(small(tmp_path / each, **asked)) for each in "ab")
    pair.run(two_workers.train, both, 4)
    pair.run(two_workers.train, both)
    two_workers.train(one)
    assert_same_losses(both, one)


def cnn(run: Recipe) -> Recipe:
    encoder = run.student.encoder.model_copy(
        update={
            "architecture": "convnext_tiny",
            "model_arguments": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
            "summary": "average_pool",
        }
    )
    stages = by_name(
        *(s.model_copy(update={"student_resolutions": (32,)}) for s in run.stages.values())
    )
    student = StudentConfig(name="cnn", encoder=encoder)
    return run.model_copy(update={"student": student, "stages": stages})


def test_a_batch_that_shards_cannot_share_evenly_is_refused(tmp_path, pair):
    run = small(tmp_path, strategy="fsdp2", global_batch=7)
    with pytest.raises(ValueError, match=r"global_batch = 7.* 2 workers"):
        pair.run(two_workers.train, run)


def test_copies_share_an_odd_batch(tmp_path, pair):
    both, one = (small(tmp_path / each, global_batch=5, steps=6) for each in "ab")
    pair.run(two_workers.train, both)
    two_workers.train(one)
    assert_same_losses(both, one)


def test_a_proxy_of_full_width_trains(tmp_path):
    """Every dimension of proxy_vitg and its teachers is real but the depth, 1 for 50."""
    run = recipes.get("proxy_vitg")
    assert run.proxy is not None
    encoder = run.proxy.encoder
    arguments = {**encoder.model_arguments, "depth": 1}
    proxy = run.proxy.model_copy(
        update={"encoder": encoder.model_copy(update={"model_arguments": arguments})}
    )
    stage = run.stage("stage1")
    short = {"steps": 5, "warmup_steps": 1, "log_every": 1, "checkpoint_every": 5}
    cheap = {"global_batch": 1, "micro_batch": 1, "precision": "float32"}
    stage = stage.model_copy(update={**short, **cheap})
    run = run.model_copy(
        update={"proxy": proxy, "stages": by_name(stage), "run_directory": str(tmp_path)}
    )
    widths = ((1280, 1536, 32), (1536, 1536, 32), (1280, 1280, 16))
    teachers = dict(zip(stage.teachers, widths, strict=True))
    result = two_workers.train_on_random_tokens(run, stage, teachers)
    lines = tracking.read(tmp_path / "stage1" / tracking.METRICS_FILE)
    totals = [line["loss/total"] for line in lines]
    assert len(totals) == 5
    assert totals[-1] < totals[0]
    saved = result.checkpoint.encoder()
    assert saved["blocks.0.mlp.fc1.weight"].shape == (8960, 1536)


@pytest.fixture
def travelling(ray_cluster: None) -> Iterator[None]:
    """Let Ray's workers have the modules of this folder, which are not installed."""
    import ray.cloudpickle

    for module in (two_workers, small_stage):
        ray.cloudpickle.register_pickle_by_value(module)
    yield
    for module in (two_workers, small_stage):
        ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.ray
@pytest.mark.usefixtures("travelling")
def test_ray_train_runs_the_same_loop(tmp_path, alone, capsys):
    run = small(tmp_path).model_copy(update={"workers": WorkersConfig(count=2)})
    with pytest.raises(Exception, match="rank 1 is on fire; put it out") as bug:
        launch.train(run, run.stage("stage2"), make_inputs=two_workers.inputs_that_fail_on_rank_1)
    assert bad_input(bug.value) is None  # no room of ours raised it
    shown = "".join(traceback.format_exception(bug.value))
    assert all(f"in {name}" in shown for name in ("_worker", "inputs_that_fail_on_rank_1"))
    assert "self.pins, loader)" in shown  # the middle, which Ray Train leaves out
    odd = run.stage("stage2").model_copy(update={"strategy": "fsdp2", "global_batch": 7})
    with pytest.raises(ValueError, match=r"^stage2: global_batch = 7 and 2 workers") as refused:
        launch.train(run, odd, make_inputs=two_workers.noise_inputs)
    assert bad_input(refused.value) == str(refused.value)
    done = train_with_ray(run)
    assert f"Training stage2: {STEPS}/{STEPS} steps" in capsys.readouterr().err
    assert done.images_per_second == pytest.approx(images_per_second(run))
    assert done.checkpoint == checkpoint.require((run.directory / "stage2").resolve())
    assert done.checkpoint.step == STEPS
    assert done.checkpoint.score is not None
    assert_same_losses(run, alone[0])
    names = [path.name for path in (run.directory / "stage2" / ray_train.RAY_FOLDER).iterdir()]
    # The failure and what was done; the odd batch has an address of its own.
    assert len(names) == 2, "under one name Ray Train would have repeated the failure"
    assert train_with_ray(run).first_step == STEPS  # finds its work done


def images_per_second(run: Recipe) -> float:
    """Return the pace over all steps, of the paces that the run showed as it went."""
    images, seconds, before = 0, 0.0, 0
    for line in tracking.read(run.directory / "stage2" / tracking.METRICS_FILE):
        if "images_per_second" in line:
            own = int(line["step"] - before) * run.stage("stage2").global_batch
            images, seconds = images + own, seconds + own / line["images_per_second"]
            before = int(line["step"])
    return images / seconds


def train_with_ray(run: Recipe):
    return launch.train(
        run,
        run.stage("stage2"),
        make_inputs=two_workers.noise_inputs,
        make_evaluate=two_workers.sum_of_weights,
    )


def test_one_worker_trains_here(tmp_path, alone):
    run = small(tmp_path)
    done = launch.train(run, run.stage("stage2"), make_inputs=two_workers.noise_inputs)
    assert done.checkpoint.step == STEPS
    assert done.images_per_second == pytest.approx(images_per_second(run))
    assert losses(run) == losses(alone[0])
