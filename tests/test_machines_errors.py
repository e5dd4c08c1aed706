"""Bad input is one sentence and exit code 2; a bug keeps its traceback and exits 1."""

import compileall
import errno
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from cache.errors import NotBuilt
from eupe import fingerprint
from eupe.schedules import warmup_cosine
from flows import local_stack
from flows.cli import main
from pipelines import stages
from pipelines.machines import job_folder
from pipelines.machines.errors import (
    Failure,
    bad_input,
    failure,
    keeping_traceback,
    one_sentence,
)

PATIENCE_SECONDS = 300

ROOT = Path(__file__).parents[1]
NOBODY = 65534  # an account that may enter nothing of ours


def raised(action) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_bad_input_is_its_sentence():
    error = raised(lambda: fingerprint.canonical_json(float("nan")))
    assert bad_input(error) == "$: nan is not finite and has no JSON form"


def test_bad_input_may_be_caught_as_a_value_error():
    with pytest.raises(ValueError, match="not finite"):
        fingerprint.canonical_json(float("nan"))


def test_a_store_error_is_a_sentence_and_no_value_error():
    assert bad_input(NotBuilt("nothing there")) == "nothing there"
    assert not isinstance(NotBuilt("nothing there"), ValueError)


@pytest.mark.parametrize(
    "action",
    [
        lambda: int("x"),
        # A library in C, called from our own file: no frame of its own.
        lambda: fingerprint.canonical_json("\ud800"),
        # A call of ours that no input explains.
        lambda: warmup_cosine(9, steps=5, warmup_steps=0),
    ],
)
def test_any_other_value_error_is_a_bug(action):
    error = raised(action)
    assert isinstance(error, ValueError)
    assert bad_input(error) is None


def test_a_floating_point_error_is_a_bug():
    with np.errstate(divide="raise"):
        error = raised(lambda: np.ones(1) / np.zeros(1))
    assert isinstance(error, FloatingPointError)
    assert bad_input(error) is None


LONG = "x" * 300
"""A name that no file system takes: root gets a refusal for it as anybody else does."""
PATHS = [
    ["cache", "ls", LONG],
    ["cache", "inspect", LONG],
    ["cache", "verify", LONG],
    ["cache", "derive", LONG],
    ["cache", "gc", LONG],
    ["cache", "repair", LONG],
    ["cache", "drop", "emoji", "id", "--root", LONG],
    ["cache", "build", LONG],
    ["recipes", "show", LONG],
    ["plan", LONG],
    ["plan", "demo", "--prices", LONG],
    ["ablate", LONG],
    ["compare", LONG],
    ["explore", LONG],
    ["export", LONG, "--to", "folder"],
    ["encode", LONG, "--model", "vit_tiny_patch16_224", "--weights", "random:0", "--out", "file"],
    ["encode", "pictures", "--model", LONG, "--out", "file"],
    ["evaluate", "demo", "--model", LONG],
    ["report", "demo", "--set", f"run_directory={LONG}"],
    ["run", "demo", "--set", f"held_out.source.path={LONG}"],
    ["run", "demo", "--set", f"student.weights=file:{LONG}"],
    ["run", "demo", "--set", f"student.weights=checkpoint:{LONG}"],
]


@pytest.mark.slow
@pytest.mark.parametrize("path", [LONG, "taken/below"], ids=["long", "below a file"])
@pytest.mark.parametrize("words", PATHS, ids=lambda words: " ".join(words).replace(LONG, "PATH"))
def test_a_path_that_the_system_refuses_is_a_sentence(words, path, tmp_path, monkeypatch, capsys):
    """Wherever a command takes one."""
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "taken").touch()
    monkeypatch.setattr(sys, "argv", ["eupe", *(word.replace(LONG, path) for word in words)])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 2, printed.err
    assert path in printed.err
    assert {each.name for each in tmp_path.iterdir()} == {"examples", "taken"}  # nothing was begun


