"""Deaths of workers: what a lost node explains counts for nothing, the others count by the hour."""

import time
from collections.abc import Callable, Collection

MAX_DEATHS = 3
"""In one place within DEATH_SECONDS, on nodes that live: more is a bug, or memory."""
DEATH_SECONDS = 3600.0
NODE_SECONDS = 30.0
"""Until Ray finds a node dead that has stopped answering."""
LOOK_SECONDS = 1.0


class Deaths:
    """Those in one place: of an actor and its followers, or of workers that train together."""

    def __init__(self) -> None:
        self._deaths = list[tuple[float, frozenset[str]]]()

    def add(self, nodes: Collection[str], seconds: float = 0.0) -> bool:
        """Take a death; return True if there are too many for another try.

        Args:
            nodes: it may have died with one of these; none if nobody knows.
            seconds: for which Ray may not know yet that a node is dead.
        """
        self._deaths.append((time.monotonic(), frozenset(nodes)))
        return not _comes_true(lambda: self._counted() <= MAX_DEATHS, seconds)

    def _counted(self) -> int:
        """Count the deaths within the hour, on nodes that live."""
        alive, since = nodes_alive(), time.monotonic() - DEATH_SECONDS
        return sum(when > since and nodes <= alive for when, nodes in self._deaths)


def nodes_alive() -> frozenset[str]:
    """Return the ids of the nodes that the connected Ray has now."""
    import ray

    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def is_lost_one(nodes: Collection[str], seconds: float) -> bool:
    """Return True if one of some nodes is dead, or found to be so within some seconds."""
    return _comes_true(lambda: not nodes_alive() >= frozenset(nodes), seconds)


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return true
