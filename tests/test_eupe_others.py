"""Networks by import path and of transformers: the contract, identity by source, weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import small_caches, small_run
from support.stage_runs import from_cache, live, losses, training_job
from transformers import AutoConfig, AutoModel

from cache.store import open_store
from eupe import by_path
from eupe.encoders import Encoder, shapes
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.teachers import load_teacher
from eupe.weights import digest, load_state_dict
from pipelines.recipe.config import Recipe, TeacherConfig
from pipelines.recipe.named import by_name
from pipelines.recipe.override import override
from pipelines.recipe.stores import open_stores, store_specs

PATIENCE_SECONDS = 300

PAGE = Path(__file__).resolve().parents[1] / "docs/extending.md"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "intermediate_size": 48,
}


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the page's own network where it is imported from."""
    source = PAGE.read_text().partition("```python\n# my_networks.py\n")[2].partition("```")[0]
    assert "class Cells" in source
    file = tmp_path / "my_networks.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return file


def mine(**fields: object) -> EncoderSpec:
    return EncoderSpec(architecture="python:my_networks:cells", **fields)


def test_the_pages_network_gives_its_tokens():
    encoder = Encoder(mine(model_arguments={"width": 8}), seed=2)
    pixels = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    summary, patches = encoder(pixels)
    x = (pixels / 255 - torch.tensor(encoder.spec.pixel_mean).view(3, 1, 1)) / torch.tensor(
        encoder.spec.pixel_std
    ).view(3, 1, 1)
    wanted = torch.tanh(encoder.network.cells(x)).permute(0, 2, 3, 1)
    assert torch.allclose(patches, wanted, atol=1e-5)
    assert torch.equal(summary, patches.amax((1, 2)))
    assert shapes(encoder.spec, 96) == ((6, 6), 8, 8)
    assert encoder.native_resolution == 64
    mean = Encoder(mine(summary="mean_patches"), seed=2)(pixels)
    assert torch.equal(mean.summary, mean.patches.flatten(1, 2).mean(1))


def test_the_source_is_identity(networks: Path):
    first = mine()
    assert first.library == "python"
    assert first.architecture.startswith("python:my_networks:cells@")
    assert mine() == first
    assert EncoderSpec.model_validate_json(first.model_dump_json()) == first
    networks.write_text(networks.read_text() + "\n# another line\n")
    other = mine()
    assert other.fingerprint() != first.fingerprint()
    with pytest.raises(BadInput, match="of another source are another network's"):
        Encoder(first)
    Encoder(other)


def test_a_store_of_features_opens_where_the_network_is_not(tmp_path: Path):
    text = mine().model_dump_json()
    code = (
        "import sys; from eupe.spec import EncoderSpec; "
        "print(EncoderSpec.model_validate_json(sys.argv[1]).architecture, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, text],
        capture_output=True,
        text=True,
        cwd=PAGE.parents[1],
        timeout=PATIENCE_SECONDS,
    )
    assert done.stdout.split() == [mine().architecture, "False"], done.stderr


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("python:my_networks", "wants python:<package.module>:<function>"),
        ("python:my_networks:cells@12", "wants python:<package.module>:<function>"),
        ("python:no_such_module:cells", "no such module; install it"),
        ("python:no_such.module:cells", "No module named 'no_such'"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(architecture: str, said: str):
    with pytest.raises(ValueError, match=said):
        EncoderSpec(architecture=architecture)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("def cells(): return 3", "gives a int: wants a torch.nn.Module"),
        ("def cells(): return nn.Conv2d(3, 8, 16, 16)", "gives a Conv2d: wants"),
        ("def cells(width): return 3", "refuses {}"),
        ("def others(): return 3", "has no attribute 'cells'"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
    ],
)
def test_a_function_that_does_not_keep_the_contract_is_refused(
    networks: Path, function: str, said: str
):
    networks.write_text(f"from torch import nn\n{function}\n")
    with pytest.raises(BadInput, match=said):
        Encoder(mine())


@pytest.mark.parametrize("gives", ["x", "(x, x)", "(x.mean((1, 2, 3)), x)", "None"])
def test_tokens_of_other_shapes_are_refused(networks: Path, gives: str):
    text = networks.read_text().replace("return patches.amax((1, 2)), patches", f"return {gives}")
    networks.write_text(text)
    with pytest.raises(BadInput, match=r"summary \[B, D\], patches \[B, H, W, D2\]"):
        shapes(mine(), 64)


def test_resolutions_and_layers_it_has_not_are_refused(networks: Path):
    with pytest.raises(BadInput, match="wants a multiple of its step, 16"):
        Encoder(mine()).check_resolution(40)
    with pytest.raises(BadInput, match="returns the patches that are meant"):
        Encoder(mine(layer=1)).check_resolution(64)
    networks.write_text(networks.read_text().replace("64, 16", "64, 0"))
    with pytest.raises(BadInput, match="it takes 64 px only"):
        Encoder(mine()).check_resolution(80)


