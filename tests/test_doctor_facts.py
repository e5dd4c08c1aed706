"""`eupe doctor` on real machines: this one, and two Ray nodes of which one is another world."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import bucket_server
from support.small_caches import pictures, write_folder, write_parquet, write_tar
from support.small_recipe import random_teacher, recipe, stage, vit
from typer.testing import CliRunner

from eupe.errors import BadInput
from flows.cli import app
from pipelines.doctor import facts, findings, node, probe
from pipelines.images import index
from pipelines.recipe.config import DatasetConfig, Recipe, SourceConfig
from pipelines.recipe.named import by_name

PATIENCE_SECONDS = 300

ROOT = Path(__file__).resolve().parents[1]
THE_MACHINES = {"disk", "shared memory", "open files"}
"""Checks whose findings depend on who runs the tests."""
WRITE = {".tar": write_tar, ".parquet": write_parquet, "": write_folder}


def small(directory: Path, emoji: Path) -> Recipe:
    """Return a recipe whose pictures are there."""
    source = write_folder(directory / "pictures", pictures(emoji, 6))
    return recipe(
        directory,
        [random_teacher("t", (32,), vit(), licence="CC0-1.0")],
        [stage({"t": (32,)}, (32,))],
        train=by_name(DatasetConfig(name="train", source=source)),
        held_out=DatasetConfig(name="held-out", source=source),
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which the demo's pictures lie, and nothing else."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_demo_has_what_it_wants_and_nothing_is_left_of_looking(home):
    """In a process of its own, as typed: no Ray is started."""
    words = [sys.executable, "-m", "flows.cli", "doctor", "demo", "--json"]
    run = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )
    said = json.loads(run.stdout)
    assert {each["check"] for each in said["findings"]} <= THE_MACHINES
    assert run.returncode == bool(said["findings"]), run.stderr
    assert said["looked_at"].endswith("data sources of demo on this machine")
    (here,) = said["machines"]
    assert len(here["weights"]["teachers.efficientnet_lite0"]) == 64
    assert said["licences"]["teacher efficientnet_lite0"] == "Apache-2.0"
    assert [path.name for path in home.iterdir()] == ["examples"]


@pytest.mark.slow
def test_faults_of_a_recipe_are_a_line_each_and_exit_code_1(home):
    (home / "damaged.safetensors").write_bytes(b"\0" * 64)
    changes = (
        "teachers.efficientnet_lite0.weights=file:absent.pth",
        "teachers.efficientnet_lite2.weights=file:damaged.safetensors",
        "teachers.efficientnet_lite2.licence=null",
        "held_out.source.path=absent",
        "num_views=10000",
        "extraction.everything=true",
    )
    words = [word for change in changes for word in ("--set", change)]
    run = CliRunner().invoke(app, ["doctor", "demo", *words])
    assert run.exit_code == 1, run.output
    lines = [line for line in run.output.splitlines() if line.split(":")[0] not in THE_MACHINES]
    wanted = (
        f"weights: this machine: teachers.efficientnet_lite0: weights 'file:{home}/absent.pth'",
        f"weights: this machine: teachers.efficientnet_lite2: weights 'file:{home}/damaged",
        "weights: teacher efficientnet_lite2: the licence of its weights is not known",
        f"data sources: this machine: emoji-test: {home}/absent: no ",
    )
    assert len(lines) == len(wanted), run.output
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines
    assert "disk: " in run.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["doctor", "dmo"], "did you mean 'demo'"),
        (["doctor", "demo", "--cluster"], "RAY_ADDRESS names no cluster"),
        (["doctor", "demo", "--gpus", "abacus"], "wants NAME:NUMBER"),
    ],
)
def test_what_cannot_be_looked_at_is_bad_input(words, says):
    raised = CliRunner().invoke(app, words).exception
    assert isinstance(raised, BadInput)
    assert says in str(raised)


def test_a_cluster_that_does_not_answer_is_found(tmp_path, emoji, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    found = findings.judge(facts.gather(small(tmp_path, emoji), True, None))
    assert [each.what for each in found if "no Ray answers there" in each.what], found


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start two nodes here; the second finds a Pillow 1.0, and has another working folder."""
    from ray.cluster_utils import Cluster

    other = tmp_path / "other"
    (other / "pillow-1.0.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: pillow\nVersion: 1.0\n"
    (other / "pillow-1.0.dist-info/METADATA").write_text(metadata)
    paths = os.pathsep.join([str(other), os.environ["PYTHONPATH"]])
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(other)
        cluster.add_node(num_cpus=2, env_vars={"PYTHONPATH": paths})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield
    cluster.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("two_nodes")
def test_of_two_nodes_the_one_that_is_another_world_is_found(tmp_path, emoji):
    """A cache root below the working folder is shared by those whose working folder it is."""
    root = "/proc/self/cwd/caches"
    asked = small(tmp_path, emoji).model_copy(update={"cache_root": root})
    gathered = facts.gather(asked, True, None)
    assert [each.weights for each in gathered.nodes] == 2 * [{"teachers.t": "random:0"}]
    found = [each for each in findings.judge(gathered) if each.check not in THE_MACHINES]
    assert [each.check for each in found] == ["nodes", "shared folders"], list(map(str, found))
    assert "pillow 1.0 (here " in found[0].what
    assert found[1].what.endswith(f"does not see what this machine writes to {root}")
    names = {each.what.partition(")")[0] for each in found}
    assert len(names & {each.name.rstrip(")") for each in gathered.nodes}) == len(names) == 1
    assert not (tmp_path / "caches").exists()


def test_reading_is_measured_and_leaves_nothing(tmp_path):
    assert probe.reading(str(tmp_path), stream_bytes=1 << 16) > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_bucket_is_read(s3, tmp_path):
    root = f"s3://{bucket_server.NAME}/probed"
    assert probe.reading(root, stream_bytes=1 << 12) > 0


@pytest.mark.parametrize("suffix", WRITE)
def test_one_picture_of_a_source_is_read(tmp_path, emoji, suffix):
    source = WRITE[suffix](tmp_path / f"images{suffix}", pictures(emoji, 3))
    index.check_readable(source.model_copy(update={"where": {"label": "no such"}}))
    none = WRITE[suffix](tmp_path / f"none{suffix}", {"a/x.png": b"no picture"})
    with pytest.raises(BadInput, match="10 bytes are in no image format"):
        index.check_readable(none)


def test_a_source_that_is_not_there_is_not_readable(tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        index.check_readable(SourceConfig(kind="folder", path=str(tmp_path / "absent")))


def test_the_example_shows_what_a_view_policy_does(tmp_path, emoji):
    """One that blurs otherwise gives other digests, and a picture one bit off too."""
    asked = small(tmp_path, emoji)
    digests = node.view_digests(asked, node.example())
    assert digests == node.view_digests(asked, node.example())
    other = asked.views.model_copy(update={"blur_probability": 1.0})
    changed = node.view_digests(asked.model_copy(update={"views": other}), node.example())
    assert changed["views"] != digests["views"]
    assert changed["held_out_views"] == digests["held_out_views"]


def test_a_token_that_others_may_read_is_exposed(tmp_path, monkeypatch):
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder.owner() == tmp_path.owner() and not folder.stat().st_mode & 0o011:
            folder.chmod(folder.stat().st_mode | 0o011)
    token = tmp_path / "token"
    token.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    for mode, exposed in ((0o600, False), (0o644, True)):
        token.chmod(mode)
        assert facts._token() == (True, str(token), True, exposed)
    tmp_path.chmod(0o700)
    assert not facts._token().exposed
