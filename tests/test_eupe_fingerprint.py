"""Fingerprints: pinned values, refusal of what has no stable form, difference by field."""

import datetime
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from eupe import fingerprint as fp
from eupe.spec import (
    AugmentedView,
    CentreView,
    CodecSpec,
    DatasetSpec,
    EncoderSpec,
    StoreSpec,
    TeacherSpec,
    views_hash,
)

GOLDEN = Path(__file__).parent / "golden/fingerprints.json"

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


def specs() -> dict[str, object]:
    encoder = EncoderSpec(architecture="vit_tiny_patch16_dinov3_qkvb")
    teacher = TeacherSpec(name="tiny", encoder=encoder, weights="0" * 64)
    store = StoreSpec(
        dataset=DatasetSpec(name="emoji"),
        views=AugmentedView(canvas=128),
        teacher=teacher,
        codec=CodecSpec(name="float16"),
        resolution=96,
        grid=(6, 6),
        patch_dim=192,
        summary_dim=192,
    )
    return {"encoder": encoder, "teacher": teacher, "store": store, "views": store.views}


def test_fingerprints_are_the_pinned_ones():
    """A change here orphans every store on disk: it needs a new format, not a new golden file."""
    pinned = json.loads(GOLDEN.read_text())
    assert {name: spec.fingerprint() for name, spec in specs().items()} == pinned


def test_store_directory_names_dataset_views_teacher_and_resolution():
    store = specs()["store"]
    parts = store.directory().parts
    assert parts[0] == "emoji"
    assert parts[1] == views_hash(store.views)
    assert parts[2].startswith("tiny-")
    assert parts[3] == "96"


def test_resolution_is_not_part_of_the_teacher_directory():
    store = specs()["store"]
    larger = store.model_copy(update={"resolution": 192, "grid": (12, 12)})
    assert store.teacher_directory() == larger.teacher_directory()
    assert store.fingerprint() != larger.fingerprint()


def test_every_view_field_is_identity():
    base = AugmentedView()
    changes = {"seed": 1, "canvas": 256, "crop_area": (0.4, 1.0), "background": (0, 0, 0)}
    hashes = {views_hash(base.model_copy(update={key: value})) for key, value in changes.items()}
    assert len(hashes | {views_hash(base), views_hash(CentreView())}) == len(changes) + 2


@given(PLAIN)
def test_survives_a_json_round_trip(value):
    assert fp.fingerprint(json.loads(json.dumps(value))) == fp.fingerprint(value)


@given(st.dictionaries(st.text(max_size=3), st.integers(), min_size=2))
def test_key_order_does_not_matter(value):
    reversed_keys = dict(reversed(value.items()))
    assert fp.fingerprint(reversed_keys) == fp.fingerprint(value)


@pytest.mark.parametrize(
    "value",
    [math.nan, {"a": math.inf}, {1: "int key"}, {"a": {1, 2}}, [object()], datetime.date.today()],
)
def test_refuses_what_has_no_stable_form(value):
    with pytest.raises(ValueError, match=r"\$"):
        fp.fingerprint(value)


def test_difference_names_every_field_that_differs():
    ours = {"a": 1, "deep": {"x": [1, 2], "y": "same"}, "only": None}
    theirs = {"a": 1.0, "deep": {"x": [1, 3], "y": "same"}}
    assert fp.difference(ours, theirs) == [
        "a: 1 != 1.0",
        "deep.x: [1, 2] != [1, 3]",
        "only: only here",
    ]
    assert fp.difference(ours, ours) == []


@given(PLAIN, PLAIN)
def test_difference_is_empty_exactly_for_equal_fingerprints(a, b):
    assert (fp.difference(a, b) == []) == (fp.fingerprint(a) == fp.fingerprint(b))


def test_a_spec_refuses_a_field_it_does_not_have():
    with pytest.raises(ValidationError, match="canvass"):
        CentreView(canvass=64)


if __name__ == "__main__":  # python tests/test_eupe_fingerprint.py, after a deliberate change
    GOLDEN.write_text(json.dumps({k: s.fingerprint() for k, s in specs().items()}, indent=1) + "\n")
