"""A pool of Ray actors, each with a few calls in flight, that outlives actors and their nodes."""

import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol, Self

from eupe.errors import BadInput
from pipelines.machines import deaths
from pipelines.machines.cluster import connect
from pipelines.machines.deaths import Deaths
from pipelines.machines.errors import bad_input, keeping_traceback

IN_FLIGHT = 2  # a call writes its files while the next one computes
LOOK_SECONDS = 10.0
"""Between two looks at a cluster whose nodes come and go."""
GATHERED = 9
"""Results are gathered for so many times as long as the last ones took to be taken in: who commits
them does so for a tenth of the time, in a bucket every few seconds, on a disk at once."""
GATHERED_SECONDS = 5.0
"""And no longer: followers see progress."""


class Workers(Protocol):
    """Whoever does calls of one class's methods: the actors of a `Pool`, or an object here."""

    def run(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[int, Any]]]:
        """Call a method for each task; yield (task number, result) of the calls that have ended."""
        ...


class Lost(Exception):
    """A call's actor, or its result, is gone; the call can be repeated."""


@dataclass
class _Place:
    """What an actor of the pool stands in; another follows it there when it dies.

    Attributes:
        actor: its handle.
        node: that it lives on, None until it says so.
        deaths: of its predecessors.
    """

    actor: Any
    node: str | None = None
    deaths: Deaths = field(default_factory=Deaths)


