"""Calls done in this process: as a pool yields them, as many at once as asked, and no more."""

import threading

import pytest

from pipelines.machines.in_process import InProcess

PATIENCE_SECONDS = 30


class Worker:
    def __init__(self, at_once: int) -> None:
        self.begun: list[int] = []
        self._meeting = threading.Barrier(at_once, timeout=PATIENCE_SECONDS)

    def square(self, number: int) -> int:
        self.begun.append(number)
        self._meeting.wait()  # with fewer in flight it breaks
        return number * number


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_results_come_in_order_each_in_a_list_of_its_own(at_once):
    worker = Worker(at_once)
    found = list(InProcess(worker, at_once).run("square", [(number,) for number in range(6)]))
    assert found == [[(number, number * number)] for number in range(6)]


def test_nothing_is_begun_that_nobody_has_asked_for():
    worker = Worker(1)
    results = InProcess(worker).run("square", [(number,) for number in range(6)])
    assert next(results) == [(0, 0)]
    results.close()
    assert worker.begun == [0]


def test_what_a_call_raises_comes_out():
    with pytest.raises(TypeError):
        list(InProcess(Worker(1)).run("square", [("a",)]))
