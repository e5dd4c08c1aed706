"""Anybody's pictures through a model: the table, its neighbours and map, the patches."""

import json
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from support import saved_run, small_caches, small_recipe

from eupe.errors import BadInput
from eupe.teachers import load_teacher
from eupe.views import make_view, resize
from flows.cli import main
from pipelines.recipe.config import SourceConfig
from pipelines.release import encode as encoding
from pipelines.release import explore, models, pictures
from pipelines.release.encode import encode
from pipelines.release.export import export
from pipelines.release.patches import PatchesWriter

NUM_PICTURES = 14
SAME_PICTURE = 1e-5  # cosines of float32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, emoji: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    recipe = saved_run.recipe(folder, emoji, small_recipe.vit())
    saved_run.saved(recipe)
    return recipe.directory


@pytest.fixture(scope="module")
def images(emoji: Path) -> dict[str, bytes]:
    return dict(small_caches.pictures(emoji, NUM_PICTURES))


def written(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out)


def test_a_row_is_what_the_model_gives_for_its_picture(run: Path, images, tmp_path: Path):
    source = small_caches.write_folder(tmp_path / "images", images)
    model = models.named(str(run))
    done = encode(source, model, tmp_path / "out.parquet", tmp_path / "patches", batch=4)
    table = written(done.file)
    array = zarr.open_array(tmp_path / "patches", mode="r")
    teacher = load_teacher("it", model.encoder, model.weights)
    assert len(table) == done.num_pictures == array.shape[0] == NUM_PICTURES
    by_id = {path.rpartition(".")[0]: data for path, data in images.items()}
    for number, row in enumerate(table.iter_rows(named=True)):
        view = make_view(by_id[row["sample_id"]], model.views, row["sample_id"], 0)
        features = teacher.features(resize(view.canvas, model.resolution)[None], 4)
        assert np.array_equal(np.array(row["embedding"], np.float32), features.summary[0].numpy())
        assert np.array_equal(array[number], features.patches[0].numpy())
        assert row["label"] == row["sample_id"].partition("/")[0]
    said = json.loads(pq.read_schema(done.file).metadata[b"eupe"])
    assert said["encoder"] == model.encoder.model_dump(mode="json")
    assert said["resolution"] == model.resolution
    assert dict(array.attrs)["weights"] == model.weights
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_form_of_the_same_pictures_gives_the_same_embeddings(run: Path, images, tmp_path):
    small_caches.write_folder(tmp_path / "images", images)
    small_caches.write_tar(tmp_path / "images.tar", images)
    small_caches.write_parquet(tmp_path / "images.parquet", images)
    tables = []
    for path in ("images", "images.tar", "images.parquet"):
        source = pictures.source_of(str(tmp_path / path))
        encode(source, models.named(str(run)), tmp_path / "out", batch=8)
        tables.append(written(tmp_path / "out").sort("sample_id"))
    for table in tables[1:]:
        for name in ("sample_id", "embedding"):
            assert table[name].equals(tables[0][name])
    assert "label" in tables[2].columns  # a plain column of the Parquet file


def test_neighbours_are_the_nearest_others_by_cosine():
    vectors = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    vectors[7] = 3 * vectors[3]  # the same direction
    ids, distances = encoding.neighbours(vectors, 10)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    wanted = np.sort(cosines, axis=1)[:, :-11:-1]
    assert np.abs((1 - distances) - wanted).max() < SAME_PICTURE
    assert np.abs(np.take_along_axis(cosines, ids, 1) - wanted).max() < SAME_PICTURE
    assert ids[3, 0] == 7
    assert not (ids == np.arange(50)[:, None]).any()


def test_neighbours_in_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch):
    vectors = np.random.default_rng(1).normal(size=(23, 4)).astype(np.float32)
    whole = encoding.neighbours(vectors, 5)
    monkeypatch.setattr(encoding, "SIMILARITIES", 100)
    assert np.array_equal(encoding.neighbours(vectors, 5)[0], whole[0])


@pytest.mark.parametrize(("count", "width"), [(1, 4), (2, 4), (3, 1), (12, 4)])
def test_few_pictures_have_fewer_neighbours_and_a_map(count: int, width: int):
    vectors = np.random.default_rng(2).normal(size=(count, width)).astype(np.float32)
    ids, _ = encoding.neighbours(vectors, 10)
    assert ids.shape == (count, min(10, count - 1))
    assert encoding.principal(vectors).shape == (count, 2)


def test_the_map_is_the_first_two_principal_components():
    rng = np.random.default_rng(3)
    vectors = (rng.normal(size=(80, 5)) * [5, 0.1, 2, 0.1, 0.1]).astype(np.float32)
    found = encoding.principal(vectors)
    centred = vectors - vectors.mean(0)
    for column, axis in ((0, 0), (1, 2)):
        assert abs(np.corrcoef(found[:, column], centred[:, axis])[0, 1]) > 0.98
        assert np.corrcoef(found[:, column], centred[:, axis])[0, 1] > 0  # its sign is fixed


