"""`eupe cache ls | inspect | verify` on a store, whole and damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.toy_stores import DATASET, Toy, ids

from cache.format import layout

PATIENCE_SECONDS = 300

pytestmark = pytest.mark.slow

EUPE = [sys.executable, "-m", "flows.cli", "cache"]
NUM_SAMPLES, NUM_VIEWS = 6, 2
BAD = {"a/003": "patches are not finite"}


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    toy = Toy(tmp_path / "root", bad=BAD)
    toy.add_samples(ids(NUM_SAMPLES))
    toy.build(NUM_VIEWS)
    return toy


def eupe(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*EUPE, *words], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )


def test_ls_lists_what_is_there(toy):
    run = eupe("ls", str(toy.root), "--json")
    assert run.returncode == 0, run.stderr
    (line,) = json.loads(run.stdout)
    assert line["teacher"] == "toy_teacher"
    assert line["rows"] == NUM_SAMPLES * NUM_VIEWS
    assert line["invalid"] == len(BAD) * NUM_VIEWS
    assert (toy.root / line["directory"]).is_dir()
    shown = eupe("ls", str(toy.root))
    assert "toy_teacher" in shown.stdout


def test_derive_makes_a_store_that_ls_lists(toy):
    directory = str(toy.store().directory)
    run = eupe("derive", directory, "--codec", "bfloat16", "--json")
    assert run.returncode == 0, run.stderr
    made = json.loads(run.stdout)
    assert made["codec"] == "bfloat16 of float16"
    assert (made["samples"], made["shards"]) == (NUM_SAMPLES, 2 * NUM_VIEWS)
    assert len(json.loads(eupe("ls", str(toy.root), "--json").stdout)) == 2
    again = eupe("derive", directory)
    assert again.returncode == 2
    assert "give another root" in again.stderr


def test_inspect_names_the_reasons_of_invalid_rows(toy):
    directory = toy.store().directory
    run = eupe("inspect", str(directory), "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["fingerprint"] == toy.store().spec.fingerprint()
    assert found["invalid"] == {"patches are not finite": len(BAD) * NUM_VIEWS}
    assert [view["rows"] for view in found["views"]] == [NUM_SAMPLES] * NUM_VIEWS


@pytest.mark.parametrize("command", ["ls", "verify", "repair", "gc"])
def test_a_folder_in_or_above_a_root_is_no_root(toy, command):
    """Else a damaged store that is named itself would be found sound: none is there."""
    store = toy.store().directory
    for folder, sentence in (
        (store, f"lies in the cache root {toy.root}"),
        (store.parents[2], f"lies in the cache root {toy.root}"),
        (toy.root.parent, f"{toy.root} is one"),
    ):
        run = eupe(command, str(folder))
        assert run.returncode == 2, run.stdout
        assert sentence in run.stderr


def test_verify_finds_one_flipped_bit(toy):
    sound = eupe("verify", str(toy.root), "--json")
    assert sound.returncode == 0, sound.stderr
    assert json.loads(sound.stdout)["problems"] == []
    (shard, *_) = sorted(toy.store().directory.glob("view-0001/c.*.0.0"))
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    damaged = eupe("verify", str(toy.root), "--json")
    assert damaged.returncode == 1
    (problem,) = json.loads(damaged.stdout)["problems"]
    assert str(shard) in problem
    assert str(shard) in damaged.stderr
    quick = eupe("verify", str(toy.root), "--quick")
    assert quick.returncode == 0  # the size is right, and nothing else was asked


def test_verify_looks_at_everything_although_much_is_damaged(toy):
    lost = layout.spec_file(toy.store().directory)
    other = Toy(toy.root, codec="rot4").build(NUM_VIEWS)
    (shard, *_) = sorted(other.directory.glob("view-0000/c.*.0.0"))
    shard.unlink()
    lost.unlink()
    (segment, *_) = layout.samples_directory(toy.root, DATASET.name).glob("*.arrow")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    damaged = eupe("verify", str(toy.root), "--json")
    assert damaged.returncode == 1
    found = json.loads(damaged.stdout)
    assert len(found["stores"]) == 3
    assert all(each["problems"] for each in found["stores"])
    for path in (lost, segment):
        assert any(str(path) in problem for problem in found["problems"])
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    found = json.loads(eupe("verify", str(toy.root), "--json").stdout)
    assert [bool(each["problems"]) for each in found["stores"]].count(False) == 1
    assert any(str(shard) in problem for problem in found["problems"])


def test_repair_says_what_it_would_do_and_does_it_when_told(toy):
    store = toy.store()
    spec, shard = layout.spec_file(store.directory), layout.patches_file(store.directory, 0, 0)
    spec.unlink()
    shard.write_bytes(b"")
    said = eupe("repair", str(toy.root))
    assert said.returncode == 0, said.stderr
    assert "2 to mend; `--yes` does it, 0 lost for good" in said.stdout
    assert not spec.exists()
    done = eupe("repair", str(toy.root), "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["mended"]) == 2
    assert spec.exists()
    assert not shard.exists()
    toy.build(NUM_VIEWS)
    assert eupe("verify", str(toy.root)).returncode == 0
    moments = layout.moments_file(store.directory)
    moments.unlink()
    lost = eupe("repair", str(toy.root), "--yes")
    assert lost.returncode == 1
    assert str(moments) in lost.stderr


def test_gc_lists_what_killed_work_has_left_and_deletes_it_when_told(toy):
    left = layout.patches_file(toy.store().directory, 0, 9)
    left.write_bytes(b"left")
    assert json.loads(eupe("gc", str(toy.root), "--json").stdout)["files"] == []  # too young
    listed = eupe("gc", str(toy.root), "--older-than", "0")
    assert listed.returncode == 0, listed.stderr
    assert f"{left}: of a shard that was never committed, 4 bytes" in listed.stdout
    assert "1 files, 4 bytes; `--yes` deletes" in listed.stdout
    assert left.exists()
    gone = eupe("gc", str(toy.root), "--older-than", "0", "--yes", "--json")
    assert json.loads(gone.stdout)["bytes"] == 4
    assert not left.exists()
    assert eupe("verify", str(toy.root)).returncode == 0
    layout.manifest_directory(toy.store().directory).joinpath("HEAD").write_bytes(b"")
    damaged = eupe("gc", str(toy.root), "--older-than", "0", "--yes")
    assert damaged.returncode == 1
    assert "nothing of it is deleted" in damaged.stderr


def test_drop_takes_samples_out_and_names_those_it_does_not_know(toy):
    unknown = eupe("drop", DATASET.name, "a/000", "a/999", "--root", str(toy.root))
    assert unknown.returncode == 2
    assert "no sample 'a/999'" in unknown.stderr
    done = eupe("drop", DATASET.name, "a/000", "a/001", "--root", str(toy.root))
    assert done.returncode == 0, done.stderr
    assert "4 rows of 2 shards have lost their features; 2 samples of toy are dropped now" in (
        done.stdout
    )
    directory = toy.store().directory
    found = json.loads(eupe("inspect", str(directory), "--json").stdout)
    assert found["invalid"] == {"dropped": 4, "patches are not finite": 2}
    again = eupe("drop", DATASET.name, "a/000", "--root", str(toy.root), "--json")
    assert json.loads(again.stdout) == {"dropped": 2, "shards": 0, "rows": 0}
    assert eupe("verify", str(toy.root)).returncode == 0
