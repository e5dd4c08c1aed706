"""Several outputs of one network: one forward, and the bytes of a forward each."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.small_caches import build, data_files, in_process, job, pictures, write_folder
from support.small_recipe import random_teacher

from cache.format import layout
from eupe.encoders import Encoder
from eupe.spec import EncoderSpec
from pipelines.caching import indexing, loaded, precompute

pytestmark = pytest.mark.slow

RESOLUTION = 64
NUM_IMAGES, VIEWS = 24, 2
VIT = EncoderSpec(architecture="vit_tiny_patch16_224", model_arguments={"depth": 3})
NETWORKS = {
    "vit": (
        VIT,
        {"last": {}, "early": {"layer": 0}, "mean": {"layer": 1, "summary": "mean_patches"}},
    ),
    "eva": (
        EncoderSpec(architecture="vit_tiny_patch16_dinov3_qkvb", model_arguments={"depth": 3}),
        {"last": {}, "early": {"layer": 1}},
    ),
    "cnn": (
        EncoderSpec(architecture="tf_efficientnet_lite0", summary="average_pool"),
        {"last": {}, "middle": {"layer": 16}, "fine": {"layer": 8, "summary": "mean_patches"}},
    ),
    "convnext": (
        EncoderSpec(architecture="convnext_atto", summary="average_pool"),
        {"last": {}, "middle": {"layer": 16}},
    ),
}


def teachers(network: str, weights: str = "random:0"):
    """Return the teachers that read one network in some ways."""
    encoder, readings = NETWORKS[network]
    return tuple(
        random_teacher(name, (RESOLUTION,), encoder.model_copy(update=reading), weights=weights)
        for name, reading in readings.items()
    )


@contextmanager
def forwards() -> Iterator[list[int]]:
    """Count the batches that go through networks, one entry a forward."""
    found, run = list[int](), Encoder._run

    def counted(self, x, *rest):
        if x.device.type != "meta":
            found.append(len(x))
        return run(self, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "_run", counted)
        yield found


@pytest.fixture(scope="module")
def source(emoji, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), pictures(emoji, NUM_IMAGES))


@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_of_one_network_are_one_forward_and_the_same_bytes(tmp_path, source, network):
    own = teachers(network)
    with forwards() as apart:
        for teacher in own:
            build(job(tmp_path / "apart", source, num_views=VIEWS, teachers=(teacher,)))
    with forwards() as together:
        build(job(tmp_path / "together", source, num_views=VIEWS, teachers=own))
    assert data_files(tmp_path / "together") == data_files(tmp_path / "apart")
    # The first batch goes through each of them too: their bits are compared.
    assert len(together) == len(apart) // len(own) + len(own)


def test_a_store_that_is_there_leaves_the_others_to_a_forward_of_their_own(tmp_path, source):
    first, *rest = teachers("vit")
    for teacher in (first, *rest):
        build(job(tmp_path / "apart", source, teachers=(teacher,)))
    work = job(tmp_path / "together", source, teachers=(first, *rest))
    build(work.model_copy(update={"teachers": (first,)}))
    stores = build(work)
    assert data_files(tmp_path / "together") == data_files(tmp_path / "apart")
    lost, whole, _ = stores
    layout.rows_file(lost.directory, 0, 1).unlink()  # one shard of one store
    layout.rows_file(whole.directory, 0, 2).unlink()  # and one of two of them
    layout.rows_file(lost.directory, 0, 2).unlink()
    with forwards() as again:
        done = precompute.extract_missing(work, stores, in_process(work))
    assert done.num_shards == 3
    assert len(again) == 2 + 1 + 2  # 10 rows, 8 a batch: one alone; together, and each for the bits
    assert data_files(tmp_path / "together") == data_files(tmp_path / "apart")


def test_teachers_of_other_weights_pixels_or_dtypes_have_forwards_of_their_own(tmp_path, source):
    last, early, _ = teachers("vit")
    darker = VIT.model_copy(update={"pixel_mean": (0.5, 0.5, 0.5)})
    others = [
        early.model_copy(update={"weights": "random:1"}),
        early.model_copy(update={"dtype": "bfloat16"}),
        early.model_copy(update={"encoder": darker}),
    ]
    for other in others:
        held = loaded.Loaded((last, other), "cpu")
        assert held.teacher("last").encoder.network is not held.teacher("early").encoder.network
    held = loaded.Loaded((last, early), "cpu")
    assert held.teacher("last").encoder.network is held.teacher("early").encoder.network


def test_outputs_whose_bits_differ_together_are_computed_apart(
    tmp_path, source, monkeypatch, capfd
):
    own = teachers("vit")
    for teacher in own:
        build(job(tmp_path / "apart", source, teachers=(teacher,)))
    several = Encoder.several

    def other_bits(self, pixels, readers):
        found = several(self, pixels, readers)
        return [each._replace(summary=each.summary + 1) for each in found]

    monkeypatch.setattr(Encoder, "several", other_bits)
    build(job(tmp_path / "together", source, teachers=own))
    assert data_files(tmp_path / "together") == data_files(tmp_path / "apart")
    assert "last, early, mean: one forward gives other bits" in capfd.readouterr().err


def test_a_network_with_a_pooling_head_serves_one_without(tmp_path):
    siglip = EncoderSpec(
        architecture="vit_base_patch16_siglip_224",
        summary="attention_pool",
        model_arguments={"depth": 1, "embed_dim": 48, "num_heads": 2},
    )
    mean = siglip.model_copy(update={"summary": "mean_patches"})
    own = [random_teacher(name, (64,), each) for name, each in (("mean", mean), ("pool", siglip))]
    pixels = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8).numpy()
    held = loaded.Loaded(own, "cpu")
    with forwards() as ran:
        for _ in range(2):
            found = held.features(["mean", "pool"], pixels, 8)
    assert len(ran) == 1 + 2 + 1
    for each in own:
        alone = loaded.Loaded([each], "cpu").features([each.name], pixels, 8)[each.name]
        assert torch.equal(alone.summary, found[each.name].summary)
        assert torch.equal(alone.patches, found[each.name].patches)


def test_measuring_counts_one_forward_too(tmp_path, source):
    work = job(tmp_path / "root", source, teachers=teachers("vit"))
    indexing.index_samples(work)
    with forwards() as ran:
        precompute.resolve_stores(work, in_process(work))
    assert len(ran) == 2 + 3  # 16 samples, 8 a batch, and the first through each
