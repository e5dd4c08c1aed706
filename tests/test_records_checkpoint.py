"""Checkpoints: whole or absent, exact, refused when of another run, the right ones kept."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eupe.errors import BadInput
from eupe.spec import EncoderSpec
from eupe.students import build_student
from eupe.weight_files import CHECKPOINT_FILE
from eupe.weights import load_state_dict
from pipelines.records import checkpoint, whole_state
from pipelines.records.checkpoint import Contents

ENCODER = EncoderSpec(
    architecture="vit_tiny_patch16_dinov3_qkvb",
    model_arguments={"embed_dim": 32, "depth": 1, "num_heads": 2},
)


def contents(step: int, **changes: object) -> Contents:
    generator = torch.Generator().manual_seed(step)
    values = Contents(
        step=step,
        identity={"seed": 1, "stage": {"optimizer": {"lr": 0.1}}},
        pins={"noise/centre": 3},
        encoder={"weight": torch.randn(2, 3, generator=generator)},
        heads={"near.summary.0.weight": torch.ones(2)},
        normalisers={"near.summary.mean": torch.zeros(4)},
        state={"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": []}},
        recipe={"name": "small"},
    )
    return dataclasses.replace(values, **changes)


def steps(directory: Path) -> list[int]:
    return [found.step for found in checkpoint.find(directory)]


def test_what_is_saved_is_read_back(tmp_path):
    given_contents = contents(7)
    saved = checkpoint.save(tmp_path, given_contents, keep=1)
    assert saved.score is None
    saved = checkpoint.judge(tmp_path, saved, 0.25, keep=1)
    found = checkpoint.require(tmp_path)
    assert found == saved
    assert (found.step, found.score, found.pins) == (7, 0.25, {"noise/centre": 3})
    assert found.recipe == {"name": "small"}
    assert torch.equal(found.encoder()["weight"], given_contents.encoder["weight"])
    assert torch.equal(found.heads()["near.summary.0.weight"], torch.ones(2))
    assert torch.equal(found.normalisers()["near.summary.mean"], torch.zeros(4))
    assert found.state()["optimizer"]["state"][0]["step"] == 3


def test_a_checkpoint_is_a_weights_uri(tmp_path):
    student = build_student(ENCODER, seed=3)
    saved = checkpoint.save(tmp_path, contents(1, encoder=student.network.state_dict()), keep=1)
    loaded = load_state_dict(f"checkpoint:{saved.directory}", ENCODER)
    for name, value in student.network.state_dict().items():
        assert torch.equal(loaded[name], value), name


def test_no_checkpoint_is_none_and_requiring_one_says_so(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.best(tmp_path) is None
    with pytest.raises(ValueError, match="no checkpoint; train this stage first"):
        checkpoint.require(tmp_path)


@pytest.mark.slow
# it writes to a disk, which takes as long as it takes
@given(
    scores=st.lists(st.none() | st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=6),
    keep=st.integers(1, 3),
)
def test_the_newest_and_the_best_are_kept(tmp_path_factory, scores, keep):
    directory = tmp_path_factory.mktemp("kept")
    for step, score in enumerate(scores, start=1):
        saved = checkpoint.save(directory, contents(step), keep)
        if score is not None:
            checkpoint.judge(directory, saved, score, keep)
    newest = set(range(1, len(scores) + 1)[-keep:])
    known = [score for score in scores if score is not None]
    kept = set(steps(directory))
    assert newest <= kept
    assert len(kept - newest) <= 1
    champion = checkpoint.best(directory)
    assert (champion is None) == (not known)
    if champion is not None:
        assert champion.score == max(known)


def test_a_save_cut_off_anywhere_is_not_seen_and_does_not_hinder_the_next(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, contents(1), keep=2)
    for function in ("save_file", "_sync"):
        with monkeypatch.context() as patched:
            patched.setattr(checkpoint, function, stop_at_third_call())
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(tmp_path, contents(2), keep=2)
        assert steps(tmp_path) == [1]
    checkpoint.save(tmp_path, contents(2), keep=2)
    assert steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


def stop_at_third_call():
    calls = []

    def stopping(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    return stopping


@pytest.mark.parametrize("killed_while", ["saving", "judging"])
def test_a_kill_at_any_step_of_pruning_leaves_a_run_that_goes_on(
    tmp_path, monkeypatch, killed_while
):
    """The operation that is reached and all after it are not done, as under `kill -9`."""
    for reached in range(100):
        directory = tmp_path / str(reached)
        first = checkpoint.judge(directory, checkpoint.save(directory, contents(1), 1), 0.5, 1)
        second = checkpoint.save(directory, contents(2), keep=1)  # the first is the best, so kept
        assert steps(directory) == [1, 2]
        with monkeypatch.context() as patched:
            stop_at_operation(patched, reached)
            try:
                if killed_while == "saving":
                    checkpoint.save(directory, contents(3), keep=1)
                else:
                    checkpoint.judge(directory, second, 0.75, keep=1)
                finished = True
            except KeyboardInterrupt:
                finished = False
        for found in checkpoint.find(directory):  # raises if one cannot be read
            assert torch.equal(found.encoder()["weight"], contents(found.step).encoder["weight"])
            assert found.state()["optimizer"]["state"][0]["step"] == 3
        newest = checkpoint.require(directory)
        assert newest.step >= second.step
        best = checkpoint.best(directory)
        assert best is not None
        assert best.score in (first.score, 0.75)
        after = checkpoint.save(directory, contents(newest.step + 1), keep=1)
        names = {path.name for path in (directory / checkpoint.FOLDER).iterdir()}
        assert names == {best.directory.name, after.directory.name}
        if finished:
            break
    assert finished
    assert reached > 8  # renaming, syncing and the files of a folder one by one


def stop_at_operation(patched: pytest.MonkeyPatch, reached: int) -> None:
    """Raise KeyboardInterrupt instead of the operation on files of this number, from 0."""
    done = []

    def stopping(operation):
        def instead(*arguments, **options):
            if len(done) == reached:
                raise KeyboardInterrupt
            done.append(operation)
            return operation(*arguments, **options)

        return instead

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        patched.setattr(checkpoint.os, name, stopping(getattr(checkpoint.os, name)))


def test_a_saved_step_is_not_saved_again(tmp_path):
    saved = checkpoint.save(tmp_path, contents(4), keep=1)
    with pytest.raises(FileExistsError, match="step 4 is already saved"):
        checkpoint.save(tmp_path, contents(4, encoder={"weight": torch.ones(2, 3)}), keep=1)
    assert torch.equal(checkpoint.require(tmp_path).encoder()["weight"], saved.encoder()["weight"])


def test_another_run_is_refused_field_by_field(tmp_path):
    saved = checkpoint.save(tmp_path, contents(1), keep=1)
    saved.check({"seed": 1, "stage": {"optimizer": {"lr": 0.1}}})
    with pytest.raises(ValueError, match=r"seed: 2 != 1; stage\.optimizer\.lr: 0\.2 != 0\.1"):
        saved.check({"seed": 2, "stage": {"optimizer": {"lr": 0.2}}})


def test_a_long_difference_is_cut_and_counted(tmp_path):
    many = {f"field{number:02d}": 0 for number in range(20)}
    saved = checkpoint.save(tmp_path, contents(1, identity=many), keep=1)
    with pytest.raises(ValueError, match="and 8 more"):
        saved.check(dict.fromkeys(many, 1))


def test_tuples_of_a_recipe_equal_the_lists_they_become(tmp_path):
    saved = checkpoint.save(tmp_path, contents(1, identity={"scales": (1, 2)}), keep=1)
    saved.check({"scales": (1, 2)})


def test_training_state_is_never_unpickled(tmp_path):
    saved = checkpoint.save(tmp_path, contents(1), keep=1)
    target = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (target,))

    path = saved.directory / checkpoint.STATE
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match="do not match the crc32c"):
        saved.state()
    sums = {**saved.checksums, path.name: checkpoint._crc32c(path)}
    with pytest.raises(ValueError, match="is no training state"):
        dataclasses.replace(saved, checksums=sums).state()
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (checkpoint.CONFIG, b"{", "cannot be read"),
        (checkpoint.CONFIG, json.dumps({"format": 99}).encode(), "checkpoint format 99"),
        (checkpoint.CONFIG, b"[]", "checkpoint format None"),
        (checkpoint.CONFIG, b'{"format": 1}', "do not match the config_sha256"),
        (CHECKPOINT_FILE, b"short", "do not match the crc32c"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    saved = checkpoint.save(tmp_path, contents(1), keep=1)
    (saved.directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        checkpoint.require(tmp_path).encoder()
    assert str(saved.directory / name) in str(refused.value)


@pytest.mark.parametrize("name", [CHECKPOINT_FILE, "heads.safetensors", "state.pt", "config.json"])
def test_any_flipped_bit_of_a_checkpoint_is_refused_by_name(tmp_path, name):
    """Safetensors and torch.load take other weights for weights."""
    saved = checkpoint.save(tmp_path, contents(1), keep=1)
    checkpoint.judge(tmp_path, saved, 0.5, keep=1)  # its figures are checked like all others
    path = saved.directory / name
    sound = path.read_bytes()
    for bit in np.random.default_rng(3).integers(0, 8 * len(sound), 50).tolist():
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(BadInput, match=rf"{name}: (contents do not match|cannot|checkpoint)"):
            read_all(tmp_path)
    path.write_bytes(sound)
    read_all(tmp_path)


def read_all(stage_directory: Path) -> None:
    """Read every file of the newest checkpoint."""
    found = checkpoint.require(stage_directory)
    for read in (found.encoder, found.heads, found.normalisers, found.state):
        read()


@pytest.mark.parametrize("saved", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("resumed", [torch.contiguous_format, torch.channels_last])
def test_an_optimizer_goes_on_whatever_memory_format_its_moments_were_saved_in(saved, resumed):
    def made(memory_format: torch.memory_format) -> tuple[torch.nn.Module, torch.optim.AdamW]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = torch.nn.Conv2d(3, 8, 3).to(memory_format=memory_format)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.AdamW, number: int) -> None:
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        model(pixels).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    wanted, optimizer = made(saved)
    step(wanted, optimizer, 0)
    state = copy.deepcopy(whole_state.optimizer_state(wanted, optimizer))
    found, other = made(resumed)
    whole_state.load_weights(found, copy.deepcopy(wanted.state_dict()))
    whole_state.load_optimizer_state(found, other, state)
    for number in (1, 2):
        step(wanted, optimizer, number)
        step(found, other, number)
    torch.testing.assert_close(found.weight, wanted.weight, rtol=0, atol=1e-4)
