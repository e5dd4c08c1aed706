"""Weights as people have them: wrapped, nested, averaged, renamed, in folders; and what is left."""

import argparse
import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from support import hub_child
from test_eupe_weights import randomised, same_forward
from torch import Tensor

from eupe import interchange
from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import FAMILY, build_student
from eupe.weights import digest, load_state_dict

NARROW = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
"""A ConvNeXt's names and kinds of tensors; what is asked of them does not grow with their size."""
ATTO = EncoderSpec(architecture="convnext_atto", summary="average_pool", model_arguments=NARROW)
SHALLOW = {"depth": 2}
VIT3 = FAMILY["eupe_vitt16"].model_copy(update={"model_arguments": SHALLOW})
CONVNEXT3 = FAMILY["eupe_convnext_tiny"].model_copy(update={"model_arguments": NARROW})
GATED = EncoderSpec(
    architecture="vit_huge_plus_patch16_dinov3_qkvb",
    model_arguments={**SHALLOW, "embed_dim": 96, "num_heads": 3},
)
DINOV2 = EncoderSpec(
    architecture="vit_small_patch14_dinov2", model_arguments={**SHALLOW, "img_size": 56}
)
REGISTERS = DINOV2.model_copy(update={"architecture": "vit_small_patch14_reg4_dinov2"})

State = dict[str, Tensor]


def named(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


@torch.no_grad()
def loads(path: Path, ours: Encoder, resolution: int = 64) -> bool:
    """True if the network that a file gives has the forward pass of another, bit for bit."""
    loaded = build_student(ours.spec, f"file:{path}").eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(
        0, 256, (2, 3, resolution, resolution), generator=generator, dtype=torch.uint8
    )
    return all(torch.equal(a, b) for a, b in zip(loaded(pixels), ours(pixels), strict=True))


# Wrapped by training code.


def wrapped(kind: str, state: State) -> dict[str, object]:
    """Return what a framework would have saved of a network."""
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.5", "callbacks": {"x": {"best": 0.1}}}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "compiled": named(state, "_orig_mod."),
        "compiled by block": {
            n.replace("blocks.", "blocks._orig_mod."): v for n, v in state.items()
        },
        "ddp": named(state, "module."),
        "compiled ddp": {"model": named(state, "module._orig_mod."), "optimizer": optimizer},
        "fsdp": named(state, "_fsdp_wrapped_module."),
        "lightning model": {"state_dict": named(state, "model."), **lightning},
        "lightning net": {
            "state_dict": named(state, "net.") | {"criterion.weight": torch.ones(3)},
            "optimizer_states": [optimizer],
        },
        "nested": {
            "teacher": {"backbone": state, "dino_head.mlp.0.weight": torch.ones(2, 2)},
            "iteration": 7,
        },
        "timm": {"arch": "x", "state_dict": state, "args": argparse.Namespace(lr=0.1)},
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "compiled",
        "compiled by block",
        "ddp",
        "compiled ddp",
        "fsdp",
        "lightning model",
        "lightning net",
        "nested",
        "timm",
    ],
)
def test_whatever_training_code_has_wrapped_around_a_network_is_left_off(tmp_path, kind):
    ours = randomised(ATTO)
    torch.save(wrapped(kind, ours.network.state_dict()), tmp_path / "checkpoint.ckpt")
    assert loads(tmp_path / "checkpoint.ckpt", ours)


@pytest.mark.parametrize("kind", ["ema", "distillation", "beside"])
def test_the_moving_average_is_taken_and_said(tmp_path, kind, capsys):
    averaged, trained = randomised(ATTO, 1), randomised(ATTO, 2)
    ema, plain = averaged.network.state_dict(), trained.network.state_dict()
    saved = {
        "ema": {"state_dict": plain, "state_dict_ema": ema},
        "distillation": {
            "student": named(plain, "module.backbone."),
            "teacher": named(ema, "backbone."),
        },
        "beside": named(plain, "online_model.") | named(ema, "ema_model."),
    }[kind]
    torch.save(saved, tmp_path / "w.pth")
    assert loads(tmp_path / "w.pth", averaged)
    assert not loads(tmp_path / "w.pth", trained)
    for _ in range(2):  # said once
        digest(f"file:{tmp_path}/w.pth", ATTO)
    said = capsys.readouterr().err
    assert said.count("the moving average at") == 1


