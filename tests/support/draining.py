"""Tells a Ray cluster that one of its nodes will be taken back, as a cloud does."""

import time

HOUR_MS = 3_600_000


def drain(address: str, node_id: str) -> None:
    """Have a node drained, which it has an hour for.

    Args:
        address: of the cluster.
        node_id: in hexadecimal digits.
    """
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    until = time.time_ns() // 1_000_000 + HOUR_MS
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot", until)
    assert accepted, why