def test_what_is_no_picture_is_left_out_and_said(run: Path, images, tmp_path: Path):
    broken = {**images, "even/empty.png": b"", "odd/cut.png": next(iter(images.values()))[:200]}
    source = small_caches.write_folder(tmp_path / "images", broken)
    done = encode(source, models.named(str(run)), tmp_path / "out", tmp_path / "patches", batch=4)
    assert {name for name, _ in done.left_out} == {"even/empty", "odd/cut"}
    assert all(why for _, why in done.left_out)
    assert len(written(done.file)) == NUM_PICTURES
    assert zarr.open_array(tmp_path / "patches", mode="r").shape[0] == NUM_PICTURES


@pytest.mark.slow
def test_a_model_is_a_run_an_export_or_a_networks_name(run: Path, images, tmp_path: Path):
    source = small_caches.write_folder(tmp_path / "images", images)
    export(run, tmp_path / "taken", images=str(tmp_path / "images"), onnx=False)
    embeddings = {}
    for name, weights in (
        (str(run), None),
        (str(tmp_path / "taken"), None),
        ("tf_efficientnet_lite0", small_caches.WEIGHTS),
        ("ViT-B-32", "random:0"),
    ):
        model = models.named(name, weights)
        done = encode(source, model, tmp_path / "out", batch=8)
        embeddings[name] = written(done.file)["embedding"]
    assert embeddings[str(run)].equals(embeddings[str(tmp_path / "taken")])
    assert embeddings["tf_efficientnet_lite0"].dtype.shape == (1280,)
    assert embeddings["ViT-B-32"].dtype.shape == (512,)


def test_a_network_is_read_as_its_weights_record_says():
    model = models.named("convnext_tiny")
    assert (model.resolution, model.views.share) == (224, 0.95)
    assert model.encoder.summary == "average_pool"
    model = models.named("ViT-B-32:openai")
    assert model.weights == "hub:openai"
    assert model.encoder.pixel_mean[0] == pytest.approx(0.48145466)
    assert models.at(model, None) == model
    with pytest.raises(BadInput, match="it takes 224 px only"):
        models.at(model, 256)


