"""What a pool's actors do, done in this process: without Ray, by threads that share one object."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class InProcess:
    """`pipelines.machines.pool.Workers` in this process.

    Args:
        worker: whose methods are called.
        at_once: calls in flight.
    """

    def __init__(self, worker: object, at_once: int = 1) -> None:
        self._worker, self._at_once = worker, at_once

    def run(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[int, Any]]]:
        """Call a method for each task; yield each result alone, in the order of the tasks.

        Raises:
            Exception: whatever a call raised.
        """
        call = getattr(self._worker, method)
        with ThreadPoolExecutor(self._at_once) as threads:
            calls = deque(threads.submit(call, *task) for task in tasks[: self._at_once - 1])
            for number in range(len(tasks)):
                if (following := number + self._at_once - 1) < len(tasks):
                    calls.append(threads.submit(call, *tasks[following]))
                yield [(number, calls.popleft().result())]
