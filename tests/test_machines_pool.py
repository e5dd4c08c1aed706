"""What an actor raises: bad input arrives as its sentence, a bug with the traceback it had."""

import traceback
from collections.abc import Iterator

import numpy as np
import pytest

from cache.errors import NotBuilt
from eupe import fingerprint
from pipelines.machines.errors import bad_input
from pipelines.machines.pool import Pool


@pytest.fixture(scope="module")
def pool(ray_cluster: None) -> Iterator[Pool]:
    class Faulty:  # here, for actors cannot import this module
        def refuse(self) -> None:
            fingerprint.canonical_json(float("nan"))

        def look_into_nothing(self) -> None:
            raise NotBuilt("no shard yet")

        def add_what_does_not_fit(self) -> None:
            np.zeros(2) + np.zeros(3)

        def fall(self) -> None:
            raise KeyError("nothing")

    with Pool(Faulty, {}, actors=1, cpus=1) as started:
        yield started


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "kind", "sentence"),
    [
        ("refuse", ValueError, "$: nan is not finite and has no JSON form"),
        ("look_into_nothing", NotBuilt, "no shard yet"),
    ],
)
def test_bad_input_is_a_sentence_and_no_more(pool, method, kind, sentence):
    with pytest.raises(kind) as refused:
        list(pool.run(method, [()]))
    assert bad_input(refused.value) == str(refused.value) == sentence
    assert "Traceback" not in str(refused.value)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("method", "kind"), [("add_what_does_not_fit", "ValueError"), ("fall", "KeyError")]
)
def test_a_bug_keeps_the_traceback_it_had_in_the_actor(pool, method, kind):
    with pytest.raises(RuntimeError) as bug:
        list(pool.run(method, [()]))
    assert bad_input(bug.value) is None
    shown = "".join(traceback.format_exception(bug.value))
    assert f"in {method}" in shown
    assert f"\n{kind}: " in shown
