"""Working a sweep: once and never again, by many processes, through failures and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from support import toy_sweep
from typer.testing import CliRunner

from eupe.errors import BadInput
from eupe.teachers import Teacher
from flows.cli import app
from pipelines.caching import precompute
from pipelines.machines.interrupt import Terminated
from pipelines.recipe import recipes
from pipelines.sweeps import describe, page, results, work
from pipelines.sweeps.work import Done
from pipelines.training import loop

pytestmark = pytest.mark.slow
PATIENCE_SECONDS = 400


@pytest.fixture
def toys(monkeypatch):
    """Return what installs the toy recipe below a folder, in this process."""
    monkeypatch.setattr(precompute, "extractors", precompute.extractors)
    monkeypatch.setattr(recipes, "RECIPES", dict(recipes.RECIPES))
    return toy_sweep.install


@pytest.fixture
def idle(monkeypatch):
    """Let teachers and training raise."""

    def refuse(*arguments, **named):
        raise AssertionError("something is computed")

    def go() -> None:
        monkeypatch.setattr(Teacher, "forward", refuse)
        monkeypatch.setattr(loop._Run, "_step", refuse)

    return go


@pytest.fixture(scope="module")
def worked(tmp_path_factory) -> Path:
    """A folder in which the toy sweep is worked to its end, by one process."""
    folder = tmp_path_factory.mktemp("sweep")
    child(folder, toy_sweep.sweep(folder)).communicate(timeout=PATIENCE_SECONDS)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pl.DataFrame:
    """The figures of a sweep over widths, worked by one process."""
    folder = tmp_path_factory.mktemp("widths")
    child(folder, widths(folder)).communicate(timeout=PATIENCE_SECONDS)
    return figures(folder)


def widths(folder: Path) -> Path:
    """Write a sweep of three runs of one stage each."""
    return toy_sweep.sweep(folder, axes={"width": toy_sweep.WIDTHS})


def child(folder: Path, sweep: Path, **names: str) -> "subprocess.Popen[str]":
    """Start a process that works a sweep."""
    environment = {**os.environ, "COUNT": str(folder / "computed.txt"), **names}
    return subprocess.Popen(
        [sys.executable, "-m", "support.toy_sweep", str(folder), str(sweep)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(path: Path) -> Done:
    return work.work(work.prepare(toy_sweep.asked(path)))


def figures(folder: Path) -> pl.DataFrame:
    return pl.read_parquet(folder / "toy_stages" / results.FILE)


def computed(folder: Path) -> Counter[str]:
    lines = (folder / "computed.txt").read_text().splitlines()
    return Counter(line.split()[0] for line in lines)


def test_a_sweep_computes_every_node_once_and_leaves_its_figures(worked):
    assert set(computed(worked).values()) == {1}
    assert len(computed(worked)) == 11  # 5 stages, 4 evaluations, experts and proxy
    found = figures(worked)
    assert found.columns == ["run", "stages", "seed", "encoder", "metric", "value", "low", "high"]
    assert found["stages"].unique().sort().to_list() == ["1-2", "1-2-3", "1-3", "2"]
    knn = found.filter(encoder="student_final", metric="knn_paper")
    assert len(knn) == 4
    for name in found["run"].unique():
        link = worked / "toy_stages" / name
        assert link.is_symlink()
        for file in ("summary.json", "report.html", "correct.parquet"):
            assert (link / file).is_file()


def test_the_same_again_computes_nothing(worked, toys, idle):
    toys(worked)
    idle()
    done = go(toy_sweep.sweep(worked))
    assert (done.computed, done.failed) == ([], {})
    assert len(done.found) == 12
    graph, found = describe.told(toy_sweep.asked(toy_sweep.sweep(worked)))
    assert {each.state for each in found} == {"reuse"}
    assert [*graph.nodes] == [*done.graph.nodes]
    assert all(each.num_bytes for each in found)


def test_the_two_ways_of_computing_nothing_are_not_asked_for_together(worked):
    path = str(toy_sweep.sweep(worked))
    asked = CliRunner().invoke(app, ["ablate", path, "--dry-run", "--table"])
    assert isinstance(asked.exception, BadInput)
    assert str(asked.exception) == "--dry-run and --table: wants one of them"
    assert not asked.stdout


def test_the_command_says_what_is_there_and_shows_the_table(worked, toys):
    toys(worked)
    path = str(toy_sweep.sweep(worked))
    told = json.loads(said(path, "--dry-run", "--json"))
    assert {each["state"] for each in told["nodes"]} == {"reuse"}
    assert (told["asked"]["stage"], told["distinct"]["stage"]) == (8, 5)
    assert told["dedupe_factor"] > 1.5
    assert "8 asked for, 5 distinct" in said(path, "--dry-run")
    shown = json.loads(said(path, "--table", "--json"))
    assert [each["versus"] is None for each in shown if each["probe"] == "linear"] == [
        True,
        False,
        False,
        False,
    ]
    assert "beside the base" in said(path, "--table")


def said(*words: str) -> str:
    """Return what `eupe ablate` prints."""
    done = CliRunner().invoke(app, ["ablate", *words])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_each_setting_is_compared_with_the_base_by_the_same_images(worked, toys):
    toys(worked)
    graph, _ = describe.told(toy_sweep.asked(toy_sweep.sweep(worked)))
    found = results.compare(graph)
    knn = {each.values["stages"]: each for each in found if each.probe == "knn_paper"}
    assert [*knn] == ["1-2-3", "1-2", "1-3", "2"]
    assert knn["1-2-3"].versus is None
    shares = figures(worked).filter(encoder="student_final", metric="knn_paper")
    own = dict(zip(shares["stages"], shares["value"], strict=True))
    for name, each in knn.items():
        assert each.share.value == pytest.approx(own[name])
        if each.versus is not None:
            assert each.versus.difference.value == pytest.approx(own[name] - own["1-2-3"])
            assert 0 < each.versus.p_value <= 1
    assert len(results.rows(found)) == len(found)


def test_the_page_shows_each_setting_beside_raw_pixels_and_the_experts(worked, tmp_path, toys):
    folder = copied(worked, tmp_path)
    toys(folder)
    graph, _ = describe.told(toy_sweep.asked(toy_sweep.sweep(folder)))
    found = results.compare(graph)
    text = page.write(graph, found).read_text()
    assert "http" not in text.replace("http://www.w3.org/", "")  # of SVG's own names
    figures_of = figures(folder)
    for encoder in ("pixels", "student_final"):
        values = figures_of.filter(encoder=encoder, metric="linear")["value"].to_list()
        for value in values:
            assert f'<td class="n">{100 * value:.1f} (' in text
    for each in found:
        assert ", ".join(each.values.values()) in text
    (table,) = text.split("<table")[1:]
    experts = [name for name in results.rivals(graph) if name.startswith("expert")]
    assert experts
    assert all(who in table for who in ("raw pixels", *experts))


def test_a_value_that_is_added_computes_only_what_is_new(worked, tmp_path, toys):
    folder = copied(worked, tmp_path)
    toys(folder)
    wide = {**toy_sweep.STAGES["1-2"], "stages.stage2.head_hidden": 16}
    more = toy_sweep.sweep(folder, axes={"stages": {**toy_sweep.STAGES, "wide": wide}})
    _, found = describe.told(toy_sweep.asked(more))
    new = [each for each in found if each.state != "reuse"]
    assert [each.node.kind for each in new] == ["stage", "evaluation"]
    assert new[0].why == "stage.head_hidden is 16, was 32"
    done = go(more)
    assert done.computed == [each.node.address for each in new]


def test_to_be_judged_otherwise_trains_nothing(worked, tmp_path, toys):
    folder = copied(worked, tmp_path)
    toys(folder)
    judged = toy_sweep.sweep(folder, set={"evaluation.k": 1})
    _, found = describe.told(toy_sweep.asked(judged))
    new = [each.node for each in found if each.state == "compute"]
    assert [node.kind for node in new] == ["evaluation"] * 4
    assert {each.why for each in found if each.why} == {"evaluation.k is 1, was 3"}


def test_what_fails_stops_only_what_is_made_from_it(tmp_path, toys, capsys):
    toys(tmp_path)
    path = toy_sweep.sweep(tmp_path)
    graph = work.prepare(toy_sweep.asked(path))

    def run(node):
        if node.output is not None and node.output.stage == "stage1":
            raise BadInput("stage 1 is on fire")
        return work.compute(node)

    done = work.work(graph, run)
    (first,) = done.failed
    assert first.startswith("stage1-")
    assert done.failed[first] == "stage 1 is on fire"
    kinds = [graph.nodes[each].kind for each in done.computed]
    assert kinds == ["caches", "stage", "evaluation"]  # of the student without a proxy
    assert set(done.stopped.values()) == {first}
    assert len(done.stopped) + 5 == len(graph.nodes)  # the other expert was cached with the first
    assert f"{first} failed: stage 1 is on fire" in capsys.readouterr().err
    _, found = describe.told(toy_sweep.asked(path))
    failed = {each.node.address: each.why for each in found if each.state == "failed"}
    assert failed == done.failed
    again = go(path)  # asked for again, it is tried again
    assert (again.failed, len(again.computed)) == ({}, len(graph.nodes) - 4)
    _, found = describe.told(toy_sweep.asked(path))
    assert {each.state for each in found} == {"reuse"}


def test_who_is_asked_to_end_begins_no_other_work_and_nothing_has_failed(tmp_path, toys):
    toys(tmp_path)
    path, begun_here = toy_sweep.sweep(tmp_path), []

    def run(node):
        begun_here.append(node)
        raise Terminated("it is saved")

    with pytest.raises(Terminated):
        work.work(work.prepare(toy_sweep.asked(path)), run)
    assert len(begun_here) == 1
    _, found = describe.told(toy_sweep.asked(path))
    assert {each.state for each in found} == {"compute"}


def test_two_processes_share_the_work(alone, tmp_path):
    both = [child(tmp_path, widths(tmp_path)) for _ in range(2)]
    said = [json.loads(each.communicate(timeout=PATIENCE_SECONDS)[0]) for each in both]
    assert [each.returncode for each in both] == [0, 0]
    assert set(said[0]["computed"]).isdisjoint(said[1]["computed"])
    assert set(computed(tmp_path).values()) == {1}  # no node twice
    assert figures(tmp_path).equals(alone)


def test_what_another_process_ends_between_the_look_and_the_lease_is_found(tmp_path, toys):
    toys(tmp_path)

    def run(node):
        assert work.compute(node)  # the other process
        return work.compute(node)

    done = work.work(work.prepare(toy_sweep.asked(widths(tmp_path))), run)
    assert (done.computed, done.failed) == ([], {})
    assert sorted(done.found) == sorted(done.graph.nodes)


def test_one_of_two_may_be_killed_at_any_moment(alone, tmp_path):
    path = widths(tmp_path)
    first = child(tmp_path, path)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "computed.txt").is_file() or len(computed(tmp_path)) < 3:
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second = child(tmp_path, path)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.wait(PATIENCE_SECONDS)
    said = json.loads(second.communicate(timeout=PATIENCE_SECONDS)[0])
    assert (second.returncode, said["failed"]) == (0, {})
    assert figures(tmp_path).equals(alone)


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a worked sweep; the recipe's paths are another folder's."""
    there = to / "copy"
    shutil.copytree(folder, there, symlinks=True)
    return there
