"""Sweeps as they are asked for: runs of axes, and a graph in which equal work is there once."""

from pathlib import Path

import pytest
import yaml

from eupe.errors import BadInput
from pipelines.caching import plan
from pipelines.caching.rates import Rates
from pipelines.recipe import addresses, recipes
from pipelines.sweeps import describe, planned
from pipelines.sweeps.file import Sweep, base, read, runs
from pipelines.sweeps.graph import expand

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    return tmp_path


def sweep(**fields: object) -> Sweep:
    return Sweep.model_validate({"name": "some", "recipe": "demo_stage2", **fields})


@pytest.mark.slow
def test_table_2_is_eight_stages_of_which_five_are_distinct_from_one_pass_of_the_teachers():
    for name in ("table2", "table2_tiny"):
        asked = runs(read(ROOT / "recipes" / "ablations" / f"{name}.yaml"))
        graph, found = describe.told([run for run in asked if run.seed == asked[0].seed])
        assert graph.count("stage") == (8, 5)
        teachers, shown = len(asked[0].recipe.teachers), {run.recipe.pixel_scales for run in asked}
        pixels = (4, len(shown)) if shown != {()} else (0, 0)
        assert graph.count("caches") == (4 * teachers + pixels[0], teachers + pixels[1])
        assert graph.count("proxy caches") == (3, 1)
        assert graph.count("evaluation") == (4, 4)
        assert {each.state for each in found} == {"compute"}
        factor = (4 * teachers + pixels[0] + 3 + 8 + 4) / (teachers + pixels[1] + 1 + 5 + 4)
        assert any(f"dedupe factor {factor:.2f}:" in x for x in describe.lines(graph, found))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_sweep_file_expands_to_runs_of_its_recipe(path):
    asked = runs(read(path))
    graph, _ = describe.told(asked)
    names = [run.name for run in asked]
    assert len({*names}) == len(names)
    assert asked[0].values == base(read(path))
    for node in graph.nodes.values():
        assert set(node.needs) <= set(graph.nodes)


def test_there_is_a_file_for_each_table_and_its_small_one():
    names = {path.stem for path in FILES}
    for table in (2, 3, 8, 9, 10):
        assert {f"table{table}", f"table{table}_tiny"} <= names


def test_runs_are_all_combinations_but_those_left_out():
    asked = runs(
        sweep(
            axes={
                "width": {"256": {}, "128": {"stages.stage2.head_hidden": 128}},
                "gamma": {
                    "one": {},
                    "none": {"stages.stage2.loss.gamma.efficientnet_lite2": 0},
                },
            },
            exclude=[{"width": "128", "gamma": "none"}],
            seeds=[0, 7],
        )
    )
    assert [run.name for run in asked] == [
        f"{setting}_seed{seed}" for setting in ("256_one", "256_none", "128_one") for seed in (0, 7)
    ]
    widths = [run.recipe.stage("stage2").head_hidden for run in asked]
    assert widths == [256, 256, 256, 256, 128, 128]
    assert [run.recipe.seed for run in asked] == [0, 7] * 3


def test_another_label_or_name_of_a_value_is_no_other_stage():
    ways = {"a": {}, "b": {"evaluation.k": 5}, "c": {"workers.loader_threads": 1}}
    graph = expand(runs(sweep(axes={"way": ways})))
    assert graph.count("stage") == (3, 1)
    assert graph.count("evaluation") == (3, 2)  # threads judge no otherwise


def test_a_set_of_teachers_leaves_the_others_out_everywhere():
    kept = {"both": {}, "one": {"teachers": ["efficientnet_lite2"]}}
    both, one = runs(sweep(axes={"teachers": kept}))
    assert [*both.recipe.teachers] == ["efficientnet_lite0", "efficientnet_lite2"]
    assert [*one.recipe.teachers] == ["efficientnet_lite2"]
    assert one.recipe.stage("stage2").teachers == ("efficientnet_lite2",)
    assert [*one.recipe.stage("stage2").teacher_resolutions] == ["efficientnet_lite2"]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"axes": {"a": {"b": {"stages.stage2.stepz": 1}}}}, "a|b.*did you mean 'steps'"),
        ({"axes": {"a": {"b": {"stages": ["stage9"]}}}}, r"stages: \['stage9'\] of"),
        ({"axes": {"a": {}}}, "axes.a has no value"),
        ({"axes": {"a": {"b c": {}}}}, "axes.a.b c"),
        ({"axes": {"a": {"b": {}}}, "exclude": [{"a": "c"}]}, "exclude names a: c"),
        ({"axes": {"a": {"b": {}}}, "seed": 1}, "seed: Extra inputs"),
        (
            {"axes": {"a": {"x": {"lanes": 1}}, "b": {"y": {"lanes": 2}}}},
            r"another axis sets \['lanes'\] too",
        ),
        ({"axes": {"a": {"x": {"seed": 1}}}}, "some: seed is not to be set: the sweep file lists"),
        ({"axes": {"a": {"x": {}}}, "set": {"seed": 1}}, "seed is not to be set"),
        ({"axes": {"a": {"x": {"stage_root": "y"}}}}, "stage_root is not to be set: runs share"),
        ("demo", "wants `recipe: NAME`"),
    ],
)
def test_a_fault_of_a_file_is_named(tmp_path, said, sentence):
    path = tmp_path / "some.yaml"
    text = {"recipe": "demo", **said} if isinstance(said, dict) else [said]
    path.write_text(yaml.safe_dump(text))
    with pytest.raises(BadInput, match=sentence):
        runs(read(path))


