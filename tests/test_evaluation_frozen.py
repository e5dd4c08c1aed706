"""One report of a run of three stages: what it opens, and what it shows beside a plain loop.

The loop below shares no code with pipelines.evaluation and pipelines.training: networks are timm's,
tokens are the stores' arrays as zarr-python reads them, weights are the checkpoints' files.
"""

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import timm
import torch
import torch.nn.functional as F
import zarr
from PIL import Image
from safetensors.torch import load_file
from support.stage_runs import PYRAMID, trained_stages

from cache.reader import Reader
from cache.store import Store
from eupe import encoders, views
from eupe.encoders import Encoder
from eupe.heads import DistillationModel
from pipelines.evaluation import during, report
from pipelines.recipe.config import PROXY, Recipe, StudentConfig
from pipelines.recipe.stores import cache_jobs, proxy_jobs
from pipelines.training import inputs, start

pytestmark = pytest.mark.slow

# Composed modules in float32 on batches of another size.
COMPOSED = 1e-4
COLOUR = 2  # of 255: the same colours, rounded


@dataclass
class Opening:
    """How often a process opened and built what: store, reader, shapes, network, checkpoint."""

    stores: Counter
    readers: Counter
    shapes: Counter
    networks: Counter
    loads: Counter

    @classmethod
    def watch(cls, patch: pytest.MonkeyPatch) -> "Opening":
        """Count from now on, of a process that has worked out no shape yet."""
        seen = cls(*(Counter() for _ in range(5)))
        encoders._shapes.cache_clear()
        encoders._weightless.cache_clear()

        def counted(owner, name, note):
            does = getattr(owner, name)

            def counting(*arguments, **named):
                note(*arguments)
                return does(*arguments, **named)

            patch.setattr(owner, name, counting)

        def shaped(encoder, spec, *rest):
            if torch.empty(0).is_meta:
                seen.shapes[spec.model_dump_json()] += 1

        def opened(store, root, spec, manifest):
            seen.stores[spec.directory()] += 1

        def built(model, network, *rest):
            seen.networks[network.spec.model_dump_json()] += 1

        def loaded(model, saved):
            seen.loads[saved.directory] += 1

        counted(Store, "__init__", opened)
        counted(Reader, "__init__", lambda _, store, *rest: seen.readers.update([store.directory]))
        counted(Encoder, "__init__", shaped)
        counted(DistillationModel, "__init__", built)
        counted(start, "load", loaded)
        return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory, emoji) -> Recipe:
    """A run of three stages, each trained from its caches."""
    return trained_stages(tmp_path_factory.mktemp("stages"), emoji)


@pytest.fixture(scope="module")
def reported(run) -> Opening:
    """The run with its report, and what making it opened."""
    with pytest.MonkeyPatch.context() as patch:
        seen = Opening.watch(patch)
        report.make(run, {})
    return seen


def test_a_report_opens_each_store_once_and_works_out_each_shape_once(run, reported):
    jobs = [*cache_jobs(run), *proxy_jobs(run)]
    wanted = sum(len(teacher.resolutions) for job in jobs for teacher in job.teachers)
    assert len(reported.stores) == wanted == 15
    assert set(reported.stores.values()) == {1}
    assert reported.readers
    assert set(reported.readers.values()) == {1}
    teachers = {teacher.encoder.model_dump_json() for job in jobs for teacher in job.teachers}
    assert set(reported.shapes) == teachers
    assert set(reported.shapes.values()) == {1}


def test_a_report_builds_each_network_and_loads_each_checkpoint_once(run, reported):
    # After each stage, and before any: stages 2 and 3 train one student, stage 1 the proxy.
    wanted = {run.student.encoder.model_dump_json(): 3, run.proxy.encoder.model_dump_json(): 2}
    assert reported.networks == wanted
    assert len(reported.loads) == len(run.stages)
    assert set(reported.loads.values()) == {1}


def test_training_and_its_hook_open_each_store_once(run, monkeypatch):
    seen = Opening.watch(monkeypatch)
    stage = run.stage("stage3")
    during.hook(run, stage, inputs.from_caches(run, stage))
    assert len(seen.stores) == 3 * len(PYRAMID)  # of training, bank and held-out set
    assert set(seen.stores.values()) == {1}
    assert not seen.networks


# The plain loop.


@dataclass
class Plain:
    """A stage's student as its files say: network, heads and normalisers."""

    network: torch.nn.Module
    heads: dict[str, torch.Tensor]
    normalisers: dict[str, torch.Tensor]


def timm_network(student: StudentConfig) -> torch.nn.Module:
    arguments = {"num_classes": 0, "dynamic_img_size": True, **student.encoder.model_arguments}
    return timm.create_model(student.encoder.architecture, **arguments).eval()


