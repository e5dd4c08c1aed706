"""A student taken home: timm, ONNX and the released names give what the checkpoint gives."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import jaxtyping
import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file
from support import saved_run, small_recipe

from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import build_student
from eupe.weights import load_state_dict
from flows.cli import main
from pipelines.evaluation import report
from pipelines.recipe.config import Recipe
from pipelines.release import card, graph, layouts, models
from pipelines.release import export as exporting
from pipelines.release.export import Exported, export

pytestmark = pytest.mark.slow

NETWORKS = {
    "dinov3": small_recipe.vit(),
    "vit": EncoderSpec(
        architecture="vit_tiny_patch16_224",
        summary="mean_patches",
        model_arguments={"embed_dim": 32, "depth": 1, "num_heads": 2},
    ),
    "convnext": EncoderSpec(
        architecture="convnext_atto",
        summary="average_pool",
        model_arguments={"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _shapes_unchecked() -> Iterator[None]:
    """Trace what users have: a checked shape is a number, and a traced side would be one too."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", params=NETWORKS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, emoji: Path):
    folder = tmp_path_factory.mktemp(request.param)
    found = saved_run.recipe(folder, emoji, NETWORKS[request.param])
    saved_run.saved(found)
    return found


@pytest.fixture(scope="module")
def exported(run: Recipe) -> Exported:
    return export(run.directory, run.directory.parent / "taken")


@pytest.fixture
def student(run: Recipe) -> Encoder:
    model = models.of_run("", models.trained(run.directory, None))
    return build_student(model.encoder, model.weights).eval()


def test_timm_makes_the_same_network_of_the_folder(exported: Exported, student: Encoder):
    code = f"import timm; timm.create_model('local-dir:{exported.folder}')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    network = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    state = student.network.state_dict()
    assert set(network.state_dict()) == set(state)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    pixels = torch.rand(2, 3, 64, 64) * 255
    data = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        pooled, wanted = network((pixels / 255 - mean) / std), student(pixels).summary
    # Pixels are normalised in other steps here. timm's own ViT pools by its class token.
    assert exported.pooled == (student.spec.architecture != "vit_tiny_patch16_224")
    assert torch.allclose(pooled, wanted, atol=1e-5) == exported.pooled
    card = (exported.folder / "README.md").read_text()
    assert ("pools otherwise" in card) != exported.pooled
    assert data["input_size"] == (3, 64, 64)
    assert (data["interpolation"], data["crop_pct"]) == ("bicubic", 1.0)
    record = json.loads((exported.folder / "config.json").read_text())
    assert record["num_classes"] == 0
    assert record["pretrained_cfg"]["license"] == exported.licence.licence


def test_the_graph_takes_any_batch_and_side(exported: Exported, student: Encoder):
    import onnxruntime

    onnx.checker.check_model(str(exported.folder / "model.onnx"))
    session = onnxruntime.InferenceSession(str(exported.folder / "model.onnx"))
    assert exported.graph is not None
    assert exported.graph.step == student.stride
    for batch, factor in ((1, 2), (5, 3), (2, 7)):
        side = factor * student.stride
        pixels = torch.randint(0, 256, (batch, 3, side, side)).float()
        found = session.run(["summary", "patches"], {"pixels": pixels.numpy()})
        with torch.inference_mode():
            wanted = student(pixels)
        for ours, theirs in zip(wanted, found, strict=True):
            assert theirs.shape == ours.shape
            assert np.abs(theirs - ours.numpy()).max() <= graph.TOLERANCE * max(1, ours.abs().max())


def test_positions_that_do_not_follow_the_size_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without our positions the exporter keeps the traced size's, silently: 64 px would pass."""
    monkeypatch.setattr(graph, "_symbolic_positions", lambda network: nullcontext())
    encoder = Encoder(small_recipe.vit(init_values=0.5), seed=1).eval()
    pictures = [torch.randint(0, 256, (2, 3, side, side)).float() for side in (64, 96)]
    made = graph.write(tmp_path, encoder, pictures)
    assert made.step is None
    assert made.resolutions == (64,)
    assert "differs from the student" in made.reason


def test_the_released_names_are_written_where_there_are_some(
    run: Recipe, exported: Exported, student: Encoder
):
    if run.student.encoder.architecture.startswith("vit_tiny_patch16_224"):
        assert "released files hold" in dict(exported.left_out)[layouts.RELEASED]
        assert not (exported.folder / layouts.RELEASED).exists()
        return
    released = load_file(exported.folder / layouts.RELEASED)
    assert {"storage_tokens", "downsample_layers.0.0.weight"} & set(released)
    again = Encoder(student.spec)
    uri = f"file:{exported.folder / layouts.RELEASED}"
    again.network.load_state_dict(load_state_dict(uri, student.spec))
    pixels = torch.rand(1, 3, 64, 64) * 255
    with torch.inference_mode():
        assert torch.equal(again.eval()(pixels).summary, student(pixels).summary)


