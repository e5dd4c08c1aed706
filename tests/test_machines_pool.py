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

        def nap(self, seconds: float) -> None:
            time.sleep(seconds)

        def refuse_late(self, seconds: float) -> None:
            time.sleep(seconds)
            if seconds:
                raise NotBuilt("no shard yet")

    with Pool(Faulty, {}, actors=1, cpus=1) as started:
        yield started


def test_no_work_needs_no_ray():
    with Pool(object, {}, actors=1, cpus=1) as workers:
        assert list(workers.run("anything", [])) == []


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
    taken_in = 0
    for results in pool.run("begin", [(file,) for file in files]):
        time.sleep(0.3)  # for a call that should not be there to begin
        assert sum(file.exists() for file in files) <= taken_in + 2
        taken_in += len(results)
    assert taken_in == len(files)


@pytest.mark.ray
def test_results_are_gathered_while_every_actor_has_a_call_to_work_on(pool):
    """Whoever takes them in slowly gets them together, and no actor waits for that."""
    naps = [(0.0,), (0.4,)] * 4  # the second of each two is what the actor works on meanwhile
    together = []
    for results in pool.run("nap", naps):
        time.sleep(0.3)
        together.append(len(results))
    assert sum(together) == len(naps)
    assert max(together) == 2  # both have ended: the actor has nothing to do


@pytest.mark.ray
def test_what_ended_beside_a_refusal_is_taken_in_first(pool):
    ended = pool.run("refuse_late", [(0.0,), (1.5,), (0.0,)])
    assert [number for number, _ in next(ended)] == [0]
    time.sleep(0.4)  # so the third result waits for the second, which is worked on
    assert [number for number, _ in next(ended)] == [2]
    with pytest.raises(NotBuilt, match="no shard yet"):
        next(ended)