def trained(run: Recipe, name: str) -> Plain:
    stage = run.stage(name)
    (folder,) = run.stage_directory(name).glob(f"checkpoints/step-{stage.steps:08d}")
    network = timm_network(run.proxy if name == "stage1" else run.student)
    network.load_state_dict(load_file(folder / "encoder.safetensors"))
    return Plain(
        network,
        load_file(folder / "heads.safetensors"),
        load_file(folder / "normalisers.safetensors"),
    )


def untrained(run: Recipe) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        return timm_network(run.student)


def tokens(network: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return class token [n, D] and patches [n, H, W, D] of uint8 pixels [n, 3, R, R]."""
    mean, std = (torch.tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    with torch.no_grad():
        found = network.forward_features((pixels / 255 - mean[:, None, None]) / std[:, None, None])
    side = pixels.shape[-1] // 16
    return found[:, 0], found[:, network.num_prefix_tokens :].unflatten(1, (side, side))


def adapted(plain: Plain, teacher: str, kind: str, x: torch.Tensor) -> torch.Tensor:
    weights = {
        name.removeprefix(f"{teacher}.{kind}."): value
        for name, value in plain.heads.items()
        if name.startswith(f"{teacher}.{kind}.")
    }
    hidden = x @ weights["0.weight"].T
    hidden = F.layer_norm(hidden, hidden.shape[-1:], weights["1.weight"], weights["1.bias"])
    return F.gelu(hidden) @ weights["3.weight"].T


def normalised(plain: Plain, teacher: str, kind: str, x: torch.Tensor) -> torch.Tensor:
    prefix = f"{teacher}.{kind}."
    return (x - plain.normalisers[prefix + "mean"]) * plain.normalisers[prefix + "scale"]


def stored(run: Recipe, teacher: str, side: int) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return the held-out set's ids, summaries [n, D] and patches [n, H, W, D] in one store."""
    (view,) = Path(run.cache_root).glob(f"held-out/*/{teacher}-*/{side}/view-0000")
    files = sorted(view.glob("rows-*.arrow"))
    rows = [row for file in files for row in pyarrow.ipc.open_file(file).read_all().to_pylist()]
    assert all(row["valid"] for row in rows)
    patches = torch.from_numpy(zarr.open_array(str(view), mode="r")[: len(rows)])
    grid = int(patches.shape[1] ** 0.5)
    return (
        [row["sample_id"] for row in rows],
        torch.tensor([row["summary"] for row in rows]),
        patches.unflatten(1, (grid, grid)),
    )


def pictures(run: Recipe, ids: list[str], side: int) -> torch.Tensor:
    """Return the held-out images' centre views, uint8 [n, 3, R, R]."""
    rows = pq.read_table(run.held_out.source.path)["image"].to_pylist()
    found = {str(Path(row["path"]).with_suffix("")): row["bytes"] for row in rows}
    canvases = [views.make_view(found[name], run.held_out_views, name, 0).canvas for name in ids]
    resized = np.stack([views.resize(canvas, side) for canvas in canvases])
    return torch.from_numpy(resized).permute(0, 3, 1, 2)


def on_one_grid(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    side = max(a.shape[1], b.shape[1])

    def to(x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == side:
            return x
        resized = F.interpolate(x.permute(0, 3, 1, 2), (side, side), mode="bicubic")
        return resized.permute(0, 2, 3, 1)

    return to(a), to(b)


def cosines(run: Recipe, name: str, side: int) -> dict[str, float]:
    """Return a stage's mean held-out cosine to its teachers, its student reading `side` pixels."""
    plain, summaries, patches = trained(run, name), [], []
    for teacher in run.stage(name).teachers:
        configs = {config.name: config for config in run.teachers.values()}
        at = side if teacher == PROXY else max(configs[teacher].resolutions)
        ids, summary, patch = stored(run, teacher, at)
        ours, our_patches = tokens(plain.network, pictures(run, ids, side))
        summaries += F.cosine_similarity(
            adapted(plain, teacher, "summary", ours),
            normalised(plain, teacher, "summary", summary),
            dim=-1,
        ).tolist()
        pair = on_one_grid(
            adapted(plain, teacher, "patches", our_patches),
            normalised(plain, teacher, "patches", patch),
        )
        patches += F.cosine_similarity(*pair, dim=-1).mean((1, 2)).tolist()
    return {"summary": float(np.mean(summaries)), "patches": float(np.mean(patches))}


@pytest.mark.parametrize("ours", PYRAMID)
def test_the_matrix_of_stage_3_is_that_of_a_plain_loop(run, reported, ours):
    found = read_summary(run)["stage3"]["matrix"]
    assert [*found] == [str(side) for side in PYRAMID]
    plain = trained(run, "stage3")
    for its in PYRAMID:
        ids, summary, _ = stored(run, PROXY, its)
        predicted = adapted(
            plain, PROXY, "summary", tokens(plain.network, pictures(run, ids, ours))[0]
        )
        target = normalised(plain, PROXY, "summary", summary)
        wanted = float(F.cosine_similarity(predicted, target, dim=-1).mean())
        assert found[str(ours)][str(its)]["summary"] == pytest.approx(wanted, abs=COMPOSED)
    assert read_summary(run)["stage2"]["matrix"] == {}


def test_every_encoder_of_the_run_is_in_the_summary(run, reported):
    found = read_summary(run)
    sides = ["@32", "@48", ""]
    networks = ("proxy_init", "student_init", "student_stage2", "student_final")
    wanted = {f"{name}{side}" for name in (*networks, PROXY) for side in sides}
    assert {*found["encoders"]} == {"pixels", "lite0", "vit8", *wanted}
    order = list(dict.fromkeys(name.partition("@")[0] for name in found["encoders"]))
    assert order == ["pixels", "lite0", "vit8", "proxy_init", PROXY, *networks[1:]]
    assert found["encoders"]["student_final@32"]["resolution"] == 32
    assert {*found["knn_top1"]["teacher"]} == {"lite0", "vit8", PROXY}
    assert {stage: {*of} for stage, of in found["agreement"].items()} == {
        "stage1": {"lite0", "vit8"},
        "stage3": {PROXY},
    }


def read_summary(run: Recipe) -> dict:
    return json.loads((run.directory / report.SUMMARY_FILE).read_text())


@pytest.mark.parametrize(
    ("stage", "sides"), [("stage1", (48,)), ("stage2", PYRAMID), ("stage3", PYRAMID)]
)
def test_a_stages_figures_are_those_of_a_plain_loop(run, reported, stage, sides):
    found = read_summary(run)[stage]
    assert found["steps"] == run.stage(stage).steps
    assert list(found["cosine"]) == [str(side) for side in sides]
    for side in sides:
        wanted = cosines(run, stage, side)
        assert found["cosine"][str(side)] == pytest.approx(wanted, abs=COMPOSED), side
    lines = (run.stage_directory(stage) / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss/total"] for line in lines]
    assert found["loss"] == {"before": losses[0], "after": losses[-1]}


def test_the_cosine_of_the_summary_is_that_of_the_last_stage(run, reported):
    found, side = read_summary(run)["cosine"], run.evaluation.resolution
    wanted = cosines(run, "stage3", side)
    for kind, value in wanted.items():
        assert found[kind]["final"] == pytest.approx(value, abs=COMPOSED)


class Images(HTMLParser):
    """Collects the pictures of a page: alt text -> uint8 [H, W, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, np.ndarray] = {}

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "img":
            data = base64.b64decode(named["src"].partition("base64,")[2])
            self.found[named["alt"]] = np.asarray(Image.open(io.BytesIO(data)))


def colours(patches: torch.Tensor) -> np.ndarray:
    """Return the first three principal components of patches [n, H, W, D], uint8 [n, H, W, 3]."""
    flat = patches.flatten(0, 2).double().numpy()
    flat = flat - flat.mean(0)
    axes = np.linalg.svd(flat, full_matrices=False)[2][:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    low, high = np.percentile(flat @ axes.T, (1, 99), axis=0)
    shown = ((flat @ axes.T - low) / (high - low)).clip(0, 1)
    return (shown * 255).round().astype(np.uint8).reshape(*patches.shape[:3], 3)


def test_the_reports_pictures_are_those_of_a_plain_loop(run, reported):
    page = Images()
    page.feed((run.directory / report.REPORT_FILE).read_text())
    side = run.evaluation.resolution
    ids, _, patches = stored(run, PROXY, max(PYRAMID))
    pixels = pictures(run, ids, side)
    plain = trained(run, "stage3")
    # As the codec of this store, float32, keeps them; and there and back through the normaliser.
    columns = {
        "image": pixels.permute(0, 2, 3, 1).numpy(),
        **{
            f"teacher {name}": colours(stored(run, name, max(teacher.resolutions))[2].float())
            for name, teacher in run.teachers.items()
        },
        f"teacher {PROXY}": colours(patches),
        "student before": colours(tokens(untrained(run), pixels)[1]),
        "student after": colours(tokens(plain.network, pixels)[1]),
    }
    assert set(page.found) == {f"{title} of {name}" for title in columns for name in ids}
    for title, wanted in columns.items():
        for name, picture in zip(ids, wanted, strict=True):
            shown = page.found[f"{title} of {name}"]
            np.testing.assert_allclose(
                shown.astype(int), picture.astype(int), atol=COLOUR, err_msg=f"{title} of {name}"
            )
    # The comparison can tell before from after.
    gap = np.abs(columns["student before"].astype(int) - columns["student after"].astype(int))
    assert gap.max() > 10 * COLOUR
