"""What a hundred faults have shown can be lost: each kind of wrong is planted, and is counted."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from benchmarks import fault_verdicts
from benchmarks.fault_children import Ended
from benchmarks.fault_files import DAMAGES
from benchmarks.fault_kinds import KINDS, FaultNotHad, Kind, Reference, Round, Struck
from benchmarks.fault_subject import Seen
from benchmarks.fault_verdicts import Undisturbed, Verdict, run_round
from benchmarks.faults import drawn

VALUES = {"sample a": "1", "near record 0 0": "2", "near row 0 a": "3"}
FILES = {"c.0.0.0": "4"}
DAMAGED = Path("/root/view-0000/c.0.0.0")
WHOLE = {"look": Ended("done", Seen(VALUES)), "build": Ended("done"), "train": Ended("done", "x")}
NAMED = Ended("refused", words=f"{DAMAGED}: contents do not match the recorded sha256")


def verdict(
    monkeypatch: pytest.MonkeyPatch,
    struck: Struck | Callable[[Round], Struck],
    then: str = "build",
    files: Mapping[str, str] = FILES,
    stamps: Callable[[], dict[Path, int]] = dict,
    **ended: Ended,
) -> Verdict:
    """Judge a round whose children ended so, otherwise as they would undisturbed."""
    how = {**WHOLE, "problems": Ended("done", {}), "repair": Ended("done", []), **ended}
    monkeypatch.setattr(fault_verdicts, "in_child", lambda work, *_, **__: how[work.__name__])
    monkeypatch.setattr(fault_verdicts.fault_subject, "data_files", lambda root: files)
    monkeypatch.setattr(Round, "shards", lambda self: stamps())
    reference = Reference(Path("/reference"), (), 1, 1)
    work = Undisturbed(reference, Seen(VALUES), dict(FILES), "x")
    strike = struck if callable(struck) else lambda round: struck
    kind = Kind("planted", strike, then)  # type: ignore[arg-type]
    return run_round(kind, work, Round(reference, Path("/root"), random.Random(0)))


def reads(values: Mapping[str, str], **others: object) -> Ended:
    return Ended("done", Seen(dict(values), **others))  # type: ignore[arg-type]


def test_undisturbed_work_is_sound(monkeypatch):
    assert verdict(monkeypatch, Struck()).sound
    assert verdict(monkeypatch, Struck(), then="train").sound


@pytest.mark.parametrize(
    ("counted", "ended"),
    [
        ("lost_rows", {"look": reads({name: VALUES[name] for name in list(VALUES)[:2]})}),
        ("duplicate_rows", {"look": reads(VALUES, twice=1)}),
        ("silent_differences", {"look": reads({**VALUES, "near row 0 a": "other"})}),
        ("silent_differences", {"look": reads({**VALUES, "near row 0 b": "new"})}),
        ("failures", {"look": Ended("died")}),
        ("failures", {"build": Ended("failed", words="Traceback")}),
        ("failures", {"build": NAMED}),  # a process that ended damages no file
        ("failures", {"look": reads({}, refused={"": NAMED.words})}),
    ],
)
def test_what_is_wrong_after_an_end_of_a_process_is_counted(monkeypatch, counted, ended):
    found = verdict(monkeypatch, Struck(), **ended)
    assert getattr(found, counted) > 0
    assert not found.sound


def test_a_file_that_differs_and_is_not_named_is_silent(monkeypatch):
    found = verdict(monkeypatch, Struck((DAMAGED,)), files={"c.0.0.0": "other"})
    assert found.silent_differences == 1
    said = Ended("done", {str(DAMAGED): "c.0.0.0 differs"})
    found = verdict(monkeypatch, Struck((DAMAGED,)), files={"c.0.0.0": "other"}, problems=said)
    assert (found.silent_differences, found.refusals) == (0, 1)
    assert found.failures == 1  # and repair has not mended it, and says nothing


def test_a_refusal_must_name_what_was_damaged(monkeypatch):
    assert verdict(monkeypatch, Struck((DAMAGED,)), build=NAMED).failures == 1  # not mended
    elsewhere = Ended("refused", words="/root/other: contents do not match")
    found = verdict(monkeypatch, Struck((DAMAGED,)), build=elsewhere)
    assert (found.refusals, found.failures) == (0, 2)


def test_shards_that_are_computed_again_are_counted(monkeypatch):
    paths = [Path(f"view-0000/c.{number}.0.0") for number in range(4)]
    times = iter([dict.fromkeys(paths, 1), dict.fromkeys(paths, 2)])
    found = verdict(monkeypatch, Struck(), stamps=lambda: next(times))
    assert found.shards_redone == 4
    assert not found.sound
    times = iter([dict.fromkeys(paths, 1), dict.fromkeys(paths, 2)])
    found = verdict(monkeypatch, Struck(actors=2), stamps=lambda: next(times))
    assert found.shards_redone == 2
    assert found.sound


def test_other_losses_are_a_difference(monkeypatch):
    found = verdict(monkeypatch, Struck(), then="train", train=Ended("done", "y"))
    assert found.silent_differences == 1


def test_a_fault_that_did_not_happen_is_a_failure(monkeypatch):
    assert verdict(monkeypatch, Struck(broken="done: ")).failures == 1


def test_a_fault_that_could_not_be_had_is_a_failure_and_ends_no_campaign(monkeypatch):
    def strike(round: Round) -> Struck:
        raise FaultNotHad("4 shards did not come")

    found = verdict(monkeypatch, strike)
    assert (found.failures, found.said) == (1, ["4 shards did not come"])


@pytest.mark.parametrize("pattern", ["*", "a"], ids=["of many", "the only one"])
@pytest.mark.parametrize("how", sorted(DAMAGES))
def test_every_damage_changes_a_file(tmp_path, how, pattern):
    root = tmp_path / "root"
    root.mkdir()
    for name in "ab":
        (root / name).write_bytes(name.encode() * 9)
    round = Round(Reference(tmp_path, (), 1, 1), root, random.Random(0))
    damaged = DAMAGES[how](round, root / "a", pattern)
    assert root / "a" in damaged
    assert how == "deleted" or (root / "a").read_bytes() != b"a" * 9
    assert (root / "a").exists() == (how != "deleted")


def test_every_process_is_killed_and_terminated():
    for process in (
        "writer",
        "driver",
        "actor",
        "training worker",
        "one of two training workers",
        "Prefect server",
        "Ray head",
        "one of two raylets",
        "bucket, writer",
    ):
        assert {f"{process} killed", f"{process} terminated"} <= KINDS.keys(), process


def test_a_hundred_rounds_have_every_kind_and_slow_ones_once():
    chosen = drawn(list(KINDS.values()), 100, random.Random(1))
    assert len(chosen) == 100
    assert {kind.name for kind in chosen} == KINDS.keys()
    slow = [kind.name for kind in chosen if kind.slow]
    assert len(slow) == len(set(slow))