@pytest.mark.parametrize(
    ("name", "weights", "stage", "said"),
    [
        ("vit_smal_patch16_224", None, None, "did you mean 'vit_small_patch16_224'"),
        ("{run}", "random:0", None, "is a folder, which has its own"),
        ("{run}", None, "stage3", "no checkpoint of stage3"),
        ("{run}/no", None, "stage2", "there is no run directory"),
        ("{empty}", None, None, "no checkpoint of any stage"),
        ("{bad}", None, None, "is no record of an exported student"),
    ],
)
def test_what_is_no_model_is_refused(run: Path, tmp_path: Path, name, weights, stage, said):
    for folder in ("empty", "bad"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad" / models.RECORD).write_text('{"format": 1}')
    name = name.format(run=run, empty=tmp_path / "empty", bad=tmp_path / "bad")
    with pytest.raises(BadInput, match=said):
        models.named(name, weights, stage)


def eupe(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["eupe", *words])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


def test_the_command_says_what_it_wrote(run: Path, images, tmp_path, monkeypatch, capsys):
    small_caches.write_parquet(tmp_path / "images.parquet", images)
    out = str(tmp_path / "out.parquet")
    words = ("encode", str(tmp_path / "images.parquet"), "--model", str(run), "--out", out)
    assert eupe(monkeypatch, *words, "--resolution", "32", "--device", "cpu", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "file": out,
        "pictures": NUM_PICTURES,
        "width": 32,
        "left_out": {},
        "aside": [],
        "patches": None,
    }


def test_bad_input_is_one_sentence(run: Path, images, tmp_path: Path, monkeypatch, capsys):
    small_caches.write_parquet(tmp_path / "images.parquet", images)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    there, model, out = str(tmp_path / "images.parquet"), str(run), str(tmp_path / "out")
    for words, said in (
        (("no", "--model", model), "no such folder"),
        ((str(tmp_path / "full"), "--model", model), "no image in this folder"),
        ((there, "--model", "no"), "no model 'no'"),
        ((there, "--model", model, "--resolution", "50"), "wants a multiple of its patch"),
        ((there, "--model", model, "--image-column", "picture"), "no column 'picture'"),
        (
            (str(tmp_path / "full"), "--model", model, "--key-column", "id"),
            "is for parquet sources",
        ),
        ((there, "--model", model, "--patches", str(tmp_path / "full")), "something is there"),
        ((there, "--model", model, "--device", "quantum"), "--device quantum"),
    ):
        assert eupe(monkeypatch, "encode", *words, "--out", out) == 2, words
        printed = capsys.readouterr().err.strip().splitlines()
        assert said in printed[-1]
    assert (tmp_path / "full" / "mine").exists()
    assert not Path(out).exists()


def test_values_that_are_not_finite_are_refused(run: Path, images, tmp_path: Path, monkeypatch):
    source = small_caches.write_folder(tmp_path / "images", images)
    model = models.named(str(run))

    def broken(*arguments: object, **named: object):
        teacher = load_teacher(*arguments, **named)
        with torch.no_grad():
            teacher.encoder.network.norm.weight.fill_(torch.nan)
        return teacher

    monkeypatch.setattr(encoding, "load_teacher", broken)
    with pytest.raises(BadInput, match="values that are not finite"):
        encode(source, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("counts", [(3, 3, 3), (8,), (1, 11), (4, 4)])
def test_patches_in_any_portions_are_one_array(tmp_path: Path, counts: tuple[int, ...]):
    rows = np.random.default_rng(0).normal(size=(sum(counts), 2, 3, 4)).astype(np.float32)
    start = 0
    with PatchesWriter(tmp_path / "a", (2, 3, 4), 4, {"by": "me"}) as writer:
        for count in counts:
            writer.append(rows[start : start + count])
            start += count
    array = zarr.open_array(tmp_path / "a", mode="r")
    assert np.array_equal(array[:], rows)
    assert array.metadata.dimension_names == ("picture", "row", "column", "channel")
    assert dict(array.attrs) == {"by": "me"}


def test_patches_that_were_cut_short_are_no_array(tmp_path: Path):
    def fail() -> None:
        with PatchesWriter(tmp_path / "a", (1, 1, 1), 2, {}) as writer:
            writer.append(np.zeros((3, 1, 1, 1), np.float32))
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert not (tmp_path / "a" / "zarr.json").exists()


def test_explore_wants_a_table_of_ours_and_the_extra(run: Path, images, tmp_path, monkeypatch):
    pl.DataFrame({"x": [1.0]}).write_parquet(tmp_path / "other.parquet")
    with pytest.raises(BadInput, match=r"no column \['y', 'neighbours'\]"):
        explore.check(tmp_path / "other.parquet")
    with pytest.raises(BadInput, match="no Parquet file"):
        explore.check(tmp_path / "no.parquet")
    source = small_caches.write_folder(tmp_path / "images", images)
    encode(source, models.named(str(run)), tmp_path / "out.parquet")
    monkeypatch.setattr(explore, "PACKAGE", "no_such_package")
    with pytest.raises(BadInput, match="pip install 'eupe"):
        explore.check(tmp_path / "out.parquet")


ATLAS = """
import http.server, sys
words = sys.argv
host, port = words[words.index("--host") + 1], int(words[words.index("--port") + 1])
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"page" if self.path == "/" else open(words[1], "rb").read())
    def log_message(self, *rest):
        sys.stderr.write("more than a pipe holds, " * 10_000)
def main():
    http.server.HTTPServer((host, port), Page).serve_forever()
"""


def test_explore_serves_answers_and_ends(run: Path, images, tmp_path, monkeypatch, capsys):
    """With a stand-in of embedding-atlas, which is not among the developers' packages."""
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "__init__.py").touch()
    (tmp_path / "atlas" / "cli.py").write_text(ATLAS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(explore, "PACKAGE", "atlas")
    source = small_caches.write_folder(tmp_path / "images", images)
    encode(source, models.named(str(run)), tmp_path / "out.parquet")
    assert eupe(monkeypatch, "explore", str(tmp_path / "out.parquet"), "--check") == 0
    said = capsys.readouterr().out
    assert f"a table of {(tmp_path / 'out.parquet').stat().st_size} bytes" in said
    address = said.partition("http://")[2].split()[0]
    with pytest.raises(OSError, match=r"refused"):
        explore.ask(f"http://{address}")


def test_an_atlas_that_ends_at_once_says_why(run: Path, images, tmp_path, monkeypatch):
    (tmp_path / "atlas").mkdir()
    (tmp_path / "atlas" / "__init__.py").touch()
    (tmp_path / "atlas" / "cli.py").write_text("raise SystemExit('no such option')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(explore, "PACKAGE", "atlas")
    source = small_caches.write_folder(tmp_path / "images", images)
    encode(source, models.named(str(run)), tmp_path / "out.parquet")
    with (
        pytest.raises(RuntimeError, match="no such option"),
        explore.served(tmp_path / "out.parquet"),
    ):
        raise AssertionError("it was served")


def test_a_source_is_what_its_path_says(tmp_path: Path, images):
    small_caches.write_folder(tmp_path / "folder", images)
    assert pictures.source_of(str(tmp_path / "folder")) == SourceConfig(
        kind="folder", path=str(tmp_path / "folder")
    )
    (tmp_path / "tars").mkdir()
    small_caches.write_tar(tmp_path / "tars" / "a.tar", images)
    assert pictures.source_of(str(tmp_path / "tars")).kind == "webdataset"
    assert pictures.source_of(str(tmp_path / "tars" / "*.tar")).kind == "webdataset"
