"""Deaths of workers, and of nodes: those that have happened, and those that are announced.

What a lost node explains counts for nothing, the others count by the hour. A node that is about to
be taken back (a spot machine, or one that an autoscaler wants no longer) is being drained: it lives
and gets nothing new.
"""

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


def nodes_draining() -> frozenset[str]:
    """Return the ids of the live nodes that the connected Ray has been told it will lose."""
    import ray

    # Nothing public says so; Ray Train's own watcher asks here, too.
    return frozenset(ray._private.state.state.get_draining_nodes())


class Drained:
    """Whether a node is being drained; looked up once a second.

    Args:
        node: its id.
    """

    def __init__(self, node: str) -> None:
        self._node, self._drained, self._looked = node, False, float("-inf")

    def __call__(self) -> bool:
        """Return True once it is."""
        now = time.monotonic()
        if not self._drained and now - self._looked >= LOOK_SECONDS:
            self._looked, self._drained = now, self._node in nodes_draining()
        return self._drained


def is_lost_one(nodes: Collection[str], seconds: float) -> bool:
    """Return True if one of some nodes is dead, or found to be so within some seconds."""
    return _comes_true(lambda: not nodes_alive() >= frozenset(nodes), seconds)


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not (true := condition()) and time.monotonic() < until:
        time.sleep(LOOK_SECONDS)
    return true
