"""What is copied and encoded beside a teacher's computing is, to the byte, what it is alone."""

import threading

import numpy as np
import pytest
import torch
from support import small_caches, small_recipe
from support.devices import CUDA, devices
from support.smooth_pictures import moments_of, pictures

from cache.codec.known import default_codec, make_codec
from eupe.encoders import Encoder, Features
from eupe.spec import EncoderSpec, TeacherSpec
from eupe.teachers import Teacher, padded
from pipelines.caching import extractor
from pipelines.features import streams
from pipelines.features.streams import Streams

GRID, DIM = (8, 8), 64
BATCHES = 12


def small_teacher(device: str, encoder: EncoderSpec | None = None) -> Teacher:
    encoder = encoder or EncoderSpec(architecture="test_resnet", summary="average_pool")
    spec = TeacherSpec(name="teacher", encoder=encoder, weights="0" * 64)
    torch.manual_seed(0)
    return Teacher(spec, Encoder(encoder)).to(device)


def batches(size: int = 5) -> list[np.ndarray]:
    """Pictures of batches, the last one short."""
    rng = np.random.default_rng(0)
    sizes = [size] * (BATCHES - 1) + [2]
    return [rng.integers(0, 256, (count, 64, 64, 3), np.uint8) for count in sizes]


@devices
@pytest.mark.parametrize("name", ["float16", "rot4", "int8", "grid1", "grid4"])
def test_bytes_are_those_of_one_after_the_other(name, device):
    sample = pictures(GRID, DIM, 40)
    codec = make_codec(default_codec(name), moments_of(sample), GRID, sample)
    rows = [pictures(GRID, DIM, 16, seed) for seed in range(BATCHES)]
    for row in rows:
        row[1, 2] *= 1e4  # escapes
        row[3, 4, 5] = np.inf
    found = []
    for beside in (False, True):
        working, under_way = Streams(device, beside), []
        for patches in rows:
            there = torch.from_numpy(patches).to(device) * 1.0  # computed there, then let go
            there = there.view(16, *GRID, DIM)
            under_way.append(working.encode(codec, Features(there[:, 0, 0] + 1, there)))
            del there
        found.append([each.result() for each in under_way])
    for alone, beside in zip(*found, strict=True):
        assert alone.patches.data.tobytes() == beside.patches.data.tobytes()
        assert alone.patches.reasons == beside.patches.reasons
        for field in ("row", "token", "values"):
            np.testing.assert_array_equal(
                getattr(alone.patches.escapes, field), getattr(beside.patches.escapes, field)
            )
        np.testing.assert_array_equal(alone.summary, beside.summary)


@devices
def test_pictures_arrive_whole_however_many_are_under_way(device):
    working = Streams(device)
    arrived = [working.arrive(pixels, 5) for pixels in batches()]
    for pixels, there in zip(batches(), arrived, strict=True):
        assert there.device.type == device
        assert torch.equal(there.cpu(), padded(pixels, 5))


@devices
@pytest.mark.parametrize("encoder", [None, small_recipe.vit()], ids=["cnn", "vit"])
def test_a_teacher_that_is_played_again_sees_the_same(device, encoder):
    teacher, working = small_teacher(device, encoder), Streams(device)
    found = []
    for replays in (False, True):
        teacher.replays = replays
        found.append([teacher.features(pixels, 5, working.arrive) for pixels in batches()])
    if encoder is None:  # a ViT may copy its places from the host, and is then computed
        assert teacher.replayed == (device == "cuda")
    for alone, again in zip(*found, strict=True):
        for a, b in zip(alone, again, strict=True):
            assert torch.equal(a, b)


@devices
def test_what_cannot_be_recorded_is_computed(device, capsys):
    class Asking(Encoder):
        def forward(self, pixels):
            float(pixels.float().mean())  # waits for the device
            return super().forward(pixels)

    encoder = EncoderSpec(architecture="test_resnet", summary="average_pool")
    spec = TeacherSpec(name="teacher", encoder=encoder, weights="0" * 64)
    teacher = Teacher(spec, Asking(encoder)).to(device)
    wanted = [teacher(torch.from_numpy(x).to(device).permute(0, 3, 1, 2)) for x in batches()[:5]]
    for x, alone in zip(batches()[:5], wanted, strict=True):
        torch.testing.assert_close(teacher.features(x, 5).patches, alone.patches)
    assert ("not recorded" in capsys.readouterr().err) == (device == "cuda")


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["float16", "rot4"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_shard_is_the_same_file_with_and_without_streams(
    tmp_path, emoji, device, codec, monkeypatch
):
    source = small_caches.write_folder(tmp_path / "images", small_caches.pictures(emoji, 40))
    found = []
    for beside in (False, True):
        monkeypatch.setattr(
            extractor, "Streams", lambda where, beside=beside: Streams(where, beside)
        )
        teacher = small_recipe.random_teacher("vit", (32,), small_recipe.vit(), codec=codec)
        job = small_caches.job(
            tmp_path / str(beside),
            source,
            teachers=(teacher,),
            gpus_per_actor=1 if device == "cuda" else 0,
        )
        small_caches.build(job)
        found.append(small_caches.data_files(tmp_path / str(beside)))
    assert found[0] == found[1]
    assert found[0]


def test_so_many_batches_wait_to_be_encoded_and_no_more(tmp_path, emoji, monkeypatch):
    """What waits keeps its features on the device."""
    most, waiting, lock = 0, 0, threading.Lock()

    class Late(Streams):
        def encode(self, codec, features):
            nonlocal most, waiting
            future = super().encode(codec, features)
            result = future.result

            def taken():
                nonlocal waiting
                with lock:
                    waiting -= 1
                return result()

            future.result = taken
            with lock:
                waiting += 1
                most = max(most, waiting)
            return future

    monkeypatch.setattr(extractor, "Streams", Late)
    images = small_caches.pictures(emoji, 60)
    source = small_caches.write_folder(tmp_path / "images", images)
    teacher = small_recipe.random_teacher("vit", (32,), small_recipe.vit())
    small_caches.build(
        small_caches.job(tmp_path / "root", source, teachers=(teacher,), rows_per_shard=60)
    )
    assert waiting == 0
    assert most == extractor.UNDER_WAY + 1
    assert streams.Streams("cpu")._encoder is None