def test_two_networks_of_which_none_is_the_average_are_refused(tmp_path):
    a, b = (randomised(ATTO, seed).network.state_dict() for seed in (1, 2))
    torch.save(named(a, "query.") | named(b, "key."), tmp_path / "w.pth")
    with pytest.raises(BadInput, match=r"several networks.*'key\.', 'query\.'"):
        load_state_dict(f"file:{tmp_path}/w.pth", ATTO)
    torch.save(named(a, "query.") | named(a, "key."), tmp_path / "w.pth")
    load_state_dict(f"file:{tmp_path}/w.pth", ATTO)


# Under released names.


def dinov2(network: torch.nn.Module, chunks: bool) -> State:
    """Return a timm network's tensors as DINOv2's released files, or its training, name them."""
    state = dict(network.state_dict())
    if (registers := state.pop("reg_token", None)) is not None:
        first = torch.full_like(state["cls_token"], 0.5)  # exact in the sum
        state["register_tokens"] = registers
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - first
    state["mask_token"] = torch.ones(1, state["cls_token"].shape[-1])
    if chunks:
        state = {re.sub(r"^blocks\.", "blocks.0.", name): value for name, value in state.items()}
        return named(state, "teacher.backbone.") | {"teacher.dino_head.last.weight": torch.ones(2)}
    return state


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("spec", [DINOV2, REGISTERS])
def test_dinov2s_files(tmp_path, spec, chunks):
    ours = randomised(spec)
    with torch.no_grad():  # a sum with 0.5 that loses no bit
        ours.network.cls_token.copy_((ours.network.cls_token * 256).round() / 256)
    torch.save(dinov2(ours.network, chunks), tmp_path / "dinov2.pth")
    assert loads(tmp_path / "dinov2.pth", ours, 56)


def transformers_vit(network: torch.nn.Module) -> State:
    """Return a timm DINOv3 under the names that transformers' DINOv3ViTModel saves (5.24)."""
    named = dict[str, Tensor]()
    for name, value in interchange.to_released(network).items():
        name = name.replace("storage_tokens", "embeddings.register_tokens")
        name = name.replace("cls_token", "embeddings.cls_token")
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.")
        name = name.replace("blocks.", "layer.").replace(".attn.proj.", ".attention.o_proj.")
        name = re.sub(r"\.ls(\d)\.gamma", r".layer_scale\1.lambda1", name)
        for timms, theirs in (("fc1_g", "gate"), ("fc1_x", "up"), ("fc1", "up"), ("fc2", "down")):
            name = name.replace(f".mlp.{timms}.", f".mlp.{theirs}_proj.")
        if ".attn.qkv." not in name:
            named[name] = value
        elif not name.endswith("bias_mask"):
            stem, kind = name.split(".attn.qkv.")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                if (part, kind) != ("k", "bias"):
                    named[f"{stem}.attention.{part}_proj.{kind}"] = piece.clone()
    del named["rope_embed.periods"]
    return named | {"embeddings.mask_token": torch.zeros_like(named["embeddings.cls_token"])}


def transformers_convnext(network: torch.nn.Module) -> State:
    """Return a timm ConvNeXt under the names that transformers' DINOv3ConvNextModel saves."""
    named = {}
    for name, value in interchange.to_released(network).items():
        name = re.sub(r"^downsample_layers\.(\d)", r"stages.\1.downsample_layers", name)
        name = re.sub(r"^stages\.(\d)\.(\d)", r"stages.\1.layers.\2", name)
        name = re.sub(r"(^|\.)norm\.", r"\1layer_norm.", name)
        name = name.replace(".dwconv.", ".depthwise_conv.").replace(".pwconv", ".pointwise_conv")
        named[name] = value
    return named