class Pool:
    """Actors of one class, started when there is work for them and kept until the block ends.

    An actor that dies is followed by another, which repeats its calls; calls must therefore be
    repeatable. What dies with its node is counted for nothing, other deaths are counted by the
    hour. An actor gets calls once it lives: one that waits for room keeps none from the others,
    and works on when a node joins. One whose node is being drained gets no more calls, ends those
    it has, and is followed by one elsewhere. Ray itself is connected with the first work, too.

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
        self._places: list[_Place] = []
        self._told = False
        self._connected = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connected.close()

    def run(self, method: str, tasks: Sequence[tuple[Any, ...]]) -> Iterator[list[tuple[int, Any]]]:
        """Call a method for each task; yield the results that are there together, in any order.

        Args:
            method: of the actor class.
            tasks: positional arguments of each call.

        Yields:
            (task number, result) of the calls that have ended since the last.

        Raises:
            BadInput: one actor needs more than any node of the cluster has, or a call refused.
            StoreError: a call refused.
            RemoteBug: a call raised anything else.
            RuntimeError: actors died more often than others follow them.
        """
        if not tasks:
            return
        self._start(min(self._actors, len(tasks)))
        calls = _Calls(self, method, tasks)
        num_left, looked, taking_in = len(tasks), time.monotonic(), 0.0
        while num_left:
            results, refusal = calls.ended(min(GATHERED * taking_in, GATHERED_SECONDS))
            if time.monotonic() - looked >= LOOK_SECONDS:
                leaving = deaths.nodes_draining()
                calls.welcome(self._joined(min(self._actors, num_left), leaving))
                calls.leave(leaving)
                looked = time.monotonic()
            # Taken in before the actors get other calls: what is lost with this process are the
            # calls in flight, and not one more that it was about to commit.
            if results:
                num_left -= len(results)
                began = time.monotonic()
                yield results
                taking_in = time.monotonic() - began
            if refusal is not None:
                raise refusal
            calls.go_on()

    def _start(self, count: int) -> None:
        """Have at least so many actors, or as many as fit."""
        if count <= len(self._places):
            return
        self._connected.enter_context(connect())
        import ray

        nodes, leaving = ray.nodes(), deaths.nodes_draining()
        # Where all that have room are leaving, one actor waits for a node that joins.
        most = min(
            room(nodes, self._cpus, self._gpus),
            max(num_that_fit(_staying(nodes, leaving), self._cpus, self._gpus), 1),
        )
        if most < count and not self._told:
            self._told = True
            print(
                f"{self._make.__name__}: of {self._actors} actors ({self._cpus:g} CPUs and "
                f"{self._gpus:g} GPUs each) the Ray cluster has room for {most}",
                file=sys.stderr,
            )
        for _ in range(min(count, most) - len(self._places)):
            self._places.append(_Place(self._new()))

    def _joined(self, wanted: int, leaving: Collection[str]) -> list[_Place]:
        """Return places for the actors that nodes have room for now and had none before."""
        import ray

        most = min(wanted, num_that_fit(_staying(ray.nodes(), leaving), self._cpus, self._gpus))
        more = [_Place(self._new()) for _ in range(most - len(self._places))]
        self._places += more
        return more

    def _new(self) -> Any:
        """Start an actor; it lives once there is room for it."""
        import ray

        options: dict[str, Any] = {  # Ray's annotations have not all of them
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,  # the pool has others follow it
            "max_task_retries": 0,
            "max_concurrency": IN_FLIGHT,
        }
        remote: Any = ray.remote(**options)(self._make)
        actor = remote.remote(**self._arguments)
        self._connected.callback(ray.kill, actor)
        return actor

    @staticmethod
    def _ask_where(place: _Place) -> Any:
        """Ask a place's actor for its node, which it answers once it lives."""
        return place.actor.__ray_call__.remote(_where)

    def _move(self, place: _Place) -> None:
        """Have another actor follow one that has nothing to do on a node that is being drained."""
        import ray

        ray.kill(place.actor)
        place.actor, place.node = self._new(), None

    def _follow(self, place: _Place, error: Lost) -> None:
        """Have another actor follow one that died.

        Raises:
            RuntimeError: too many have died there, though their nodes live.
        """
        import ray
        from ray.exceptions import ActorUnavailableError

        ray.kill(place.actor)  # it may be out of reach only
        # Of an actor that only stopped answering Ray does not know yet if its node is dead.
        unsure = isinstance(error.__cause__, ActorUnavailableError)
        nodes = [] if place.node is None else [place.node]
        if place.deaths.add(nodes, deaths.NODE_SECONDS if unsure else 0.0):
            raise RuntimeError(
                f"{self._make.__name__} died more than {deaths.MAX_DEATHS} times within the hour; "
                "what was finished is kept. Often memory ran out: lower extraction.compute_batch "
                "or extraction.actors"
            ) from error.__cause__
        place.actor, place.node = self._new(), None

    @staticmethod
    def _result(reference: Any) -> Any:
        """Return what a call returned.

        Raises:
            Lost: nobody knows: its actor or its result is gone.
        """
        import ray
        from ray import exceptions

        gone = (
            exceptions.RayActorError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
        )
        try:
            return ray.get(reference)
        except exceptions.RayTaskError as error:
            if bad_input(error) is None:
                raise
            raise error.cause from None  # the sentence alone
        except gone as error:
            raise Lost from error


def _where(actor: object) -> str:
    """Return the node of an actor, in its process."""
    import ray

    return ray.get_runtime_context().get_node_id()


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


def _staying(
    nodes: Iterable[Mapping[str, Any]], leaving: Collection[str]
) -> list[Mapping[str, Any]]:
    """Return the nodes, as `ray.nodes` gives them, that are not among those that leave."""
    return [node for node in nodes if node["NodeID"] not in leaving]


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


