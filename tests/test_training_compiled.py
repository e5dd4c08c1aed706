"""A compiled stage learns what a plain one does; when it is compiled, what, and how often."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import compiled_child, small_stage

from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import FAMILY
from pipelines.training import compiled


@pytest.mark.parametrize(
    ("said", "steps", "device", "wanted"),
    [
        (None, 100_000, "cuda", True),
        (None, compiled.WORTH_STEPS - 1, "cuda", False),
        (None, 100_000, "cpu", False),
        (True, 2, "cpu", True),
        (False, 100_000, "cuda", False),
    ],
)
def test_long_stages_on_cuda_are_compiled_unless_it_is_said(tmp_path, said, steps, device, wanted):
    stage = small_stage.recipe(tmp_path, steps=steps, compile=said).stage("stage2")
    assert compiled.pays(stage, torch.device(device)) is wanted


def test_without_a_compiler_what_is_asked_is_refused_and_the_default_does_without(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    stage = small_stage.recipe(tmp_path, steps=2000, compile=None).stage("stage2")
    assert not compiled.pays(stage, torch.device("cpu"))
    assert capsys.readouterr().err == ""
    assert not compiled.pays(stage, torch.device("cuda"))
    assert "stage2: torch.compile wants a C compiler" in capsys.readouterr().err
    with pytest.raises(BadInput, match="install one, name it in CC, or set compile=false"):
        compiled.pays(stage.model_copy(update={"compile": True}), torch.device("cuda"))
    (tmp_path / "gcc").touch(0o755)
    assert compiled.pays(stage, torch.device("cuda"))


@pytest.mark.parametrize("name", ["eupe_vits16", "eupe_convnext_tiny"])
def test_the_students_are_compiled_by_block(name):
    with torch.device("meta"):
        blocks = compiled.blocks(Encoder(FAMILY[name]))
    inside = {id(each) for block in blocks for each in block.modules()}
    assert len(blocks) == {"eupe_vits16": 12, "eupe_convnext_tiny": 18}[name]
    assert len(inside) > 100


def test_a_network_without_blocks_has_none():
    spec = EncoderSpec(architecture="test_resnet", summary="average_pool")
    assert compiled.blocks(Encoder(spec)) == []


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list]]:
    directory = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, str(Path(compiled_child.__file__)), str(directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_losses_are_those_of_the_plain_stage(found):
    assert len(found["plain"]["losses"]) == 6
    assert found["plain"]["graphs"] == [0] * 7
    assert found["compiled"]["losses"] == pytest.approx(found["plain"]["losses"], rel=1e-5)


@pytest.mark.slow
def test_names_in_checkpoints_are_those_of_the_plain_stage(found):
    assert found["compiled"]["names"] == found["plain"]["names"]


@pytest.mark.slow
def test_an_odd_batch_and_another_resolution_are_compiled_for_once(found):
    """Blocks with and without drop path, two heads, two losses: of each some shapes, then any."""
    graphs = found["compiled"]["graphs"]
    assert graphs[1] > 0
    assert graphs[-1] == graphs[-3]
    assert graphs[-1] < 30


@pytest.mark.slow
def test_an_evaluation_is_not_compiled(found):
    """Else every size of a held-out batch would be."""
    seen = found["compiled"]["seen"], found["plain"]["seen"]
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)


@pytest.mark.slow
def test_a_fault_in_compiling_is_raised(found):
    assert "no compiler here" in found["refused"]["said"]
