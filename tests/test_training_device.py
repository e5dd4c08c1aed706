"""What a device computes is what the CPU computes: steps, checkpoints, features, stores."""

import dataclasses
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_caches, small_recipe, small_stage
from support.devices import devices

from cache.reader import Reader
from cache.verify import verify
from eupe.drop_path import RowDraws
from eupe.encoders import Encoder, Features
from eupe.losses import teacher_loss
from eupe.moments import Moments
from eupe.normalise import zscore
from eupe.spec import EncoderSpec, TeacherSpec
from eupe.students import build_student
from eupe.teachers import Teacher
from pipelines.features.cached import CachedSource
from pipelines.features.sources import Normalisers
from pipelines.records import tracking
from pipelines.training import loop, precision
from pipelines.training.inputs import Inputs
from pipelines.training.loop import train_stage

OTHER_ORDER = {"rtol": 1e-3, "atol": 1e-4}  # float32 sums in another order, grown over six steps
HALF = 0.02  # bfloat16 keeps eight bits; losses are means over many tokens
PLACES_OF_TIMM = "pos_embed_sincos.py"
"""Makes DINOv3's places on the host at every forward, and copies them with a wait (timm 1.0.31)."""
WORDS = ("loss/", "gradient_norm")


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions and products of matrices keep all 24 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(precision, "products", lambda device: nullcontext())


class Stopped(Exception):
    """Ends a run in the middle, as a lost node would."""


def until(given: Inputs, last: int) -> Inputs:
    """Return inputs that end before a step."""

    def batches(steps):
        for batch in given.batches(steps):
            if batch.step == last:
                raise Stopped
            yield batch

    return dataclasses.replace(given, batches=batches)


def trained(directory: Path, device: str, stops: int | None = None, **stage: object) -> np.ndarray:
    """Train a small stage, of drop path and two micro-batches a step; return its figures."""
    run = small_stage.recipe(directory, **{"micro_batch": 4, "steps": 6, **stage})
    made = small_stage.inputs(run, invalid=[3])
    if stops is not None:
        with pytest.raises(Stopped):
            train_stage(
                run, run.stage("stage2"), until(made, stops), directory / "stage2", device=device
            )
        return np.empty(0)
    train_stage(run, run.stage("stage2"), made, directory / "stage2", device=device)
    lines = tracking.read(directory / "stage2" / tracking.METRICS_FILE)
    return np.array([[v for k, v in line.items() if k.startswith(WORDS)] for line in lines])


@devices
def test_steps_are_the_cpus(tmp_path, device):
    ours, theirs = (trained(tmp_path / where, where) for where in (device, "cpu"))
    assert ours.shape == theirs.shape == (6, 10)
    np.testing.assert_allclose(ours, theirs, **OTHER_ORDER)


@devices
def test_bfloat16_is_near(tmp_path, device):
    ours = trained(tmp_path / "half", device, precision="bfloat16")
    theirs = trained(tmp_path / "whole", device)
    assert not np.array_equal(ours, theirs)
    np.testing.assert_allclose(ours[:, :-1], theirs[:, :-1], rtol=HALF, atol=HALF)


@devices
def test_a_run_goes_on_elsewhere(tmp_path, device):
    undisturbed = trained(tmp_path / "whole", "cpu")
    for number, (first, then) in enumerate([(device, "cpu"), ("cpu", device)]):
        directory = tmp_path / str(number)
        trained(directory, first, stops=5)
        np.testing.assert_allclose(trained(directory, then), undisturbed, **OTHER_ORDER)


@devices
def test_global_random_states_are_left_as_they_were(tmp_path, device):
    def states() -> list[torch.Tensor]:
        own = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
        return [torch.get_rng_state(), *own]

    before = states()
    trained(tmp_path, device, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))


