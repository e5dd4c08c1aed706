"""What is refused before Ray, Prefect or a picture is needed, and what a Ray is not left to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eupe.errors import BadInput
from flows.commands import recipes as command
from pipelines.caching import beforehand
from pipelines.recipe import recipes
from pipelines.training import launch

PATIENCE_SECONDS = 400
REFUSED_SECONDS = 90  # of a busy machine; ten on an idle one, where half a minute is promised
TEACHER = "teachers.efficientnet_lite0"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (f"{TEACHER}.encoder.architecture=nope", "timm has no architecture 'nope'"),
        (f"{TEACHER}.encoder.layer=7", "has no layer of stride 7"),
        (f"{TEACHER}.weights=file:nope.pth", "there is no file"),
        (f"{TEACHER}.weights=zip:x", "wants package:"),
        (f"{TEACHER}.weights=hub:nope", "wants hub:<tag> with one of"),
        (f"{TEACHER}.weights=random:x", "whole number"),
        (f"{TEACHER}.weights=sha256:x", "64 hexadecimal digits"),
        ("student.encoder.summary=attention_pool", "has no attention_pool"),
        ("student.weights=checkpoint:nope", "there is no file"),
    ],
)
def test_show_refuses_what_a_build_would_refuse(change, says):
    """And names the field."""
    field = change.partition(".encoder")[0].partition(".weights")[0]
    with pytest.raises(BadInput, match=says) as shown:
        command.show("demo", [change])
    assert str(shown.value).startswith(f"{field}: ")
    with pytest.raises(BadInput) as built:
        beforehand.check(recipes.get("demo", [change, *HERE]))
    assert str(built.value) == str(shown.value)


ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "examples/emoji/emoji.parquet"
HERE = [f"train.emoji-train.source.path={IMAGES}", f"held_out.source.path={IMAGES}"]


def test_pictures_that_are_not_there_are_said_and_no_build_begins(capsys):
    absent = ["held_out.source.path=/no/such/*.tar"]
    command.show("demo", [HERE[0], *absent])
    assert "/no/such/*.tar" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"^/no/such/\*\.tar: "):
        beforehand.check(recipes.get("demo", [HERE[0], *absent]))
    beforehand.check(recipes.get("demo", HERE))


@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_a_gpu_that_is_not_here_is_refused(tmp_path, monkeypatch):
    elsewhere = [f"run_directory={tmp_path / 'run'}"]  # a demo may have been run in this checkout
    asked = recipes.get("demo", ["workers.use_gpu=true", *HERE, *elsewhere])
    with pytest.raises(BadInput, match=r"workers\.use_gpu = true: this machine has no GPU"):
        beforehand.check(asked)
    extracting = recipes.get("demo", ["extraction.gpus_per_actor=0.5", *HERE])
    with pytest.raises(BadInput, match=r"^extraction\.gpus_per_actor = 0\.5: this machine has"):
        beforehand.check(extracting)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")  # a cluster's nodes may have some
    beforehand.check(asked)
    with pytest.raises(BadInput, match="this node has no GPU that torch sees"):
        launch.train(asked, asked.stage("stage1"))


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (
            ["extraction.gpus_per_actor=2"],
            r"^extraction\.gpus_per_actor = 2: this machine has 1 GPU",
        ),
        (
            ["workers.use_gpu=true", "workers.count=2"],
            r"^workers\.use_gpu = true and workers\.count = 2: this machine has 1 GPU that",
        ),
    ],
)
def test_more_gpus_than_are_here_are_refused(items, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(BadInput, match=says):
        beforehand.check_gpus(recipes.get("demo", items))
    beforehand.check_gpus(recipes.get("demo", ["extraction.gpus_per_actor=1"]))


@pytest.mark.ray
@pytest.mark.slow
def test_a_gpu_that_no_node_of_the_cluster_has_is_refused_before_anything_is_indexed(tmp_path):
    """At once; on a machine with GPUs this Ray is told that it has none."""
    code = (
        "import os, sys, time; from pipelines.machines import cluster\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "with cluster.connect():\n"
        "    import ray, subprocess\n"
        "    address = ray.get_runtime_context().gcs_address\n"
        "    began = time.monotonic()\n"
        "    done = subprocess.run([sys.executable, '-m', 'flows.cli', *sys.argv[1:]],\n"
        "        env=os.environ | {'RAY_ADDRESS': address}, capture_output=True, text=True)\n"
        "    print(done.returncode, time.monotonic() - began, done.stderr, sep='|')\n"
    )
    words = ["--set", "extraction.gpus_per_actor=1", "--set", f"cache_root={tmp_path / 'cache'}"]
    words += [word for item in HERE for word in ("--set", item)]
    run = subprocess.run(
        [sys.executable, "-c", code, "cache", "build", "demo", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    returned, seconds, said = run.stdout.split("|")
    assert returned == "2", said
    assert "and 1 GPUs fits no Ray node" in said
    assert float(seconds) < REFUSED_SECONDS
    assert not (tmp_path / "cache").exists()


RAY = """
from pipelines.machines import cluster
from eupe.errors import BadInput
from flows.local_stack import free_ports
import os
with cluster.connect(free_ports(1)[0]):
    import ray
    print(ray.get(ray.remote(lambda: 7).remote()))
    try:
        cluster.require_gpus(1, "workers.use_gpu = true")
    except BadInput as error:
        print(error)
    print(os.environ["RAY_TMPDIR"])
print("RAY_TMPDIR" in os.environ)
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="wants a machine without a GPU")
def test_ray_below_a_long_folder_and_asked_for_a_gpu(tmp_path):
    """A batch system's TMPDIR leaves no room for a socket's name, the dashboard's neither."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", RAY],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    answer, refused, link, after = run.stdout.splitlines()
    assert (answer, after) == ("7", "False")
    assert refused.startswith("workers.use_gpu = true: wants 1 GPUs and Ray has 0 here")
    assert (long / "ray").is_dir()  # what Ray writes lies where it was told
    assert not Path(link).parent.exists()
    assert len(link) < 40
