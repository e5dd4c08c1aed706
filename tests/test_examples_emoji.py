"""The demo's split: what shows the same thing is in one half of it."""

from collections import defaultdict

import pyarrow.parquet as pq
import pytest

from examples.emoji.build import drawing, pixels, split_of


@pytest.fixture(scope="module")
def table(emoji):
    return pq.read_table(emoji).to_pylist()


@pytest.mark.parametrize("shown", [lambda row: drawing(row["image"]["path"]), "pixels"])
def test_no_query_has_a_twin_in_the_bank(table, shown):
    """Man, woman and person doing one thing, and equal pictures, such as flags of two names."""
    halves = defaultdict(set)
    for row in table:
        key = pixels(row["image"]["bytes"]) if shown == "pixels" else shown(row)
        halves[key].add(row["split"])
    assert len(halves) < len(table)  # there are twins
    assert {len(found) for found in halves.values()} == {1}


def test_what_shows_nobody_is_where_its_path_says(table):
    alone = [row for row in table if row["category"] not in ("People & Body", "Flags")]
    for row in alone:
        assert row["split"] == split_of(row["image"]["path"])


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("1f600.png", "1f600.png"),  # grinning face
        ("1f468-200d-1f373.png", "1f9d1-200d-1f373.png"),  # man, cook
        ("1f9d1-200d-1f373.png", "1f9d1-200d-1f373.png"),  # cook
        ("1f6b6-200d-2640-fe0f-200d-27a1-fe0f.png", "1f6b6.png"),  # woman walking facing right
        ("1f575-fe0f-200d-2642-fe0f.png", "1f575-fe0f.png"),  # man detective
        ("1f468-200d-1f469-200d-1f467-200d-1f466.png", "1f46a.png"),  # a family
        ("2640-fe0f.png", "2640-fe0f.png"),  # the female sign itself
    ],
)
def test_a_drawing_does_not_say_man_or_woman(path, shown):
    assert drawing(path) == shown


def test_the_page_counts_what_is_there(emoji, table):
    page = (emoji.parent / "README.md").read_text()
    for half in ("train", "test"):
        assert f"`{half}` ({sum(row['split'] == half for row in table)})" in page