class _Calls:
    """The calls of one `Pool.run`: in flight, to be made, and to be made again.

    Args:
        pool: whose actors they are of.
        method: of the actor class.
        tasks: positional arguments of each call.
    """

    def __init__(self, pool: Pool, method: str, tasks: Sequence[tuple[Any, ...]]) -> None:
        self._pool, self._method, self._tasks = pool, method, tasks
        self._fresh, self._again = iter(range(len(tasks))), deque[int]()
        self._starting: dict[Any, _Place] = {}
        self._running: dict[Any, tuple[int, _Place, Any]] = {}
        self._free: list[tuple[_Place, Any]] = []
        self._leaving = deaths.nodes_draining()
        self.welcome(pool._places)

    def welcome(self, places: Iterable[_Place]) -> None:
        """Have actors get calls once they live."""
        for place in places:
            self._starting[self._pool._ask_where(place)] = place

    def leave(self, nodes: frozenset[str]) -> None:
        """Make no more calls on some nodes; actors that have none there move elsewhere."""
        self._leaving = nodes
        for place in self._pool._places:
            self._leaves(place)

    def _leaves(self, place: _Place) -> bool:
        """Return True if an actor gets no more calls where it is; it moves once it has none."""
        starts = any(each is place for each in self._starting.values())
        if starts or place.node not in self._leaving:
            return False
        if not any(each is place for _, each, _ in self._running.values()):
            self._pool._move(place)
            self.welcome([place])
        return True

    def ended(self, seconds: float) -> tuple[list[tuple[int, Any]], Exception | None]:
        """Return what has ended, task number and result; and the first refusal among it.

        Args:
            seconds: to wait for others after the first, at most.
        """
        places = {call: place for call, (_, place, _) in self._running.items()}
        results, refusal = list[tuple[int, Any]](), None
        for each in _gathered(places, self._starting, seconds):
            try:
                results += self._starts(each) if each in self._starting else self._ends(each)
            except Exception as error:  # raised once the others are taken in
                refusal = refusal or error
        return results, refusal

    def go_on(self) -> None:
        """Make other calls where some have ended."""
        free, self._free = self._free, []
        for place, actor in free:
            if place.actor is actor and not self._leaves(place):
                self._feed(place)

    def _feed(self, place: _Place) -> None:
        """Make a call; where there is none to make, one that gets lost elsewhere may follow."""
        number = self._again.popleft() if self._again else next(self._fresh, None)
        if number is None:
            self._free.append((place, place.actor))
            return
        call = place.actor.__ray_call__.remote(_call, self._method, *self._tasks[number])
        self._running[call] = (number, place, place.actor)

    def _starts(self, asked: Any) -> list[tuple[int, Any]]:
        """Give an actor that lives its first calls."""
        place = self._starting.pop(asked)
        try:
            place.node = self._pool._result(asked)
        except Lost as error:
            self._lost(place, place.actor, error)
            return []
        if not self._leaves(place):
            for _ in range(IN_FLIGHT):
                self._feed(place)
        return []

    def _ends(self, call: Any) -> list[tuple[int, Any]]:
        """Return a call's task number and result; none if its actor was lost."""
        number, place, actor = self._running.pop(call)
        try:
            result = self._pool._result(call)
        except Lost as error:
            self._again.append(number)
            self._lost(place, actor, error)
            return []
        self._free.append((place, actor))
        return [(number, result)]

    def _lost(self, place: _Place, actor: Any, error: Lost) -> None:
        """Have another actor follow one that died."""
        if place.actor is actor:  # the first of its calls that is known to be lost
            self._pool._follow(place, error)
            self.welcome([place])


def _gathered(
    running: Mapping[Any, _Place], starting: Mapping[Any, _Place], seconds: float
) -> list[Any]:
    """Wait for a call to end, and for others so long as every actor has one to work on.

    Args:
        running: call -> where its actor stands.
        starting: question where an actor lives -> where it stands.
        seconds: to wait for others, at most.
    """
    import ray

    until = time.monotonic() + seconds
    ended, rest = ray.wait([*running, *starting], num_returns=1, timeout=LOOK_SECONDS)
    while ended and rest and (left := until - time.monotonic()) > 0:
        busy = {id(running[call]) for call in rest if call in running}
        if any(call in starting or id(running[call]) not in busy for call in ended):
            break
        more, rest = ray.wait(rest, num_returns=1, timeout=left)
        ended += more
    if ended and rest:
        ended += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return list(ended)