@pytest.mark.parametrize("inner", ["", "model."])
@pytest.mark.parametrize("spec", [VIT3, GATED, CONVNEXT3])
def test_transformers_dinov3_files(tmp_path, spec, inner):
    ours = randomised(spec)
    is_vit = "vit" in spec.architecture
    state = (transformers_vit if is_vit else transformers_convnext)(ours.network)
    if inner:  # a model in memory has them so
        state = {re.sub(r"^(layer|stages)\.", rf"{inner}\1.", n): v for n, v in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    assert loads(tmp_path / "model.safetensors", ours)


def test_a_whole_clip_gives_its_visual_tower(tmp_path):
    spec = EncoderSpec(library="open_clip", architecture="ViT-S-32", summary="class_token")
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32", pretrained=None)
    torch.save({"epoch": 1, "state_dict": named(clip.state_dict(), "module.")}, tmp_path / "c.pt")
    loaded = load_state_dict(f"file:{tmp_path}/c.pt", spec)
    assert all(torch.equal(loaded[name], v) for name, v in clip.visual.state_dict().items())


def test_a_whole_clip_with_timms_tower_goes_into_timms_network(tmp_path):
    ours = randomised(ATTO)
    whole = named(ours.network.state_dict(), "visual.trunk.")
    whole |= {"visual.head.proj.weight": torch.ones(8, 320), "logit_scale": torch.ones(())}
    whole |= {"text.transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    save_file(whole, tmp_path / "open_clip_model.safetensors")
    assert loads(tmp_path / "open_clip_model.safetensors", ours)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"img_size": 28}, "positions, the network 5: .*img_size"), ({"patch_size": 7}, "pixels")],
)
def test_positions_and_patches_are_never_interpolated_unasked(tmp_path, change, says):
    torch.save(dinov2(randomised(DINOV2).network, False), tmp_path / "w.pth")
    other = DINOV2.model_copy(update={"model_arguments": {**DINOV2.model_arguments, **change}})
    with pytest.raises(BadInput, match=says):
        load_state_dict(f"file:{tmp_path}/w.pth", other)


# Files and folders.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights", "last.ckpt"])
def test_safetensors_under_another_name(tmp_path, name):
    ours = randomised(ATTO)
    save_file(dict(ours.network.state_dict()), tmp_path / name)
    assert loads(tmp_path / name, ours)


@pytest.mark.parametrize("kind", ["one", "sharded", "repository", "revisions", "other name"])
def test_a_snapshot_folder(tmp_path, kind):
    ours = randomised(ATTO)
    state = dict(ours.network.state_dict())
    folder = tmp_path / "snapshot"
    if kind in ("repository", "revisions"):
        folder = tmp_path / "snapshot" / "snapshots" / "b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if kind == "revisions":
        (tmp_path / "snapshot/snapshots/a").mkdir()
        (tmp_path / "snapshot/refs").mkdir()
        (tmp_path / "snapshot/refs/main").write_text("b")
    if kind == "sharded":
        names = list(state)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in shards.items():
            save_file({name: state[name] for name in held}, folder / file)
        weight_map = {name: file for file, held in shards.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(state, folder / ("x.pth" if kind == "other name" else "model.safetensors"))
    assert loads(tmp_path / "snapshot", ours)
    before = digest(f"file:{tmp_path}/snapshot", ATTO)
    for path in folder.glob("*1.safetensors" if kind == "sharded" else "*[!n]"):
        if path.suffix != ".json":
            tensors = {n: v * 2 for n, v in state.items() if n in state}
            tensors = {n: tensors[n] for n in (shards[path.name] if kind == "sharded" else state)}
            save_file(tensors, path)
    assert digest(f"file:{tmp_path}/snapshot", ATTO) != before


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "it has none"),
        (["a.pth", "b.pth"], r"it has a\.pth, b\.pth"),
        (["model.safetensors.index.json"], "is no index of weight files"),
    ],
)
def test_a_folder_without_weights(tmp_path, files, says):
    for name in files:
        (tmp_path / name).write_text("[]")
    with pytest.raises(BadInput, match=says) as caught:
        load_state_dict(f"file:{tmp_path}", ATTO)
    assert f"weights 'file:{tmp_path}'" in str(caught.value)