def test_it_is_cached_and_taught_from(tmp_path: Path):
    """docs/extending.md, followed: the page's network as a teacher, cached and live alike."""
    changes = ["stages.stage2.steps=2", "stages.stage2.log_every=1"]
    run = override(small_run.recipe(tmp_path), [*changes, "stages.stage2.evaluate_every=null"])
    teacher = TeacherConfig(
        name="mine", encoder=mine(), weights="random:3", resolutions=(64,), codec="float32"
    )
    update = {"teachers": ("mine",), "teacher_resolutions": {"mine": (64,)}}
    stage = run.stage("stage2").model_copy(update=update)
    taught = Recipe.model_validate(
        {**dict(run), "teachers": by_name(teacher), "stages": by_name(stage)}
    )
    small_run.build(taught, tmp_path)
    cached = from_cache(taught, stage, tmp_path / "cached")
    given = live(taught, stage, small_caches.COMPUTE_BATCH)
    assert cached == losses(taught, stage, given, tmp_path / "live")
    job = training_job(taught, stage)
    (spec,) = store_specs(job)
    assert spec.teacher.encoder.architecture == mine().architecture
    assert open_store(job.root, spec).spec == open_stores(job)[0].spec == spec


def hugging_face(kind: str, summary: str = "class_token", **arguments: object) -> EncoderSpec:
    return EncoderSpec(
        library="transformers", architecture=kind, summary=summary, model_arguments=arguments
    )


@pytest.mark.parametrize("kind", ["dinov2", "vit", "dinov3_vit", "siglip_vision_model"])
def test_a_vision_transformer_gives_its_own_tokens(kind: str):
    own = {k: v for k, v in SMALL.items() if k != "intermediate_size" or kind != "dinov2"}
    summary = "attention_pool" if kind.startswith("siglip") else "class_token"
    encoder = Encoder(hugging_face(kind, summary, **own), seed=1).eval()
    pixels = torch.rand(2, 3, 64, 64) * 255
    found = encoder(pixels)
    x = pixels * encoder.pixel_scale + encoder.pixel_offset
    output = encoder.network(pixel_values=x)
    last = output.last_hidden_state
    assert torch.equal(found.patches.flatten(1, 2), last[:, -16:])
    wanted = output.pooler_output if summary == "attention_pool" else last[:, 0]
    assert torch.equal(found.summary, wanted)
    assert encoder.grid(96) == (6, 6)
    assert encoder(torch.rand(1, 3, 96, 96)).patches.shape == (1, 6, 6, 32)
    with pytest.raises(BadInput, match="wants a multiple of its step, 16"):
        encoder.check_resolution(40)


def test_a_block_of_it_is_a_layer():
    spec = hugging_face("dinov2", **{k: v for k, v in SMALL.items() if "intermediate" not in k})
    pixels = torch.rand(2, 3, 64, 64) * 255
    encoder = Encoder(spec.model_copy(update={"layer": 0}), seed=1).eval()
    x = pixels * encoder.pixel_scale + encoder.pixel_offset
    states = encoder.network(pixel_values=x, output_hidden_states=True).hidden_states
    assert torch.equal(encoder(pixels).patches.flatten(1, 2), states[1][:, -16:])
    with pytest.raises(BadInput, match="has no block 2: 0 to 1"):
        Encoder(spec.model_copy(update={"layer": 2})).eval()(pixels)


def test_a_cnn_of_it_gives_its_map():
    spec = hugging_face(
        "convnext", "average_pool", hidden_sizes=(8, 16, 24, 32), depths=(1, 1, 1, 1)
    )
    encoder = Encoder(spec, seed=1).eval()
    pixels = torch.rand(2, 3, 96, 96) * 255
    found = encoder(pixels)
    output = encoder.network(pixel_values=pixels * encoder.pixel_scale + encoder.pixel_offset)
    assert torch.equal(found.patches, output.last_hidden_state.permute(0, 2, 3, 1))
    assert torch.equal(found.summary, output.pooler_output)


def test_a_snapshot_is_its_weights(tmp_path: Path):
    arguments = {k: v for k, v in SMALL.items() if "intermediate" not in k}
    torch.manual_seed(3)
    network = AutoModel.from_config(AutoConfig.for_model("dinov2", **arguments)).eval()
    network.save_pretrained(tmp_path / "snapshot")
    spec, uri = hugging_face("dinov2", **arguments), f"file:{tmp_path / 'snapshot'}"
    state = load_state_dict(uri, spec)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    teacher = load_teacher("it", spec, uri)
    assert teacher.spec.weights == digest(uri, spec)
    pixels = torch.rand(2, 3, 64, 64) * 255
    x = pixels * teacher.encoder.pixel_scale + teacher.encoder.pixel_offset
    wanted = network(pixel_values=x).last_hidden_state[:, 0]
    assert torch.allclose(teacher(pixels).summary, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (hugging_face("bert"), "reads no pictures alone"),
        (hugging_face("no_such"), "has no vision model 'no_such'"),
        (hugging_face("vit", hiden_size=8), r"configuration has no \['hiden_size'\]"),
        (hugging_face("vit", "average_pool"), "has no average_pool"),
        (hugging_face("swin", "average_pool"), "do not lie on the grid"),
    ],
)
def test_what_is_no_plain_vision_model_is_refused(spec: EncoderSpec, said: str):
    with pytest.raises(BadInput, match=said):
        shapes(spec, 224)


def test_without_the_extra_a_sentence_names_it(monkeypatch: pytest.MonkeyPatch):
    find = by_path.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "transformers" else find(name)
    )
    with pytest.raises(BadInput, match=r"pip install 'eupe\[transformers\]'"):
        Encoder(hugging_face("dinov2"))
