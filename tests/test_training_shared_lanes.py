"""Workers whose number does not divide the lanes are told so, once, before they begin."""

import re
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_stage, two_workers

from pipelines.recipe.config import Recipe, WorkersConfig
from pipelines.training import launch, ray_train, shared_lanes


def run_of(directory: Path, lanes: int, count: int, batch: int) -> Recipe:
    """Return a run of so many lanes and workers, whose stage has batches of so many rows."""
    run = small_stage.recipe(directory, global_batch=batch)
    return run.model_copy(update={"lanes": lanes, "workers": WorkersConfig(count=count)})


def told(lanes: int, count: int, batch: int) -> str | None:
    """Return what is said."""
    run = run_of(Path("/nowhere"), lanes, count, batch)
    return shared_lanes.told(run, run.stage("stage2"))


@pytest.mark.parametrize(
    ("lanes", "count", "batch", "said"),
    [
        (256, 64, 2048, None),
        (256, 48, 2304, "1.12 times .*; workers.count = 32 or 64, or .* lanes = 768, would"),
        (4, 3, 8, r"1.25 times together; workers.count = 2 or 4 would read them once$"),
        (1, 8, 64, "8.00 times together; workers.count = 1, or .* lanes = 8, would"),
        (4, 8, 64, "2.00 times together; workers.count = 4, or .* lanes = 8, would"),
    ],
)
def test_what_is_read_more_than_once_is_said_with_what_would_be_right(lanes, count, batch, said):
    found = told(lanes, count, batch)
    if said is None:
        assert found is None
        return
    assert re.search(said, found or "")
    assert f"stage2: workers.count = {count} does not divide lanes = {lanes}, so " in (found or "")


@given(lanes=st.integers(1, 40), count=st.integers(1, 60), each=st.integers(1, 12))
def test_the_factor_is_what_the_stretches_touch_and_each_advice_is_right(lanes, count, each):
    batch = lanes * each
    lane_of = np.arange(batch) // each
    ends = [batch * rank // count for rank in range(count + 1)]
    touched = sum(len(np.unique(lane_of[a:b])) for a, b in pairwise(ends))
    said = told(lanes, count, batch)
    if said is None:
        assert touched == lanes
        return
    factor = re.search(r"read the caches ([\d.]+) times", said)
    assert factor is not None
    assert float(factor[1]) == pytest.approx(touched / lanes, abs=0.006)
    counts = re.search(r"workers.count = (\d+)(?: or (\d+))?,? ?(?:or|would)", said)
    assert counts is not None
    assert all(told(lanes, int(number), batch) is None for number in counts.groups() if number)
    if other := re.search(r"beginning lanes = (\d+),", said):
        assert batch % int(other[1]) == 0
        assert told(int(other[1]), count, batch) is None


@pytest.mark.parametrize(
    ("lanes", "nodes", "times"), [(4, "a", 1), (1, "ab", 1), (1, "a", 0), (3, "ab", 0)]
)
def test_it_is_said_once_and_before_any_worker_begins(
    tmp_path, monkeypatch, capsys, lanes, nodes, times
):
    """Of one lane only where there are machines: on one all workers read the same pages."""

    class Began(Exception):
        pass

    def begin(*_: object) -> None:
        raise Began

    monkeypatch.setattr(ray_train.cluster, "connect", nullcontext)
    monkeypatch.setattr(ray_train, "_check_room", lambda recipe: None)
    monkeypatch.setattr(ray_train.deaths, "nodes_alive", lambda: frozenset(nodes))
    monkeypatch.setattr(ray_train, "_to_the_end", begin)
    run = run_of(tmp_path, lanes, 3, 12)
    with pytest.raises(Began):
        launch.train(run, run.stage("stage2"), make_inputs=two_workers.noise_inputs)
    assert (
        capsys.readouterr().err.count(f"workers.count = 3 does not divide lanes = {lanes}") == times
    )