@pytest.mark.slow
def test_a_repository_of_the_hub(tmp_path):
    """From a download of huggingface_hub's own, laid out as it lays them out."""
    ours = randomised(ATTO)
    revision = "0" * 40
    folder = tmp_path / "models--someone--atto" / "snapshots" / revision
    folder.mkdir(parents=True)
    (tmp_path / "models--someone--atto" / "refs").mkdir()
    (tmp_path / "models--someone--atto" / "refs" / "main").write_text(revision)
    save_file(dict(ours.network.state_dict()), folder / "model.safetensors")
    uris = ["hf-hub:someone/atto", f"hf-hub:someone/atto@{revision}", "hf-hub:someone/else"]
    first, second, refused = hub_child.digests(tmp_path, ATTO, uris)
    assert first == second == digest(f"file:{folder}", ATTO)
    assert refused.startswith("weights 'hf-hub:someone/else': cannot be fetched")


# What cannot be loaded.


@pytest.mark.parametrize(
    ("spec", "change", "says"),
    [
        (
            "convnext_atto",
            lambda s: {n: v for n, v in s.items() if not n.startswith("stages.3")},
            r"are a part of convnext_atto: \d+ are missing: stages\.3\S+, \S+, \S+, \.\.\.$",
        ),
        (
            "convnext_atto",
            lambda s: s | named({"b.weight": torch.ones(2), "b.bias": torch.ones(2)}, "extra."),
            r"hold convnext_atto and more: 2 are unknown: extra\.b\.bias, extra\.b\.weight$",
        ),
        (
            "convnext_atto",
            lambda s: {f"layer{i}": v for i, v in enumerate(s.values())},
            r"have the shapes of convnext_atto under names .*missing: .*unknown: layer0, layer1, l",
        ),
        (
            "convnext_femto",
            dict,
            r"are of another architecture than convnext_femto: \d+ tensors of other shapes: stem\.",
        ),
        (
            "resnet18",
            dict,
            r"are of another architecture than resnet18: \d+ are missing: conv1\.weight, "
            r"bn1\.weight, bn1\.bias, \.\.\.; \d+ are unknown: head\.norm\.bias, \S+, \S+, \.\.\.$",
        ),
    ],
)
def test_what_is_left_over_is_named_on_both_sides(tmp_path, spec, change, says):
    save_file(change(load_state_dict("random:0", ATTO)), tmp_path / "w.safetensors")
    arguments = {"convnext_atto": NARROW, "convnext_femto": {**NARROW, "dims": (12, 24, 36, 48)}}
    asked = EncoderSpec(
        architecture=spec, summary="average_pool", model_arguments=arguments.get(spec, {})
    )
    with pytest.raises(BadInput, match=says):
        load_state_dict(f"file:{tmp_path}/w.safetensors", asked)


def test_same_forward_can_fail():
    assert not same_forward(randomised(ATTO, 1), randomised(ATTO, 2))


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_a_hub_name_is_one_of_weights_and_not_of_a_network(library):
    spec = EncoderSpec(library=library, architecture="hf-hub:timm/vit_tiny_patch16_224.augreg")
    with pytest.raises(BadInput, match=r"weights: hf-hub:timm/vit_tiny_patch16_224\.augreg$"):
        Encoder(spec)
