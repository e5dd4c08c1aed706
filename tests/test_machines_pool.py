"""What an actor raises arrives as it is; what it has begun is little more than what is taken in."""

import time
import traceback
from collections.abc import Iterator
from pathlib import Path

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

        def begin(self, file: Path) -> None:
            file.touch()

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


@pytest.mark.ray
def test_an_actor_gets_its_next_call_when_the_last_result_is_taken_in(pool, tmp_path):
    """What is taken in may be lost until it is committed: with the call in flight, two shards."""
    files = [tmp_path / str(number) for number in range(6)]
    for taken_in, _ in enumerate(pool.run("begin", [(file,) for file in files])):
        time.sleep(0.3)  # for a call that should not be there to begin
        assert sum(file.exists() for file in files) <= taken_in + 2
