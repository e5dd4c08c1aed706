"""Asking every node of the connected Ray the same."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from pipelines.machines.deaths import nodes_draining

T = TypeVar("T")


class Answers(NamedTuple, Generic[T]):
    """What nodes said, and why others are mute, by the name of the node."""

    said: dict[str, T]
    mute: dict[str, str]


def ask(function: Callable[[str], T], seconds: float, resource: str | None = None) -> Answers[T]:
    """Call a function on every live node, all at once; those that are being drained start nothing.

    Args:
        function: of the node's name; a process of that node runs it.
        seconds: to wait for answers.
        resource: only nodes that have some of it are asked; None: all.
    """
    import ray  # after `connect` has settled its environment
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def called(name: str) -> T:  # Ray takes functions, and no partial ones
        return function(name)

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(called)
    asked, leaving = {}, nodes_draining()
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in leaving:
            continue
        if resource is None or node["Resources"].get(resource):
            name = f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[name] = remote.options(scheduling_strategy=where).remote(name)
    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
    answers = Answers[T]({}, {})
    for name, answer in asked.items():
        try:
            answers.said[name] = ray.get(answer, timeout=1)
        except Exception as error:  # whatever stops it there is what is to be found
            answers.mute[name] = _last_line(error)
    return answers


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'it says nothing'}"