@devices
def test_rows_skip_the_same_branches(device):
    encoder = build_student(small_recipe.vit(patch_size=8, drop_path_rate=0.5)).train()
    draws, places = RowDraws(encoder.network), np.array([0, 3, 5, 900])
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = []
    for where in ("cpu", device):
        encoder.to(where)
        draws.draw("network/0/stage2/7", places, torch.device(where))
        found.append(encoder(pixels.to(where)).patches.detach().cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "encoder",
    [small_recipe.vit(), EncoderSpec(architecture="test_resnet", summary="average_pool")],
    ids=["vit", "cnn"],
)
def test_a_teacher_sees_the_same(device, dtype, encoder):
    spec = TeacherSpec(name="teacher", encoder=encoder, weights="0" * 64, dtype=dtype)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    teachers = [Teacher(spec, Encoder(encoder)).to(where) for where in ("cpu", device)]
    theirs, ours = (teacher.features(pixels, 4) for teacher in teachers)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.device.type, a.dtype) == (device, torch.float32)
        tolerance = 1e-4 if dtype == "float32" else 0.1
        size = float(b.square().mean().sqrt())
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * size)
    kernels = [each for each in teachers[1].parameters() if each.ndim == 4]
    assert kernels
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)


def extracted(directory: Path, emoji: Path, device: str, codec: str):
    """Build a small store; a GPU is asked for as a recipe asks for it."""
    source = small_caches.write_folder(directory / "images", small_caches.pictures(emoji, 12))
    teacher = small_recipe.random_teacher("vit", (32,), small_recipe.vit(), codec=codec)
    job = small_caches.job(
        directory / "root",
        source,
        teachers=(teacher,),
        gpus_per_actor=1 if device == "cuda" else 0,
    )
    (store,) = small_caches.build(job)
    assert not verify(store, deep=True).problems
    return store


@devices
@pytest.mark.parametrize("codec", ["float32", "float16", "rot4"])
def test_a_store_made_there_holds_the_same_and_is_decoded_to_the_same(
    tmp_path, emoji, device, codec
):
    decoded = {}
    for where in ("cpu", device):
        store = extracted(tmp_path / where, emoji, where, codec)
        normalisers = {"vit": Normalisers(*(zscore(Moments(*m)) for m in store.moments().values()))}
        source = CachedSource({("vit", 32): Reader(store, range(1))}, normalisers)
        rows = np.arange(12)[::-1].copy()
        fetched = source.fetch(rows, np.zeros(12, np.int64), {"vit": 32})
        assert fetched.valid.all()
        for on in {"cpu", device}:
            targets = fetched.decode(on)["vit"]
            assert targets.patches.device.type == on
            decoded[where, on] = targets.patches.cpu()
    reference = decoded.pop(("cpu", "cpu"))
    for found in decoded.values():
        # A code at the edge between two falls to either side: one level of a few coefficients.
        far = (found - reference).abs() > 0.01
        assert float(far.float().mean()) < (0.01 if codec == "rot4" else 1e-9)


@devices
def test_the_loss_keeps_so_many_bytes_for_the_way_back(device):
    """Of one picture of the proxy's shape; what autograd keeps is what a batch is bounded by."""
    batch, side, width = 2, 16, 1536
    target = Features(
        torch.randn(batch, width, device=device),
        torch.randn(batch, side, side, width, device=device),
    )
    predicted = torch.randn(batch, side, side, width, device=device, dtype=torch.bfloat16)
    predicted.requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    valid = torch.ones(batch, dtype=torch.bool, device=device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = teacher_loss(Features(target.summary, predicted), target, valid)
    loss.total.backward()
    assert predicted.grad is not None
    assert bool(predicted.grad.isfinite().all())
    of_target = target.patches.nbytes
    assert sum(kept.values()) < 3.1 * of_target


@devices
def test_a_step_waits_for_the_device_once(tmp_path, device, monkeypatch):
    """Where the gradient is looked at; else the host would not run ahead of the device."""
    run = small_stage.recipe(tmp_path, micro_batch=4, steps=6, log_every=6, checkpoint_every=6)
    made = small_stage.inputs(run, invalid=[3])
    step = loop._Run._step

    def watched(*arguments):
        if device == "cpu":
            return step(*arguments)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return step(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop._Run, "_step", watched)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train_stage(run, run.stage("stage2"), made, tmp_path / "stage2", device=device)
    waits = [each for each in said if "synchronizing CUDA operation" in str(each.message)]
    where = Counter((Path(each.filename).name, each.lineno) for each in waits)
    ours = {place: times for place, times in where.items() if place[0] != PLACES_OF_TIMM}
    assert list(ours.values()) == ([6] if device == "cuda" else []), where