@pytest.mark.slow
def test_a_folder_that_this_user_may_not_enter_is_a_sentence(tmp_path):
    with tempfile.TemporaryDirectory() as name:  # nobody may enter pytest's own
        Path(name).chmod(0o755)
        closed = Path(name, "closed")
        closed.mkdir(mode=0)
        code = (
            "import os, sys; from flows import cli; import cache.listing\n"
            f"os.getuid() or os.setuid({NOBODY})\n"
            f"sys.argv = ['eupe', 'cache', 'ls', {str(closed / 'root')!r}]\n"
            "cli.main()"
        )
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    assert run.stderr == (
        f"{closed}/root: Permission denied; allow it to this user, or name another path\n"
    )
    assert run.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["run", "demo"], ["cache", "build", "demo"], ["ablate", "recipes/ablations/table2_tiny.yaml"]],
    ids=" ".join,
)
def test_a_file_where_runs_belong_is_a_sentence(words, tmp_path):
    for name in ("examples", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "runs").write_text("in the way")
    outside = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    run = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        env={**outside, "EUPE_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert f"{tmp_path}/runs: is a file, where a folder is wanted" in run.stderr
    assert (tmp_path / "runs").read_text() == "in the way"


def test_an_error_of_the_system_about_no_path_is_a_bug():
    assert bad_input(OSError(errno.EACCES, "Permission denied")) is None
    assert bad_input(OSError(errno.EIO, "Input/output error", "file")) is None


def test_what_a_ray_task_raised_counts():
    class Wrapped(Exception):
        cause = NotBuilt("no shard yet")

    assert bad_input(Wrapped()) == "no shard yet"


def arrived(action) -> Exception:
    """Return the error of an action as another process gets it: without a traceback."""
    return pickle.loads(pickle.dumps(raised(keeping_traceback()(action))))


def test_an_error_from_another_process_is_what_it_was_there():
    ours = arrived(lambda: fingerprint.canonical_json(float("nan")))
    assert bad_input(ours) == "$: nan is not finite and has no JSON form"
    bug = arrived(lambda: fingerprint.canonical_json("\ud800"))
    assert bad_input(bug) is None
    assert "in canonical_json" in str(bug)
    assert bad_input(arrived(lambda: np.zeros(2) + np.zeros(3))) is None


@pytest.mark.slow
def test_bad_input_needs_no_sources(tmp_path):
    """Bytecode alone: no line of source is there to be read."""
    for room in ("eupe", "cache", "pipelines", "flows"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tmp_path, legacy=True, quiet=1)
    for source in tmp_path.rglob("*.py"):
        source.unlink()
    run = subprocess.run(
        [sys.executable, "-m", "flows.cli", "recipes", "show", "dmeo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "no recipe 'dmeo'; did you mean 'demo'?\n"


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
        (["--nonsense"], "nonsense"),
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


@pytest.mark.slow
def test_the_installed_command_has_the_same_manners(tmp_path):
    run = subprocess.run(
        [Path(sys.executable).parent / "eupe", "cache", "build", "dmeo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=PATIENCE_SECONDS,
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


def test_the_version_is_the_one_that_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eupe", "--version"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert capsys.readouterr().out == f"{metadata.version('eupe')}\n"


@pytest.mark.parametrize("stage", [stages.stage1, stages.stage2, stages.stage3])
def test_every_stage_says_what_may_be_set(stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [stage.__name__, "--help"])
    with pytest.raises(SystemExit) as left:
        stage()
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert f"Usage: {stage.__name__} " in said
    assert "--set" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--set", "seed"], "wants path.to.field=value"), (["--nonsense"], "nonsense")],
)
def test_a_stage_answers_bad_input_with_exit_2(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stage2", *words])
    with pytest.raises(SystemExit) as left:
        stages.stage2()
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert says in printed.err


def test_the_local_stack_explains_itself_and_stops_what_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    for words, says in (["--help"], "deploy"), (["down"], "down; 0 processes stopped"):
        monkeypatch.setattr(sys, "argv", ["local_stack", *words])
        with pytest.raises(SystemExit) as left:
            local_stack.main()
        assert left.value.code == 0
        assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NotBuilt("no store there"), Failure("no store there", bad_input=True)),
        (KeyError("x"), Failure("KeyError: 'x'", bad_input=False)),
    ],
)
def test_a_job_leaves_its_error_for_whoever_waits_for_it(tmp_path, monkeypatch, error, told):
    with job_folder.made(tmp_path, "job") as folder:
        assert failure(folder) is None
        monkeypatch.setenv(job_folder.VARIABLE, str(folder))
        with pytest.raises((SystemExit, KeyError)), one_sentence():
            raise error
        assert failure(folder) == told
