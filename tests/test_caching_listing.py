"""The listing of what indexing found: merged in few pieces, in memory that does not follow it."""

import tracemalloc
import weakref

import numpy as np
import pyarrow as pa
import pytest
from support.small_caches import job, pictures, write_folder

from cache.format.sample_table import GIVEN, SOURCES, id_hashes
from eupe.errors import BadInput
from pipelines.caching import indexing, listing
from pipelines.caching.listing import Listing
from pipelines.images import index, looker
from pipelines.images.looker import Part
from pipelines.images.walks import Piece

PART_ROWS = 100
GROWTH_BYTES = 400_000
"""Python's memory beyond that of a tenth of the parts: some hundred bytes a part."""


def piece(number: int) -> Piece:
    """Return the tar of which a part is."""
    name = f"{number:04d}.tar"
    return Piece(name, listing.Path(name), PART_ROWS, f"stamp {number}")


def part(number: int) -> Part:
    """Return what looking at a tar might have found."""
    tar, names = piece(number), [f"{number:04d}/{row:03d}" for row in range(PART_ROWS)]
    columns = [
        names,
        [tar.uri] * PART_ROWS,
        list(range(PART_ROWS)),
        [1] * PART_ROWS,
        [bytes(32)] * PART_ROWS,
        ["{}"] * PART_ROWS,
    ]
    sources = pa.table([[tar.uri], [tar.bytes], [tar.stamp], [""]], schema=SOURCES)
    return Part(pa.table(columns, schema=GIVEN), sources)


def listed(folder, numbers: range, keep: bool = True) -> Listing:
    """Return the listing of parts."""
    made = Listing(folder / "scratch" / "listing", "toy", [piece(n) for n in numbers], keep)
    for number in numbers:
        made.add(part(number))
    return made


@pytest.mark.parametrize("keep", [True, False], ids=["disk", "memory"])
@pytest.mark.parametrize("merged_parts", [2, 3, 7, 256])
def test_however_many_parts_are_merged_at_once_samples_are_in_the_order_of_hashes(
    tmp_path, monkeypatch, merged_parts, keep
):
    monkeypatch.setattr(listing, "MERGED_PARTS", merged_parts)
    monkeypatch.setattr(listing, "MERGED_ROWS", 150)
    monkeypatch.setattr(listing, "TAKEN_ROWS", 30)
    made = listed(tmp_path, range(20), keep)
    samples = pa.concat_tables(made.in_order)
    expected = pa.concat_tables(part(number).records for number in range(20))
    order = np.argsort(id_hashes("toy", expected["sample_id"]))
    assert samples.equals(expected.take(pa.array(order)))
    assert pa.concat_tables(made.in_order).equals(samples)  # it is read twice
    left = {path.name for path in (tmp_path / "scratch").iterdir()} if keep else set()
    assert left <= {"listing"}


@pytest.mark.parametrize("merged_parts", [2, 256])
def test_an_id_that_two_parts_have_is_found_whichever_they_are(tmp_path, monkeypatch, merged_parts):
    monkeypatch.setattr(listing, "MERGED_PARTS", merged_parts)
    monkeypatch.setattr(listing, "MERGED_ROWS", 150)
    made = listed(tmp_path, range(9))
    again = part(4)
    made.add(Part(again.records.slice(17, 1), part(9).sources))
    with pytest.raises(BadInput, match="sample_id '0004/017' is both"):
        list(made.in_order)


def test_memory_of_merging_does_not_follow_the_parts(tmp_path, monkeypatch):
    """Ten times the parts in ten times the slices: a cut of each in each would be a hundred."""
    monkeypatch.setattr(listing, "MERGED_PARTS", 16)
    monkeypatch.setattr(listing, "MERGED_ROWS", PART_ROWS)
    before, peaks = pa.default_memory_pool(), []
    for count in (30, 300):
        made = listed(tmp_path / f"{count}", range(count))
        pool = pa.proxy_memory_pool(before)
        pa.set_memory_pool(pool)
        tracemalloc.start()
        try:
            num_rows = sum(table.num_rows for table in made.in_order)
            peaks.append((tracemalloc.get_traced_memory()[1], pool.max_memory()))
        finally:
            tracemalloc.stop()
            pa.set_memory_pool(before)
        assert num_rows == count * PART_ROWS
    growth = np.subtract(peaks[1], peaks[0])
    assert growth.max() < GROWTH_BYTES, growth


def test_a_part_is_gone_before_the_next_one_is_made(tmp_path, emoji, monkeypatch):
    images = pictures(emoji, 24)
    laid_out = {f"{n % 6}/{n}.png": data for n, data in enumerate(images.values())}
    work = job(tmp_path / "root", write_folder(tmp_path / "images", laid_out))
    monkeypatch.setattr(index, "PART_IMAGES", 1)
    monkeypatch.setattr(index, "TASK_BYTES", 1)
    look, joined = looker.Looker.look, index.joined
    parts, alive = [], []

    def looked(self, pieces):
        alive.append(sum(each() is not None for each in parts))
        found = look(self, pieces)
        parts.append(weakref.ref(found.part))
        return found

    def handed_on(waiting):
        made = joined(waiting)
        parts.append(weakref.ref(made))
        return made

    monkeypatch.setattr(looker.Looker, "look", looked)
    monkeypatch.setattr(index, "joined", handed_on)
    assert indexing.index_samples(work).num_new == 24
    assert alive == [0] * 6