def test_a_seed_of_the_command_line_is_refused_and_not_dropped(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({"recipe": "demo", "axes": {"a": {"x": {}}}}))
    with pytest.raises(BadInput, match="seed is not to be set"):
        runs(read(path), ["seed=3"])
    (run,) = runs(read(path), ["run_directory=elsewhere/x"])
    assert run.recipe.directory.parts[-3:] == ("elsewhere", "some", "x_seed0")


def test_no_place_is_in_an_address(tmp_path, monkeypatch):
    axes = {"width": {"256": {}, "128": {"stages.stage2.head_hidden": 128}}}
    first = expand(runs(sweep(axes=axes)))
    monkeypatch.setenv("EUPE_HOME", str(tmp_path / "elsewhere"))
    second = expand(runs(sweep(axes=axes)))
    assert [*first.nodes] == [*second.nodes]
    monkeypatch.setattr(addresses, "samples", lambda root, dataset: None)  # none is indexed
    bucket = expand(runs(sweep(axes=axes), ["cache_root=s3://bucket/some/prefix"]))
    assert [*first.nodes] == [*bucket.nodes]


def test_weights_of_a_hub_are_not_downloaded_to_say_what_would_be_done():
    run = recipes.get("eupe_vitb16")
    assert any(each.weights.startswith("hub") for each in run.teachers.values())
    asked = runs(Sweep(name="some", recipe="eupe_vitb16", axes={}))
    _, found = describe.told(asked)
    assert found[0].why == "its weights were never read here"


def test_the_plan_of_a_sweep_counts_what_its_runs_share_once():
    asked = runs(read(ROOT / "recipes" / "ablations" / "table2_tiny.yaml"))
    graph = describe.laid_out(asked)
    found = planned.of_graph(graph, Rates(), {})
    alone = {run.values["stages"]: plan.of_recipe(run.recipe, Rates()) for run in asked}
    assert len(found.stages) == 5 < sum(len(each.stages) for each in alone.values()) == 8
    assert {*found.stages} == {node.address for node in graph.nodes.values() if node.output}
    assert found.num_bytes == alone["1-2-3"].num_bytes  # the others draw from the same stores
    train = sum(stage.train_flops for stage in found.stages.values())
    assert train < sum(s.train_flops for each in alone.values() for s in each.stages.values())


def test_the_plan_of_another_codec_or_another_proxy_is_of_other_stores(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(
        "recipe: demo\n"
        "axes: {a: {x: {}, y: {stages.stage1.steps: 6, stages.stage1.warmup_steps: 1}}}"
    )
    proxies = planned.of_graph(describe.laid_out(runs(read(path))), Rates(), {})
    one = plan.of_recipe(recipes.get("demo"), Rates())
    own = sum(store.num_bytes for store in one.stores.values() if store.teacher == "proxy")
    assert own > 0
    assert proxies.num_bytes == pytest.approx(one.num_bytes + own)
    path.write_text(
        "recipe: demo_stage2\naxes: {a: {x: {}, y: {teachers.efficientnet_lite0.codec: rot4}}}"
    )
    codecs = planned.of_graph(describe.laid_out(runs(read(path))), Rates(), {})
    plain = plan.of_recipe(recipes.get("demo_stage2"), Rates())
    assert len(codecs.stores) > len(plain.stores)
    decoded = [sum(each.images for each in found.passes.values()) for found in (codecs, plain)]
    assert decoded[0] == 2 * decoded[1]
