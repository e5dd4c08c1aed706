"""Bad input is one sentence and exit code 2; a bug keeps its traceback and exits 1."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache.errors import NotBuilt
from eupe import fingerprint
from flows.cli import main
from pipelines.machines.errors import bad_input, telling_whose


def raised(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_value_error_that_we_raise_is_a_sentence():
    error = raised(lambda: fingerprint.canonical_json(float("nan")))
    assert bad_input(error) == "$: nan is not finite and has no JSON form"


def test_a_store_error_is_a_sentence_wherever_it_comes_from():
    assert bad_input(NotBuilt("nothing there")) == "nothing there"


def test_a_value_error_of_a_library_is_a_bug():
    assert bad_input(raised(lambda: subprocess.Popen([], bufsize="x"))) is None
    assert bad_input(raised(lambda: int("x"))) is None


def test_a_value_error_from_c_inside_our_own_file_is_a_bug():
    # The innermost frame is ours (fingerprint.py), the error is not: str.encode raised it.
    error = raised(lambda: fingerprint.canonical_json("\ud800"))
    assert isinstance(error, ValueError)
    assert bad_input(error) is None


def test_a_floating_point_error_of_a_library_is_a_bug():
    with np.errstate(divide="raise"):
        error = raised(lambda: np.ones(1) / np.zeros(1))
    assert isinstance(error, FloatingPointError)
    assert bad_input(error) is None


def test_what_a_ray_task_raised_counts():
    class Wrapped(Exception):
        cause = NotBuilt("no shard yet")

    assert bad_input(Wrapped()) == "no shard yet"


def arrived(action) -> Exception:
    """Return the error of an action as another process gets it: without a traceback."""
    return pickle.loads(pickle.dumps(raised(telling_whose()(action))))


def test_an_error_from_another_process_is_ours_if_it_was_there():
    ours = arrived(lambda: fingerprint.canonical_json(float("nan")))
    assert bad_input(ours) == "$: nan is not finite and has no JSON form"
    assert bad_input(arrived(lambda: fingerprint.canonical_json("\ud800"))) is None
    assert bad_input(arrived(lambda: np.zeros(2) + np.zeros(3))) is None


def test_an_error_from_another_process_that_does_not_say_whose_it_is_is_a_bug():
    error = raised(lambda: fingerprint.canonical_json(float("nan")))
    assert bad_input(pickle.loads(pickle.dumps(error))) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cache", "ls", "/no/such/root"], "/no/such/root"),
        (["cache", "inspect", "/no/such/store"], "/no/such"),
        (["cache", "verify", "/no/such/root"], "/no/such/root"),
        (["cache", "build", "dmeo"], "did you mean 'demo'"),
        (["cache", "build", "demo", "--set", "stages.stage2.stepz=3"], "did you mean 'steps'"),
        (["cache", "build", "demo", "--set", "num_views=many"], "num_views"),
        (["train", "demo", "--stage", "stage9"], "stage9"),
        (["run", "dmeo"], "did you mean 'demo'"),
        (["nonsense"], "nonsense"),
    ],
)
def test_commands_answer_bad_input_with_a_sentence_and_exit_2(
    words, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["eupe", *words])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert says in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_the_installed_command_has_the_same_manners(tmp_path):
    run = subprocess.run(
        [Path(sys.executable).parent / "eupe", "cache", "build", "dmeo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "no recipe 'dmeo'; did you mean 'demo'?\n"


@pytest.mark.parametrize(
    "words", [[], ["cache"], ["cache", "build"], ["train"], ["evaluate"], ["run"]]
)
def test_every_command_explains_itself(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eupe", *words, "--help"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert "Usage" in capsys.readouterr().out
