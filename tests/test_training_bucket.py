"""A run in a bucket: it goes on anywhere, ends as one on a disk does, and is computed once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import bucket_run_child, ending_child, small_stage, two_workers
from support.bucket_server import NAME

from cache.errors import Busy, StoreError
from cache.files import copies, trees
from eupe.errors import BadInput
from pipelines.caching import beforehand
from pipelines.machines import lease
from pipelines.recipe.config import Recipe
from pipelines.records import checkpoint, tracking
from pipelines.training import launch, loop, outputs

pytestmark = pytest.mark.slow
DEADLINE_SECONDS = 300


@pytest.fixture
def place(s3, request) -> str:
    return f"s3://{NAME}/{request.node.name}/runs/demo"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run on a disk that nothing happens to."""
    place = tmp_path_factory.mktemp("undisturbed") / "runs" / "demo"
    bucket_run_child.train(str(place))
    return place / "stage2"


@pytest.fixture
def ray_here(place: str, machine: Callable[[str], None]) -> Iterator[None]:
    """Start a Ray that knows the bucket, and whose workers have the modules of this folder."""
    import ray
    import ray.cloudpickle

    modules = (two_workers, small_stage, ending_child)
    for module in modules:
        ray.cloudpickle.register_pickle_by_value(module)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    for module in modules:
        ray.cloudpickle.unregister_pickle_by_value(module)


def child(place: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "support.bucket_run_child", place],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )


def until(there) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def output(place: str) -> outputs.Output:
    run = bucket_run_child.recipe(place)
    return outputs.asked(run, run.stage("stage2"))


def in_bucket(place: str) -> list[str]:
    """Return the checkpoints that HEAD names."""
    there = copies.remote(output(place).directory)
    assert there is not None
    return sorted({name.split("/")[1] for name in trees._read(there).files if "step-" in name})


