"""Precomputing: the same features from any source, what is missing and no more, killed or not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import precompute_child
from support.small_caches import (
    POLICY,
    build,
    data_files,
    in_process,
    job,
    pictures,
    teacher,
    write_folder,
    write_parquet,
    write_tar,
)

from cache.errors import Corrupt, FingerprintMismatch, NotBuilt, StoreError
from cache.reader import Reader
from cache.shard_ranges import Missing, ShardRanges
from cache.store import find_stores, open_store
from eupe.spec import CentreView
from pipelines.caching import indexing, precompute
from pipelines.caching.tasks import VIEWS_TOGETHER, Tasks
from pipelines.machines.pool import Pool, num_that_fit
from pipelines.recipe.config import SourceConfig
from pipelines.recipe.stores import open_stores, rows_per_shard

START_SECONDS = 240.0  # Ray, torch and a teacher on a busy machine
END_SECONDS = 60.0  # Ray's processes after their driver's death


@pytest.fixture(scope="module")
def images(emoji):
    return pictures(emoji, 24)


def tokens(store, view: int = 0) -> dict[str, tuple[bytes, bytes]]:
    """sample_id -> bytes of its summary and patches."""
    reader = Reader(store, [view])
    rows = np.concatenate([np.arange(s.start, s.stop) for s in reader.shards()])
    selected = reader.select(rows, view)
    summaries, patches = selected.summaries, selected.patches()
    return {
        name: (summary.tobytes(), own.tobytes())
        for name, summary, own in zip(reader.sample_ids(rows), summaries, patches, strict=True)
    }


def cut(data: bytes) -> bytes:
    """A PNG whose header is whole and whose pixels are not."""
    return data[: len(data) // 2]


@pytest.mark.slow
def test_folder_tar_and_parquet_give_the_same_features(tmp_path, images):
    backwards = dict(reversed(images.items()))
    sources = [
        write_folder(tmp_path / "images", images),
        write_tar(tmp_path / "images.tar", images),
        write_parquet(tmp_path / "images.parquet", backwards),
    ]
    found = [
        tokens(build(job(tmp_path / f"root-{number}", source))[0])
        for number, source in enumerate(sources)
    ]
    assert len(found[0]) == len(images)
    assert found[0] == found[1] == found[2]


def test_a_build_calls_the_steps_it_is_given_in_order(tmp_path, images):
    called = []

    def told(name, step):
        def wrapped(*arguments):
            called.append(name)
            # The pool it is handed starts Ray with the first work; this one works here.
            return step(*(in_process(work) if isinstance(a, Pool) else a for a in arguments))

        return wrapped

    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    plain = vars(precompute.PLAIN)
    steps = precompute.Steps(**{name: told(name, step) for name, step in plain.items()})
    built = precompute.build([[work]], steps=steps)
    assert called == ["index_samples", "resolve_stores", "extract_missing", "verify_stores"]
    assert built.num_shards == open_stores(work)[0].manifest().total().num_shards


def test_a_build_with_nothing_to_do_touches_nothing(tmp_path, images):
    """So a complete cache that one may only read is enough to build, train and report from."""
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    precompute.verify_stores(build(work))

    def touched() -> dict[Path, tuple[int, int]]:
        paths = [work_root, *work_root.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in paths}

    work_root = Path(work.root)
    before = touched()
    stores = build(work)
    precompute.verify_stores(stores)
    assert touched() == before


def test_a_second_build_computes_nothing(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    stores = build(work)
    before = data_files(tmp_path / "root")
    assert precompute.extract_missing(work, stores).num_shards == 0  # and starts no Ray
    assert indexing.index_samples(work).num_new == 0
    assert data_files(tmp_path / "root") == before


def test_a_lost_shard_alone_is_computed_again(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images), num_views=2)
    (store,) = build(work)
    before = data_files(tmp_path / "root")
    (store.directory / "view-0001" / "c.1.0.0").unlink()
    with pytest.raises(NotBuilt, match="half built, 1 of 6 shards are missing"):
        open_stores(work)
    done = precompute.extract_missing(work, [store], in_process(work))
    assert (done.num_shards, done.num_images) == (1, 10)
    assert data_files(tmp_path / "root") == before
    assert open_stores(work)[0].spec == store.spec


def test_a_deep_build_compares_every_byte(tmp_path, images):
    """Another one looks at what is new: a bit that flipped since is found when its row is read."""
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    (store,) = build(work)
    assert precompute.build([[work]], deep=True).num_shards == 0
    damaged = store.directory / "view-0000" / "c.1.0.0"
    content = bytearray(damaged.read_bytes())
    content[9] ^= 1
    damaged.write_bytes(content)
    assert precompute.build([[work]]).num_shards == 0
    with pytest.raises(Corrupt, match=re.escape(str(damaged))):
        precompute.build([[work]], deep=True)


@pytest.mark.slow
def test_growing_adds_files_and_changes_none(tmp_path, images):
    source = write_folder(tmp_path / "images", dict(list(images.items())[:14]))
    build(job(tmp_path / "root", source))
    before = data_files(tmp_path / "root")
    write_folder(tmp_path / "images", images)
    more = job(
        tmp_path / "root", source, num_views=2, teachers=(teacher((64, 96)),), compute_batch=5
    )
    small, large = build(more)
    after = data_files(tmp_path / "root")
    sources = {path for path in set(before) - set(after) if "samples" in Path(path).parts}
    assert len(sources) == 1  # the table of what was indexed: another one is there now
    replaced = {path for path in set(before) - sources if after[path] != before[path]}
    assert {Path(path).name for path in replaced} <= {"zarr.json", "HEAD"}
    assert (small.provenance["compute_batch"], large.provenance["compute_batch"]) == (8, 5)
    # The first build's compute batch is obeyed, so what is added equals one build of everything.
    whole = job(tmp_path / "whole", source, num_views=2)
    (at_once,) = build(whole)
    for view in (0, 1):
        assert tokens(small, view) == tokens(at_once, view)


def test_an_image_that_is_cut_is_an_invalid_row(tmp_path, images):
    first = next(iter(images))
    source = write_folder(tmp_path / "images", {**images, first: cut(images[first])})
    work = job(tmp_path / "root", source, max_failure_share=0.1)
    (store,) = build(work)
    (reason,) = precompute.extract_missing(work, [store]).reasons
    assert reason.startswith(f"{Path(first).with_suffix('')}: ")
    reader = Reader(store)
    rows = np.arange(len(images))
    bad = store.samples.rows_of([str(Path(first).with_suffix(""))])
    assert set(rows[~reader.select(rows).valid]) == set(bad)
    assert "cannot be decoded" in reader.select(bad).reasons[0]
    assert np.isnan(reader.select(bad).patches()).all()
    assert np.isfinite(reader.select(np.setdiff1d(rows, bad)).patches()).all()


def test_too_many_unusable_images_fail_the_build_and_lose_nothing(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    build(work)
    before = data_files(tmp_path / "root")
    write_folder(tmp_path / "images", {"even/empty.png": b"", "even/text.png": b"text"})
    listed = tmp_path / "root/emoji/failures.jsonl"
    with pytest.raises(ValueError, match=r"2 of 26 .* max_failure_share = 0\.01 .*no bytes"):
        indexing.index_samples(work)
    assert data_files(tmp_path / "root") == before
    assert {json.loads(line)["sample_id"] for line in listed.read_text().splitlines()} == {
        "even/empty",
        "even/text",
    }


def test_too_many_invalid_rows_fail_the_build_every_time(tmp_path, images):
    spoiled = {path: cut(data) if n < 6 else data for n, (path, data) in enumerate(images.items())}
    work = job(tmp_path / "root", write_folder(tmp_path / "images", spoiled))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\d of 24 .* unusable.*cannot be decoded"):
            build(work)


def test_left_out_images_are_listed_beside_the_samples(tmp_path, images):
    source = write_folder(tmp_path / "images", {**images, "even/empty.png": b""})
    found = indexing.index_samples(job(tmp_path / "root", source, max_failure_share=0.5))
    assert found.failures["sample_id"].to_list() == ["even/empty"]
    listed = (tmp_path / "root/emoji/failures.jsonl").read_text()
    assert '"sample_id": "even/empty"' in listed
    assert "no bytes" in listed


@pytest.mark.slow
def test_another_teacher_view_or_weights_is_another_store(tmp_path, images):
    source = write_folder(tmp_path / "images", images)
    (store,) = build(job(tmp_path / "root", source))
    other = job(tmp_path / "root", source, teachers=(teacher(weights="random:1"),))
    with pytest.raises(FingerprintMismatch, match=r"teacher\.weights"):
        open_stores(other)
    build(other)
    build(job(tmp_path / "root", source, views=CentreView(canvas=64)))
    assert len(find_stores(tmp_path / "root")) == 3
    assert open_store(tmp_path / "root", store.spec).spec == store.spec


def test_moments_are_those_of_the_stored_features(tmp_path, images):
    source = write_folder(tmp_path / "images", images)
    (store,) = build(job(tmp_path / "root", source, moments_samples=1000))
    stored = (
        Reader(store).select(np.arange(len(images))).patches().reshape(-1, store.spec.patch_dim)
    )
    count, mean, scatter = store.moments()["patches"]
    assert count == len(stored)
    np.testing.assert_allclose(mean, stored.mean(0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    variance = stored.astype(np.float64).var(0)
    np.testing.assert_allclose(np.diag(scatter) / count, variance, rtol=1e-9, atol=1e-12)


def test_rows_carry_the_digest_and_parameters_of_their_view(tmp_path, images):
    source = write_folder(tmp_path / "images", images)
    (store,) = build(job(tmp_path / "root", source, num_views=2))
    reader = Reader(store, range(2))
    digests = {view: reader.select(np.arange(24), view).digests for view in (0, 1)}
    assert len(set(digests[0]) | set(digests[1])) == 48
    assert '"blur_sigma"' in reader.select([3], 1).parameters[0]


@pytest.mark.parametrize(("batch", "rows"), [(1, 364), (64, 320), (364, 364), (1000, 1000)])
def test_a_shard_holds_whole_compute_batches(tmp_path, batch, rows):
    """Patches of 12 x 12 x 1280 float32: 256 MB hold 364 rows."""
    source = SourceConfig(kind="folder", path="")
    work = job(tmp_path, source, teachers=(teacher((384,)),), compute_batch=batch)
    assert rows_per_shard(work) == rows


def test_a_resolution_the_teacher_does_not_take_is_refused(tmp_path, images):
    work = job(
        tmp_path / "root",
        write_folder(tmp_path / "images", images),
        teachers=(teacher((16,)),),
    )
    with pytest.raises(ValueError, match="at 16 px: wants at least"):
        precompute.resolve_stores(work, in_process(work))


def test_an_extraction_without_samples_is_refused(tmp_path, images):
    work = job(tmp_path / "root", write_folder(tmp_path / "images", images))
    with pytest.raises(StoreError, match="no samples here"):
        precompute.resolve_stores(work, in_process(work))


@pytest.mark.ray
def test_actors_do_what_this_process_does_and_outlive_a_kill(tmp_path, images, ray_cluster):
    source = write_folder(tmp_path / "images", images)
    settings = {"num_views": 2, "rows_per_shard": 3, "decode_threads": 1}
    build(job(tmp_path / "here", source, **settings))
    work = job(tmp_path / "there", source, actors=2, **settings)
    indexing.index_samples(work)
    with precompute.extractors(work) as pool:
        stores = precompute.resolve_stores(work, pool)
        victim = next(filter(is_our_extractor, psutil.process_iter()))
        victim.send_signal(signal.SIGKILL)
        done = precompute.extract_missing(work, stores, pool)
    assert done.num_shards == 16
    assert data_files(tmp_path / "there") == data_files(tmp_path / "here")


def is_our_extractor(process: psutil.Process) -> bool:
    """Return True if a process is an actor of this test session: others have some, too."""
    try:
        return (
            "ray::Extractor" in " ".join(process.cmdline())
            and process.environ().get("EUPE_TEST_SESSION") == os.environ["EUPE_TEST_SESSION"]
        )
    except psutil.Error:  # gone meanwhile, or another user's
        return False


@pytest.mark.ray
def test_what_an_actor_raises_arrives_as_it_is(tmp_path, images, ray_cluster):
    source = write_folder(tmp_path / "images", images)
    work = job(tmp_path / "root", source)
    indexing.index_samples(work)
    Path(source.path).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"^all 8 images of a batch are lost; .*No such file"):
        precompute.resolve_stores(work)
    hungry = job(tmp_path / "root", source, cpus_per_actor=1000)
    with pytest.raises(ValueError, match="an actor of 1000 CPUs and 0 GPUs fits no Ray node"):
        precompute.resolve_stores(hungry)


@pytest.mark.ray
@pytest.mark.timeout(300)  # it used to wait for ever, for an actor that had no room
def test_no_more_actors_are_started_than_the_cluster_has_room_for(
    tmp_path, images, ray_cluster, capfd
):
    source = write_folder(tmp_path / "images", images)
    work = job(tmp_path / "root", source, actors=2, cpus_per_actor=2, rows_per_shard=3)
    indexing.index_samples(work)
    with precompute.extractors(work) as pool:
        stores = precompute.resolve_stores(work, pool)
        assert precompute.extract_missing(work, stores, pool).num_shards == 8
    said = "Extractor: of 2 actors (2 CPUs and 0 GPUs each) the Ray cluster has room for 1\n"
    assert capfd.readouterr().err.count(said) == 1


@pytest.mark.parametrize(
    ("cpus", "gpus", "room"),
    [
        (2, 0, 4 + 1 + 2),  # GPUs are not asked for
        (2, 1, 2 + 1),
        (2, 2, 1),
        (0.1, 0.3, 2 * 3 + 3),  # an actor's share is of one GPU: three on each, not six on two
        (0.1, 0.5, 2 * 2 + 2),
        (3, 0.1, 2 + 1),
        (0.7, 1 / 3, 2 * 3 + 3),
        (9, 0, 0),
        (5, 2, 1),
        (5, 3, 0),
    ],
)
def test_room_is_counted_node_by_node(cpus, gpus, room):
    sizes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 4.0}, {"memory": 1.0}]
    nodes = [{"Alive": True, "Resources": size} for size in sizes]
    dead = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    assert num_that_fit([*nodes, dead], cpus, gpus) == room


@pytest.mark.ray
@pytest.mark.slow
def test_killed_in_the_middle_a_build_ends_byte_for_byte_as_undisturbed(tmp_path, emoji):
    parquet = tmp_path / "images.parquet"
    write_parquet(parquet, pictures(emoji, precompute_child.COUNT))
    killed = start(tmp_path / "killed", parquet)
    try:
        there = wait_for_shards(tmp_path / "killed", killed, precompute_child.SHARDS // 3)
    finally:
        killed.kill()
        killed.wait(END_SECONDS)
    wait_for_end_of(killed)
    assert 0 < there < 2 * precompute_child.SHARDS
    computed = finish(start(tmp_path / "killed", parquet))
    assert 0 < computed <= 2 * precompute_child.SHARDS - there
    finish(start(tmp_path / "undisturbed", parquet))
    ours, theirs = data_files(tmp_path / "killed"), data_files(tmp_path / "undisturbed")
    assert sorted(ours) == sorted(theirs)
    assert [path for path in ours if ours[path] != theirs[path]] == []
    assert not list((tmp_path / "killed").rglob(".tmp/*~*"))  # what the dead left was swept
    work = precompute_child.killed_job(tmp_path / "killed", parquet)
    precompute.verify_stores(open_stores(work))


def start(root: Path, images: Path) -> subprocess.Popen[str]:
    """Start a build with a mark of its own, inherited by every process it starts."""
    return subprocess.Popen(
        [sys.executable, precompute_child.__file__, str(root), str(images)],
        env={**os.environ, "EUPE_TEST_BUILD": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    """Wait for a build; return the shards it computed."""
    out, _ = process.communicate(timeout=START_SECONDS + END_SECONDS)
    assert process.returncode == 0
    return int(out.split()[-1])


def wait_for_shards(root: Path, process: subprocess.Popen[str], wanted: int) -> int:
    """Return once so many shards are committed, over all stores."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, "the build ended before it could be killed"
        heads = [json.loads(head.read_bytes()) for head in root.glob("*/*/*/*/manifest/HEAD")]
        there = sum(segment["rows"] for head in heads for segment in head["segments"])
        if there >= wanted:
            return there
        time.sleep(0.02)
    pytest.fail(f"no {wanted} shards after {START_SECONDS} s")