def test_heads_and_normalisers_come_along(run: Recipe, exported: Exported):
    saved = models.trained(run.directory, None)
    for name, wanted in (("heads", saved.heads()), ("normalisers", saved.normalisers())):
        found = load_file(exported.folder / f"{name}.safetensors")
        assert set(found) == set(wanted)
        assert all(torch.equal(found[each], value) for each, value in wanted.items())


def test_the_folder_is_a_model_again_and_names_no_place_of_this_disk(
    run: Recipe, exported: Exported
):
    again = models.named(str(exported.folder))
    of_run = models.named(str(run.directory))
    assert again.encoder == of_run.encoder
    assert (again.views, again.resolution) == (of_run.views, of_run.resolution)
    for path in exported.folder.glob("*.[jm]*"):
        if path.suffix in (".json", ".md"):
            assert str(run.directory.parent) not in path.read_text(), path
    assert sorted(path.name for path in exported.folder.iterdir()) == sorted(dict(exported.files))
    assert all(path.stat().st_mode & 0o044 for path in exported.folder.iterdir())


def test_the_card_reads_what_a_report_writes():
    assert report.SUMMARY_FILE == card.SUMMARY


def test_the_card_says_what_it_is_and_what_it_may_be_used_for(run: Recipe, exported: Exported):
    text = (exported.folder / "README.md").read_text()
    stage = run.stage("stage2")
    for words in (
        f"{run.name}: student of stage2",
        f"step {stage.steps} of {stage.steps}",
        "teacher lite0 | tf_efficientnet_lite0 (timm)",
        "student after stage2, 64 px | knn paper 43.2 % (40.0 to 50.0)",
        "cosine to the teachers' summary | 0.700; before training 0.200; ignoring the picture 0.1",
        "Not known: the licence of teacher lite0, pictures train",
        f"license: {exported.licence.licence}",
        "local-dir:taken",
    ):
        assert words in text, words


@pytest.fixture
def small(tmp_path: Path, emoji: Path) -> Recipe:
    found = saved_run.recipe(tmp_path, emoji, NETWORKS["dinov3"])
    saved_run.saved(found)
    return found


def test_what_is_not_the_student_is_refused_and_leaves_nothing(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = layouts.write_timm

    def wrong(folder: Path, encoder: Encoder, *rest: object) -> None:
        other = Encoder(encoder.spec, seed=9).eval()
        write(folder, other, *rest)

    monkeypatch.setattr(layouts, "write_timm", wrong)
    with pytest.raises(RuntimeError, match="is not what was written"):
        export(small.directory, tmp_path / "taken", onnx=False)
    assert not [path for path in tmp_path.iterdir() if "taken" in path.name]


def test_a_graph_that_is_not_the_student_is_refused(tmp_path: Path, monkeypatch):
    encoder = Encoder(small_recipe.vit(), seed=1).eval()
    other = Encoder(small_recipe.vit(), seed=2).eval()
    trace = graph._trace
    monkeypatch.setattr(graph, "_trace", lambda path, _, *rest: trace(path, other, *rest))
    with pytest.raises(RuntimeError, match="differs from the student by"):
        graph.write(tmp_path, encoder, [torch.rand(2, 3, 64, 64) * 255])


def eupe(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["eupe", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_bad_input_is_one_sentence(small: Recipe, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    run = str(small.directory)
    for words, said in (
        ((run, "--to", str(tmp_path / "full")), "something is there"),
        ((str(tmp_path / "no"), "--to", str(tmp_path / "to")), "no such folder"),
        ((str(tmp_path / "full"), "--to", str(tmp_path / "to")), "no checkpoint of any stage"),
        ((run, "--stage", "stage3", "--to", str(tmp_path / "to")), "no checkpoint of stage3"),
        ((run, "--images", "no.parquet", "--to", str(tmp_path / "to")), "no .parquet file"),
    ):
        assert eupe(monkeypatch, "export", *words) == 2
        printed = capsys.readouterr().err.strip()
        assert said in printed
        assert len(printed.splitlines()) == 1, printed
    assert (tmp_path / "full" / "mine").exists()
    assert not (tmp_path / "to").exists()


def test_without_pictures_others_can_be_named(
    small: Recipe, tmp_path: Path, emoji: Path, monkeypatch, capsys
):
    (tmp_path / "held-out.parquet").unlink()
    to = tmp_path / "taken"
    with pytest.raises(BadInput, match="name others with --images"):
        export(small.directory, to, onnx=False)
    words = ("export", str(small.directory), "--to", str(to), "--images", str(emoji))
    assert eupe(monkeypatch, *words, "--no-onnx", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(to)
    assert set(said["files"]) == {path.name for path in to.iterdir()}
    assert said["graph"] is None


def test_an_export_that_was_killed_is_in_nobodys_way(small: Recipe, tmp_path: Path):
    left = tmp_path / ".taken.exporting"
    left.mkdir()
    (left / "half").touch()
    done = export(small.directory, tmp_path / "taken", onnx=False)
    assert "half" not in {path.name for path in done.folder.iterdir()}
    assert not left.exists()
    shutil.rmtree(done.folder)
    assert exporting.NUM_PICTURES <= saved_run.NUM_PICTURES