def same(ours: Path, theirs: Path) -> None:
    """Compare the last checkpoint and every loss of two stages, bit for bit."""
    last = [checkpoint.require(each) for each in (ours, theirs)]
    assert [each.step for each in last] == [bucket_run_child.STEPS] * 2
    assert last[0].weights_digest() == last[1].weights_digest()
    losses = [
        [
            {name: value for name, value in line.items() if name.startswith(("step", "loss", "lr"))}
            for line in tracking.read(each / tracking.METRICS_FILE)
        ]
        for each in (ours, theirs)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == bucket_run_child.STEPS // 2


def test_killed_in_training_it_goes_on_from_an_empty_disk_to_the_same_end(
    place, machine, undisturbed, monkeypatch
):
    first = child(place)
    try:
        until(lambda: in_bucket(place)[-1:] >= ["step-00000006"])
        os.kill(first.pid, signal.SIGKILL)
    finally:
        first.kill()
        first.communicate(timeout=DEADLINE_SECONDS)
    assert first.returncode == -signal.SIGKILL
    machine("second")
    there = int(in_bucket(place)[-1].removeprefix("step-"))
    done = bucket_run_child.train(place)
    assert done.first_step == there  # of what was sent nothing is done again
    run = bucket_run_child.recipe(place)
    same(run.stage_directory("stage2"), undisturbed)

    machine("third")  # a third one finds it, and trains nothing
    monkeypatch.setattr(loop._Run, "_step", None)
    again = bucket_run_child.train(place)
    assert (again.first_step, again.seconds) == (bucket_run_child.STEPS, 0.0)
    same(bucket_run_child.recipe(place).stage_directory("stage2"), undisturbed)
    events = [*(again.checkpoint.directory.parents[1] / tracking.EVENTS_DIRECTORY).iterdir()]
    assert len(events) == 2  # of both processes that trained
    assert output(place).seconds() > 0


def test_two_machines_at_once_train_it_once(place, machine, undisturbed, monkeypatch, capfd):
    first = child(place)
    until(lambda: in_bucket(place))
    machine("second")
    with pytest.raises(Busy, match=rf"is in work on .*, process {first.pid}"):
        bucket_run_child.train(place, wait=False)
    monkeypatch.setattr(loop._Run, "_step", None)
    found = bucket_run_child.train(place)
    assert (found.first_step, found.seconds) == (bucket_run_child.STEPS, 0.0)
    waited = f"is in work on {lease._host()}, process {first.pid}; waiting for it"
    assert waited in capfd.readouterr().err
    said, told = first.communicate(timeout=DEADLINE_SECONDS)
    assert said == f"0 {bucket_run_child.STEPS} True\n", told
    same(bucket_run_child.recipe(place).stage_directory("stage2"), undisturbed)


def test_who_lost_its_lease_ends_with_a_sentence(place, machine, monkeypatch):
    save, saved = checkpoint.save, list[int]()

    def taken_over(directory: Path, contents, keep: int):
        done = save(directory, contents, keep)
        saved.append(contents.step)
        if contents.step == 6:
            machine("second")
            with trees.taken(output(place).directory):
                machine("first")
        return done

    monkeypatch.setattr(checkpoint, "save", taken_over)
    with pytest.raises(Busy, match=r"another process has taken it over.*run the same again"):
        bucket_run_child.train(place)
    assert saved == [3, 6]
    assert in_bucket(place) == ["step-00000003"]


def test_requests_are_as_many_as_files(place, machine, s3):
    bucket_run_child.train(place)
    run = bucket_run_child.recipe(place)
    saves = run.stage("stage2").steps // run.stage("stage2").checkpoint_every
    files = 5 + 2  # of a checkpoint; figures, TensorBoard's, which each save sends
    puts = sum(each.method == "PUT" for each in s3.requests)
    assert puts <= saves * (files + 1) + 12, [each.key for each in s3.requests]
    assert len(s3.requests) < 2 * puts + 40


def test_its_place_is_no_part_of_what_it_is(place, machine, undisturbed):
    assert output(place).address == undisturbed.resolve().name


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_two_workers_of_a_machine_train_into_it(place, tmp_path):
    """A shorter run of theirs goes on from an empty disk; as one on a disk, bit for bit."""
    ours, theirs = (
        ending_child.recipe(Path(each), 2, checkpoint_every=6)
        for each in ("nowhere", tmp_path / "runs" / "demo")
    )
    ours = ours.model_copy(update={"run_directory": place})
    stage = ours.stage("stage2")
    short = stage.model_copy(update={"steps": 8})
    for run in (ours, theirs):
        launch.train(run, short, make_inputs=two_workers.noise_inputs)
    shutil.rmtree(copies.folder())
    for run in (ours, theirs):
        done = launch.train(run, stage, make_inputs=two_workers.noise_inputs)
        assert (done.first_step, done.checkpoint.step) == (8, ending_child.STEPS)
    last = [checkpoint.require(run.stage_directory("stage2")) for run in (ours, theirs)]
    assert last[0].weights_digest() == last[1].weights_digest()
    there = copies.remote(outputs.asked(ours, stage).directory)
    assert there is not None
    names = trees._read(there).files
    assert f"checkpoints/step-{ending_child.STEPS:08d}/encoder.safetensors" in names
    assert not [name for name in names if "ray" in name or "job" in name]


def test_bad_places_are_refused(place, tmp_path, s3, monkeypatch):
    run = bucket_run_child.recipe(place)

    def asked(**fields: object) -> Recipe:
        return Recipe.model_validate({**run.model_dump(mode="json"), **fields})

    with pytest.raises(
        ValueError, match=rf"wants a folder in the bucket, as s3://{NAME}/runs/demo"
    ):
        asked(run_directory=f"s3://{NAME}")
    with pytest.raises(ValueError, match="'ftp://x/y': no place known here"):
        asked(run_directory="ftp://x/y")
    with pytest.raises(ValueError, match="both want to be in a bucket, or neither"):
        asked(stage_root=str(tmp_path))
    assert str(copies.named(asked(stage_root=f"s3://{NAME}/all").outputs)) == f"s3://{NAME}/all"
    nowhere = asked(run_directory="s3://no-such-bucket/runs/demo")
    with pytest.raises(BadInput, match="there is no bucket 'no-such-bucket'"):
        beforehand.check_places(nowhere)
    with pytest.raises(StoreError, match="there is no bucket 'no-such-bucket'"):
        bucket_run_child.train("s3://no-such-bucket/runs/demo")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("EUPE_BUCKET_RETRY_SECONDS", "0.1")
    with pytest.raises(BadInput, match=r"\.probe-\w+: cannot be written"):
        beforehand.check_places(run)
