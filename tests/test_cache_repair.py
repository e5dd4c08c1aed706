"""What is left of a damaged root is enough to mend it; what is not, is said."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.bucket_server import NAME
from support.toy_stores import DATASET, Toy, files_under, ids, store_spec

from cache.errors import StoreError
from cache.files import place
from cache.format import layout
from cache.reader import Reader
from cache.repair import repair_root
from cache.samples import segment_files
from cache.store import Store, open_store
from cache.verify import unseen, verify_root

VIEWS = 2
CODECS = ("float16", "rot4")


@pytest.fixture(params=CODECS)
def toy(request, tmp_path: Path) -> Toy:
    """Two views of a dataset that has grown once, one sample without features."""
    toy = Toy(tmp_path / "root", codec=request.param, bad={"a/001": "no image"})
    toy.add_samples(ids(7))
    toy.add_samples(ids(7) + ids(3, "b"))
    toy.build(VIEWS)
    return toy


def values(toy: Toy, version: int | None = None) -> list[np.ndarray]:
    """Read everything that training reads of a store, opened anew."""
    store = open_store(toy.root, store_spec(toy.codec))
    reader = Reader(store, range(VIEWS), version)
    rows = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    found = [np.array(reader.sample_ids(rows))]
    for view in range(VIEWS):
        selected = reader.select(rows, view)
        found += [selected.decoded(), selected.summaries, selected.valid]
    return found


def problems(root: Path) -> list[str]:
    """Everything that verify says."""
    reports = verify_root(root, True, unseen)
    return [str(problem) for _, report in reports for problem in report.problems]


def repaired(root: Path) -> tuple[list[str], list[str]]:
    """Say what would be mended, see that nothing was; mend it; see that it was the same."""
    before = everything(root)
    said = outcome(root, write=False)
    assert everything(root) == before
    assert outcome(root, write=True) == said
    return said


def outcome(root: Path, write: bool) -> tuple[list[str], list[str]]:
    found = [mended for _, mended in repair_root(root, write, compute_batch=8)]
    return (
        [str(problem) for each in found for problem in each.mended],
        [str(problem) for each in found for problem in each.lost],
    )


def everything(root: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name != "LOCK"}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE = [Path.unlink, flip, empty]


def heads(directory: Path) -> list[Path]:
    return sorted(directory.glob("HEAD*"))


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.arrow"))


def test_a_sound_root_is_left_alone(toy):
    before = everything(toy.root)
    assert repaired(toy.root) == ([], [])
    assert everything(toy.root) == before


def of_manifest(store: Store) -> Path:
    return layout.manifest_directory(store.directory)


def of_samples(store: Store) -> Path:
    return layout.samples_directory(store.root, DATASET.name)


WHICH: dict[str, Callable[[Store], list[Path]]] = {
    "spec": lambda store: [layout.spec_file(store.directory)],
    "zarr": lambda store: [layout.zarr_file(store.directory, 1)],
    "heads": lambda store: heads(of_manifest(store)),
    "newest heads": lambda store: [of_manifest(store) / "HEAD", *heads(of_manifest(store))[-2:]],
    "heads of samples": lambda store: heads(of_samples(store)),
    "first segment": lambda store: segments(of_manifest(store))[:1],
    "last segment": lambda store: segments(of_manifest(store))[-1:],
    "segments": lambda store: segments(of_manifest(store)),
    "all that is small": lambda store: [
        layout.spec_file(store.directory),
        *of_manifest(store).iterdir(),
        *heads(of_samples(store)),
    ],
}
"""What is damaged together."""


def pairs() -> list[object]:
    """Every damage of everything, the codecs in turn: each meets each of both."""
    return [
        pytest.param(
            *(codec, which, damage),
            id=f"{codec}-{which}-{damage.__name__}",
            marks=[] if damage is flip else [pytest.mark.slow],
        )
        for (which, damage), codec in zip(
            itertools.product(WHICH, DAMAGE), itertools.cycle(CODECS), strict=False
        )
    ]


@pytest.mark.parametrize(("toy", "which", "damage"), pairs(), indirect=["toy"])
def test_what_is_damaged_is_written_anew(toy, damage, which):
    store = toy.store()
    before, data = values(toy), files_under(toy.root)
    pins = store.manifest().version
    for path in WHICH[which](store):
        damage(path)
    assert problems(toy.root)
    mended, lost = repaired(toy.root)
    assert mended
    assert lost == []
    assert problems(toy.root) == []
    for got, wanted in zip(values(toy), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
    for got, wanted in zip(values(toy, pins), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
    left = {name: content for name, content in files_under(toy.root).items() if "HEAD" not in name}
    assert left == {name: content for name, content in data.items() if "HEAD" not in name}
    assert not toy.store().todo(VIEWS)
    toy.add_samples(ids(7) + ids(3, "b") + ids(2, "c"))  # and it can be built further
    toy.build(VIEWS)
    assert problems(toy.root) == []
    assert repaired(toy.root) == ([], [])


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("named", [layout.patches_file, layout.rows_file])
def test_a_damaged_shard_alone_is_built_again(toy, damage, named):
    store = toy.store()
    before = files_under(toy.root)
    damage(named(store.directory, 1, 1))
    (problem,), lost = repaired(toy.root)
    assert lost == []
    assert "`eupe cache build` computes it again" in problem
    assert [(view, shard.shard) for view, shard in toy.store().todo(VIEWS)] == [(1, 1)]
    toy.build(VIEWS)
    assert files_under(toy.root) == before
    assert problems(toy.root) == []


def test_two_shards_that_changed_places_are_both_built_again(toy):
    store = toy.store()
    before = files_under(toy.root)
    for named in (layout.patches_file, layout.rows_file):
        one, two = (named(store.directory, view, 0) for view in (0, 1))
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    assert len(repaired(toy.root)[0]) == 2
    toy.build(VIEWS)
    assert files_under(toy.root) == before


def test_a_row_that_lies_is_no_record(toy):
    """Where no record is left, a shard tells its own: each row is compared with its crc32c."""
    store = toy.store()
    for path in layout.manifest_directory(store.directory).iterdir():
        path.unlink()
    path = layout.patches_file(store.directory, 0, 0)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    repaired(toy.root)
    assert [(view, shard.shard) for view, shard in toy.store().todo(VIEWS)] == [(0, 0)]
    toy.build(VIEWS)
    assert problems(toy.root) == []


def test_moments_are_lost_for_good_and_features_are_not(toy):
    before = values(toy)
    path = layout.moments_file(toy.store().directory)
    flip(path)
    mended, (lost,) = repaired(toy.root)
    assert mended == []
    assert f"{path}: damaged or lost, and cannot be told from stored features" in lost
    for got, wanted in zip(values(toy), before, strict=True):
        np.testing.assert_array_equal(got, wanted)
    with pytest.raises(StoreError):
        toy.store().moments()


def test_the_last_samples_are_indexed_again_and_others_are_lost(toy):
    before = files_under(toy.root)
    first, last, *_ = [path for path, _ in segment_files(toy.root, DATASET.name)]
    flip(last)
    (what,), lost = repaired(toy.root)
    assert lost == []
    assert "indexes its images again" in what
    toy.add_samples(ids(7) + ids(3, "b"))
    assert problems(toy.root) == []
    after = files_under(toy.root)
    assert {name: after[name] for name in before if "samples" not in name} == {
        name: content for name, content in before.items() if "samples" not in name
    }
    flip(first)
    lost = repaired(toy.root)[1]
    assert str(first) in lost[0]
    assert "cannot be judged: its dataset's samples are lost" in lost[1]


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_a_table_of_hashes_is_made_anew_from_the_ids(toy, damage):
    before = files_under(toy.root)
    paths = [path for path, _ in segment_files(toy.root, DATASET.name)]
    damage(paths[3])  # of the second segment
    (what,), lost = repaired(toy.root)
    assert str(paths[3]) in what
    assert lost == []
    assert problems(toy.root) == []
    after = files_under(toy.root)
    names = {name for name in before if "HEAD" not in name}
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


def test_a_store_whose_spec_nothing_tells_is_said(toy):
    store = toy.store()
    layout.spec_file(store.directory).unlink()
    for view in range(VIEWS):
        layout.zarr_file(store.directory, view).unlink()
    _, lost = repaired(toy.root)
    assert lost == [
        f"{layout.spec_file(store.directory)}: damaged or lost, and no array's zarr.json says the "
        f"same; restore"
    ]


def test_a_compute_batch_that_nothing_tells_is_asked_for(toy):
    """Later builds obey it, so it is not guessed."""
    store = toy.store()
    for path in layout.manifest_directory(store.directory).iterdir():
        path.unlink()
    ((_, _), (_, found)) = repair_root(toy.root, True)
    assert "give it with --compute-batch" in str(found.lost[0])
    assert json.loads(json.dumps(outcome(toy.root, True)[1])) == []
    assert toy.store().provenance == {"compute_batch": 8}


@pytest.mark.slow
def test_a_root_in_a_bucket_is_mended_too(s3, tmp_path):
    toy = Toy(place.root(f"s3://{NAME}/{tmp_path.name}"))
    toy.add_samples(ids(7) + ids(3, "b"))
    store = toy.build(VIEWS)
    before = dict(toy.root.files_below())
    for path in (
        *WHICH["spec"](store),
        *heads(of_manifest(store)),
        *segments(of_manifest(store))[:1],
        *heads(of_samples(store)),
        layout.patches_file(store.directory, 0, 1),
    ):
        path.unlink()
    mended, lost = outcome(toy.root, write=True)
    assert lost == []
    assert len(mended) == 4
    toy.build(VIEWS)
    assert problems(toy.root) == []
    after = dict(toy.root.files_below())
    assert {name: after[name] for name in before if "manifest" not in name.parts} == {
        name: size for name, size in before.items() if "manifest" not in name.parts
    }


def test_a_head_of_another_store_is_known_by_what_it_names(tmp_path):
    """It is whole, and pins another spec.json: this store's own was taken for damaged."""
    toys = [Toy(tmp_path / codec, codec=codec) for codec in ("float16", "rot4")]
    heads = []
    for toy in toys:
        toy.add_samples(ids(7))
        store = toy.build(VIEWS)
        heads.append(layout.manifest_directory(store.directory) / layout.HEAD)
    toy = toys[0]
    wanted = everything(toy.root)
    heads[0].write_bytes(heads[1].read_bytes())
    with pytest.raises(StoreError):
        toy.build(VIEWS)
    mended, lost = repaired(toy.root)
    assert lost == []
    assert len(mended) == 1
    assert f"{heads[0]}: names no segment that is here" in mended[0]
    assert not toy.store().todo(VIEWS)
    data = [path for path in wanted if "manifest" not in Path(path).parts]
    assert all(everything(toy.root)[path] == wanted[path] for path in data)
