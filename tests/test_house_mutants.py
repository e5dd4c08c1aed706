"""The planted faults of tests/mutants apply to the code as it is, and name tests that exist."""

import ast
import dataclasses
from pathlib import Path

import pytest
from mutants import run
from mutants.run import Mutant

ROOT = Path(__file__).resolve().parents[1]
PLANTED = run.mutants()


def has_test(name: str) -> bool:
    """Say whether FILE::NAME is a test there, whatever its parameters."""
    path, _, test = name.partition("::")
    if not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return test.partition("[")[0] in tests


def test_there_are_faults_to_plant():
    assert len(PLANTED) >= 12
    assert len({mutant.fault for mutant in PLANTED}) == len(PLANTED)


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_fault_can_be_planted_and_names_the_tests_that_notice(mutant: Mutant):
    assert run.misfit(mutant, ROOT) is None
    assert mutant.tests
    assert [name for name in mutant.tests if not has_test(name)] == []


def test_a_patch_that_no_longer_applies_is_noticed(tmp_path):
    stale = tmp_path / "stale.patch"
    stale.write_text(PLANTED[0].path.read_text().replace("\n-", "\n-gone "))
    assert "patch" in (run.misfit(dataclasses.replace(PLANTED[0], path=stale), ROOT) or "")


@pytest.mark.parametrize(
    "name", ["tests/no_such.py::test_it", "tests/test_house_names.py::test_no"]
)
def test_a_test_that_is_gone_is_noticed(name: str):
    assert not has_test(name)


def test_a_patch_without_its_head_is_refused(tmp_path):
    (tmp_path / "mute.patch").write_text("--- a/x\n+++ b/x\n")
    with pytest.raises(ValueError, match="wants the lines"):
        run.mutants(tmp_path)