def wait_for_end_of(driver: subprocess.Popen[str]) -> None:
    """Let Ray's processes follow their driver; end by pid those that have not in a while."""
    deadline = time.monotonic() + END_SECONDS
    while left := offspring(driver):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
        psutil.wait_procs(left, timeout=0.5)


def offspring(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes of the killed build, re-parented ones included."""
    assert isinstance(driver.args, list)
    root, found = driver.args[2], []
    for process in psutil.process_iter():
        try:
            if (
                process.environ().get("EUPE_TEST_BUILD") == root
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:  # gone meanwhile, or another user's
            continue
    return found


@dataclass
class Half:
    """A store of which some shards are missing.

    Attributes:
        missing: bool [views, shards].
        provenance: names the compute batch.
    """

    missing: np.ndarray
    provenance: dict[str, int]

    def todo(self, wanted: np.ndarray) -> Missing:
        """Return what is missing, of three shards of four rows."""
        starts = np.arange(3) * 4
        return Missing(ShardRanges(np.arange(3), starts, starts + 4), self.missing & wanted)


EVERY = np.ones((6, 3), bool)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2**18 - 1)), min_size=1, max_size=3))
def test_tasks_are_what_each_shard_wants_of_all_stores_of_one_compute_batch(drawn):
    stores = [
        Half(np.array(list(f"{bits:018b}")).reshape(6, 3) == "1", {"compute_batch": batch})
        for batch, bits in drawn
    ]
    wanted = {}
    for store in stores:
        for view, shard in store.todo(EVERY):
            key = shard.shard, store.provenance["compute_batch"]
            wanted.setdefault(key, {}).setdefault(view, []).append(store)
    tasks = Tasks(stores, [EVERY] * len(stores), "images")
    parts = []
    for key in sorted(wanted):
        views = sorted(wanted[key])
        blocks = [views[at : at + VIEWS_TOGETHER] for at in range(0, len(views), VIEWS_TOGETHER)]
        parts += [(key[0], {view: wanted[key][view] for view in block}) for block in blocks]
    assert [len(parts), parts] == [len(tasks), [(shard.shard, each) for _, each, shard in tasks]]
    assert tasks.num_images == sum(4 * len(each) for _, each in parts)


@settings(max_examples=50)
@given(st.integers(0, 2**18 - 1), st.permutations(range(18)))
def test_tasks_come_in_the_turn_of_the_first_of_their_views(bits, turns):
    """What is done is the same as shard by shard."""
    store = Half(np.array(list(f"{bits:018b}")).reshape(6, 3) == "1", {"compute_batch": 4})
    plain = Tasks([store], [EVERY], "images")
    in_turn = np.array(turns, np.float32).reshape(6, 3)
    ours = Tasks([store], [EVERY], "images", in_turn)

    def pairs(tasks):
        return [(shard.shard, sorted(wanted)) for _, wanted, shard in tasks]

    assert sorted(pairs(ours)) == pairs(plain)
    when = [min(in_turn[view, shard] for view in views) for shard, views in pairs(ours)]
    assert when == sorted(when)


@pytest.mark.parametrize("mean", [0.3, 127 / 255])
def test_pixels_otherwise_than_the_weights_want_them_are_said_once(tmp_path, images, capsys, mean):
    own = teacher()
    encoder = own.encoder.model_copy(update={"pixel_mean": (mean,) * 3})
    asked = own.model_copy(update={"encoder": encoder})
    write_folder(tmp_path / "images", images)
    source = SourceConfig(kind="folder", path=str(tmp_path / "images"))
    for views in (POLICY, CentreView(canvas=64)):
        build(job(tmp_path / "cache", source, teachers=(asked,), views=views))
    sentences = capsys.readouterr().err.count("published weights of tf_efficientnet_lite0 want")
    assert sentences == (1 if mean == 0.3 else 0)
