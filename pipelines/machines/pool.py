"""A pool of restartable Ray actors, each with a few calls in flight; results as they come."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from decimal import Decimal
from itertools import islice
from typing import Any, Self

from eupe.errors import BadInput
from pipelines.machines.cluster import connect
from pipelines.machines.errors import bad_input, keeping_traceback

IN_FLIGHT = 2  # a call writes its files while the next one computes
MAX_RESTARTS = 3
MAX_TASK_RETRIES = 3


class Pool:
    """Actors of one class, started when there is work for them and kept until the block ends.

    An actor whose process dies is started anew and repeats its calls, a finite number of times;
    calls must therefore be repeatable. Ray itself is connected with the first work, too.

    Args:
        make: class of the actors.
        arguments: of its constructor.
        actors: how many at most; fewer, and said on stderr, where the cluster has no room for all.
        cpus: of each actor, above 0.
        gpus: of each actor.
    """

    def __init__(
        self,
        make: type,
        arguments: Mapping[str, Any],
        actors: int,
        cpus: float,
        gpus: float = 0.0,
    ) -> None:
        self._make, self._arguments = make, dict(arguments)
        self._actors, self._cpus, self._gpus = actors, cpus, gpus
        self._handles: list[Any] = []
        self._connected = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connected.close()

    def run(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Call a method for each task; yield (task number, result) as calls end, in any order.

        Args:
            method: of the actor class.
            tasks: positional arguments of each call.

        Raises:
            BadInput: one actor needs more than any node of the cluster has, or a call refused.
            StoreError: a call refused.
            RemoteBug: a call raised anything else.
            RuntimeError: actors died more often than they are started anew.
        """
        self._start(min(self._actors, len(tasks)))
        import ray  # after `connect` has settled its environment

        waiting = iter(enumerate(tasks))
        running: dict[ray.ObjectRef[Any], tuple[int, Any]] = {}

        def feed(handle: Any) -> None:
            for number, task in islice(waiting, 1):
                running[handle.__ray_call__.remote(_call, method, *task)] = (number, handle)

        for handle in self._handles * IN_FLIGHT:
            feed(handle)
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            number, handle = running.pop(done)
            # Taken in before the actor gets another call: what is lost with this process are the
            # calls in flight, and not one more that it was about to commit.
            yield number, self._result(done)
            feed(handle)

    def _start(self, count: int) -> None:
        """Have at least so many actors, or as many as fit."""
        if count <= len(self._handles):
            return
        self._connected.enter_context(connect())
        import ray

        most = room(ray.nodes(), self._cpus, self._gpus)
        if most < count:
            print(
                f"{self._make.__name__}: of {self._actors} actors ({self._cpus:g} CPUs and "
                f"{self._gpus:g} GPUs each) the Ray cluster has room for {most}",
                file=sys.stderr,
            )
            self._actors = count = most
        options: dict[str, Any] = {  # Ray's annotations have not all of them
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": MAX_RESTARTS,
            "max_task_retries": MAX_TASK_RETRIES,
            "max_concurrency": IN_FLIGHT,
        }
        remote: Any = ray.remote(**options)(self._make)
        for _ in range(count - len(self._handles)):
            handle = remote.remote(**self._arguments)
            self._connected.callback(ray.kill, handle)
            self._handles.append(handle)

    def _result(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(reference)
        except RayTaskError as error:
            if bad_input(error) is None:
                raise
            raise error.cause from None  # the sentence alone
        except RayActorError as error:
            raise RuntimeError(
                f"{self._make.__name__} died more than {MAX_RESTARTS} times; what was finished is "
                "kept. Often memory ran out: lower extraction.compute_batch or extraction.actors"
            ) from error


@keeping_traceback()
def _call(actor: object, method: str, *task: Any) -> Any:
    """Do one call, in the actor's process."""
    return getattr(actor, method)(*task)


def room(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Count the actors there is room for; refuse one that Ray would wait for in silence, for ever.

    An actor without room waits like that too, and so does every call that it is given.
    """
    found = num_that_fit(nodes, cpus, gpus)
    if not found:
        have = [node["Resources"] for node in nodes if node["Alive"]]
        named = ", ".join(
            f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in have
        )
        raise BadInput(
            f"an actor of {cpus:g} CPUs and {gpus:g} GPUs fits no Ray node (they have {named}); "
            "lower extraction.cpus_per_actor or extraction.gpus_per_actor"
        )
    return found


def num_that_fit(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """Count the actors that the nodes of a cluster hold together, were it theirs alone.

    Args:
        nodes: as `ray.nodes` gives them.
        cpus: of each actor, above 0.
        gpus: of each actor; Ray takes a part of one below 1, and whole ones above.
    """
    # Decimals, since 0.3 // 0.1 is 2.
    each_cpus, each_gpus = Decimal(str(cpus)), Decimal(str(gpus))
    total = 0
    for node in nodes:
        if not node["Alive"]:
            continue
        fit = Decimal(str(node["Resources"].get("CPU", 0))) // each_cpus
        if each_gpus:
            have = Decimal(str(node["Resources"].get("GPU", 0)))
            fit = min(fit, have * (1 // each_gpus) if each_gpus < 1 else have // each_gpus)
        total += int(fit)
    return total
